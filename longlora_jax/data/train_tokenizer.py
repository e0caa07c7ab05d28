"""Trains a small byte-level BPE tokenizer on a corpus: that of the shipped tiny model.

python -m longlora_jax.data.train_tokenizer --source python --vocab_size 4096 --out DIR
"""

import argparse
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from longlora_jax import errors
from longlora_jax.data.formats import Reading
from longlora_jax.data.source import HELD_OUT, SOURCES, read_documents
from longlora_jax.errors import UserError
from longlora_jax.files import write_json, write_text

FILES = ("tokenizer.json", "tokenizer_config.json")
END_OF_TEXT = "<|endoftext|>"  # id 0: begin, end and padding

# What one merge may not cross, first match wins.
PATTERN = "|".join(
    (
        r"[ \t]*[\r\n]+[ \t]*",  # line ends with the indentation of the line that follows
        r" ?__\p{L}+__",  # __init__ and its kind
        r" ?_*\p{L}+",  # a word, or one piece of a snake_case name
        r"\p{N}",  # single digits
        r" ?[^\s\p{L}\p{N}_]+",  # operators and punctuation
        r"_+",
        r"\s+(?!\S)",  # blanks, but the last one belongs to the word that follows
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of vocab_size pieces for Python sources.

    The same texts in the same order give the same tokenizer. It adds no special tokens itself.
    Raises UserError if vocab_size is under 257, or more than the texts have pieces to learn.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size} is under 257: 256 bytes and {END_OF_TEXT}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"the corpus has only {tokenizer.get_vocab_size()} pieces to learn, "
            f"not vocab_size={vocab_size}: lower it or give more text."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str, *, model_max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "pad")},
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name a folder.") from error
    write_text(os.path.join(folder, FILES[0]), tokenizer.to_str(pretty=False) + "\n")
    write_json(os.path.join(folder, FILES[1]), config)


def main() -> None:
    """Trains on the corpus that the command line names and writes both tokenizer files."""
    parser = argparse.ArgumentParser(
        prog="python -m longlora_jax.data.train_tokenizer",
        description="Train a byte-level BPE tokenizer for Python sources and write it as "
        "tokenizer.json and tokenizer_config.json.",
    )
    parser.add_argument("--source", choices=SOURCES, default="python", help="kind of corpus")
    parser.add_argument(
        "--path",
        default="",
        help="folder, glob or dataset; by default the running interpreter's standard library",
    )
    parser.add_argument("--text_key", default="text", help="where the text is in a row (default text)")
    parser.add_argument(
        "--on_bad_row", choices=("stop", "skip"), default="stop", help="a row without text (default stop)"
    )
    parser.add_argument("--vocab_size", type=int, default=4096, help="pieces (default 4096)")
    parser.add_argument("--model_max_length", type=int, default=256, help="window of its model (default 256)")
    parser.add_argument(
        "--hold_out",
        nargs="*",
        default=None,
        help=f"files never read, with their tests (default for python: {' '.join(HELD_OUT)})",
    )
    parser.add_argument("--out", required=True, help="folder to write to, without a tokenizer so far")
    args = parser.parse_args()
    if there := [name for name in FILES if os.path.lexists(os.path.join(args.out, name))]:
        raise UserError(f"{args.out} has a {there[0]} already: remove it or give another folder")
    logging.basicConfig(level=logging.WARNING)
    hold_out = args.hold_out
    if hold_out is None:
        hold_out = HELD_OUT if args.source == "python" else ()
    reading, held = Reading(args.on_bad_row), tuple(hold_out)
    documents = read_documents(args.source, args.path, hold_out=held, text_key=args.text_key, reading=reading)
    tokenizer = train_tokenizer((document.text for document in documents), args.vocab_size)
    save_tokenizer(tokenizer, args.out, model_max_length=args.model_max_length)
    print(f"{args.out}: {tokenizer.get_vocab_size()} pieces")


if __name__ == "__main__":
    errors.run(main)
