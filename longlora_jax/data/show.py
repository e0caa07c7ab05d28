"""Examples as a run trains on them, with what is scored marked: python -m longlora_jax.data.show --config FILE.

The marks stand around the tokens that are targets, ends of turns among them. Reads the data and the tokenizer of the
config, and no weights.
"""

import argparse
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from longlora_jax import errors
from longlora_jax.config import Config, DataConfig, data_parts, validate, with_held_out_eval
from longlora_jax.config_file import read_config, with_base_of
from longlora_jax.data.documents import Documents, open_documents
from longlora_jax.data.new_tokens import load_with_tokens
from longlora_jax.data.tokenizer import Tokenizer
from longlora_jax.errors import UserError, number

BEGIN, END = "⟦", "⟧"
SHOWN = 600  # characters of an example in the census, half of them of its end


def marked(ids: np.ndarray, scored: np.ndarray | None, tokenizer: Tokenizer, limit: int = 0) -> str:
    """The text of an example with scored parts in ⟦⟧; limit: characters that are shown, 0: all.

    ids, scored: [tokens] int32; scored None: every token is.
    """
    scored = np.ones(len(ids), np.int32) if scored is None else scored
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(ids)]
    parts = []
    for start, stop in zip(edges, edges[1:], strict=False):
        # Decoded after what is before it: a tokenizer may drop the space that begins a text.
        before = tokenizer.decode(ids[max(0, start - 8) : start])
        text = tokenizer.decode(ids[max(0, start - 8) : stop])[len(before) :]
        parts.append(f"{BEGIN}{text}{END}" if scored[start:stop].any() else text)
    whole = "".join(parts)
    if limit and len(whole) > limit + 50:  # else the note would be longer than what it stands for
        half = limit // 2
        whole = f"{whole[:half]} ... {len(whole) - 2 * half:,} characters ... {whole[-half:]}"
    return whole


def example_lines(
    documents: Documents, tokenizer: Tokenizer, first: int = 0, count: int = 1, limit: int = SHOWN
) -> Iterator[str]:
    """Yields of each example a line with its number and tokens, and then its lines, indented."""
    for index in range(first, min(first + count, len(documents.lengths))):
        length = int(documents.lengths[index])
        ids, scored = documents.read(index, 0, length)
        targets = length if scored is None else int(scored.sum())
        yield f"example    {index}: {length:,} tokens, {targets:,} of them scored: {BEGIN}so{END}"
        yield from (f"           {line}" for line in marked(ids, scored, tokenizer, limit).split("\n"))


def _part(config: Config, name: str) -> tuple[DataConfig, bool]:
    """The DataConfig of that name with its tokenizer's folder, and whether it is what evaluates."""
    parts = data_parts(config)
    if name not in parts:
        raise UserError(f"--part {name} is not of this config: give one of {', '.join(parts)}")
    data = parts[name]
    data.tokenizer = _local(data.tokenizer or config.data.tokenizer or config.init_from)
    return data, data is config.eval.data


def _local(folder: str) -> str:
    """A folder with the tokenizer files of a model, from the hub where it has such a name."""
    if Path(folder).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?", folder, re.ASCII):
        return folder
    import huggingface_hub

    name, _, revision = folder.partition("@")
    files = ["*.json", "*.jinja", "tokenizer.model"]
    try:
        return huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=files)
    except Exception as error:  # of the network and of the hub, of many classes
        raise UserError(
            f"{folder} is neither a folder nor to be had from the hub ({type(error).__name__}): give --config.init_from"
            "=DIR or --config.data.tokenizer=DIR"
        ) from error


def show(config: Config, part: str = "data", first: int = 0, count: int = 3, limit: int = 0) -> Iterator[str]:
    """The lines of so many examples of a config's data, as its run trains on them. Raises UserError."""
    if config.continue_from:
        config = with_base_of(config, config.continue_from)
    config = with_held_out_eval(config)
    validate(config)
    data, held_out = _part(config, part)
    tokenizer = load_with_tokens(data.tokenizer, config.new_tokens)
    documents = open_documents(data, tokenizer, window=config.seq_len, held_out=held_out)
    if first >= (there := len(documents.lengths)):
        raise UserError(f"--first {first} is past the last of {there:,} examples: give less")
    yield from example_lines(documents, tokenizer, first, count, limit)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.data.show",
        description="Shows examples as a run trains on them, with what is scored marked. Fields of the config are "
        "overridden as for train.py: --config.data.path=FILE.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run: a Python file with get_config()")
    add("--part", default="data", metavar="NAME", help="data, eval.data or mixture[0] (default: %(default)s)")
    add("--first", type=number(int, 0), default=0, metavar="N", help="the first that is shown (default: 0)")
    add("--count", type=number(int, 1), default=3, metavar="N", help="how many are shown (default: %(default)s)")
    add("--limit", type=number(int, 0), default=0, metavar="N", help="characters of each (default: 0, all)")
    args, overrides = parser.parse_known_args(argv)
    errors.start_logging()
    logging.getLogger("absl").setLevel(logging.ERROR)
    config = read_config(args.config, overrides)
    for line in show(config, args.part, args.first, args.count, args.limit):
        print(line)


if __name__ == "__main__":
    errors.run(main)
