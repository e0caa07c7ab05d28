"""Perplexity of a model on whole documents, by context length.

For each length T, windows of T tokens start every `stride` tokens (T unless given) of every document, from
`offset`; what is left at the end is not scored. The first window of a document scores all its T - 1 targets, each
later one its last `stride`, so with a stride below T no target is scored twice; with stride = T every window
scores T - 1. Documents are never joined, and every token weighs the same, in whatever document.
"""

import argparse
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlora_jax import errors
from longlora_jax.checkpoint import LoadedModel, load_model
from longlora_jax.config import ModelConfig
from longlora_jax.data import load_tokenizer, read_text
from longlora_jax.errors import UserError
from longlora_jax.evals.plots import plot_perplexity
from longlora_jax.files import write_json
from longlora_jax.losses import token_nll
from longlora_jax.model import Llama, output_kernel
from longlora_jax.patterns import FULL, Pattern
from longlora_jax.progress import progress_bar
from longlora_jax.rope import ROPE_TYPES, extend_rope

BLOCK = 256  # neighbouring targets that standard_error takes for one observation
TOKENS_AT_ONCE = 8192  # rows of a forward pass times their length, unless batch_size says otherwise
log = logging.getLogger(__name__)


class Window(NamedTuple):
    """A window: its document, its first token there, and how many of its last targets are scored."""

    document: int
    start: int
    scored: int


def plan_windows(
    lengths: Sequence[int], seq_len: int, *, stride: int, offset: int = 0, max_windows: int | None = None
) -> list[Window]:
    """The windows of documents of these lengths in tokens, in order, by the rule at the top of this file.

    max_windows: keep the first so many, over all documents; None keeps all. Raises UserError if no document holds one.
    """
    if seq_len < 2 or not 1 <= stride <= seq_len or offset < 0 or (max_windows is not None and max_windows < 1):
        raise UserError(
            f"{seq_len=}, {stride=}, {offset=}, {max_windows=}: seq_len must be 2 or more, stride 1 to seq_len "
            "(a larger one would leave tokens out), offset 0 or more, max_windows 1 or more"
        )
    windows = []
    for document, length in enumerate(lengths):
        for start in range(offset, length - seq_len + 1, stride):
            windows.append(Window(document, start, seq_len - 1 if start == offset else min(stride, seq_len - 1)))
    if not windows:
        after = f" after an offset of {offset}" if offset else ""
        raise UserError(
            f"seq_len={seq_len} needs a document of {seq_len} tokens or more{after}, and the longest of "
            f"{len(lengths)} has {max(lengths, default=0)}: use a shorter seq_len or longer text"
        )
    return windows[:max_windows]


def on_device(model: LoadedModel, dtype: str) -> LoadedModel:
    """The model with adapters merged and every weight on the device in dtype; cheap where that is so already."""
    # Cast first: a merged kernel that is rounded to bfloat16 is not what was trained.
    model = dataclasses.replace(model, params=jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), model.params))
    return dataclasses.replace(model, params=model.merged(), lora=None)


def stretch_rope(config: ModelConfig, seq_len: int, rope_type: str, factor: float | None = None) -> ModelConfig:
    """The config of a model whose positions are stretched to seq_len tokens without training (rope.extend_rope)."""
    scaling = extend_rope(
        scaling=config.rope_scaling,
        max_position_embeddings=config.max_position_embeddings,
        seq_len=seq_len,
        rope_type=rope_type,
        factor=factor,
    )
    return dataclasses.replace(config, rope_scaling=scaling)


def evaluate(
    model: LoadedModel,
    documents: Sequence[np.ndarray],
    seq_len: int,
    *,
    stride: int | None = None,
    offset: int = 0,
    max_windows: int | None = None,
    pattern: Pattern = FULL,
    dtype: str = "float32",
    batch_size: int | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a model at one length, under the rule at the top of this file.

    documents: token ids [tokens] of each; dtype: of weights and activations (sums are float32 and wider);
    batch_size: rows of a forward pass (None: TOKENS_AT_ONCE tokens), which changes speed and memory only; label: of
    the progress bar on standard error, None for "T tokens". To evaluate one model at many lengths give it as
    on_device(model, dtype), or each call copies the weights again.
    Returns one object of "results" in the JSON of the command. Raises UserError.
    """
    stride = seq_len if stride is None else stride
    windows = plan_windows([len(d) for d in documents], seq_len, stride=stride, offset=offset, max_windows=max_windows)
    largest = max(int(d.max()) for d in documents if len(d))
    if largest >= model.config.vocab_size:
        raise UserError(
            f"token {largest} is outside the model's vocabulary of {model.config.vocab_size}: "
            "tokenize the text with the model's own tokenizer"
        )
    llama = Llama(model.config, pattern=pattern, dtype=jnp.dtype(dtype))
    params = on_device(model, dtype).params
    rows = min(batch_size or max(TOKENS_AT_ONCE // seq_len, 1), len(windows))
    nll = np.empty((len(windows), seq_len - 1), np.float32)
    with progress_bar(len(windows), label=label or f"{seq_len:,} tokens", unit="window") as bar:
        for first in range(0, len(windows), rows):
            batch = windows[first : first + rows]
            # The last batch repeats its last window, so that every batch has one shape and is compiled once.
            padded = batch + batch[-1:] * (rows - len(batch))
            tokens = np.stack([documents[w.document][w.start : w.start + seq_len] for w in padded])
            nll[first : first + len(batch)] = _target_nll(llama, params, tokens)[: len(batch)]
            bar.update(len(batch))
    scored = np.arange(seq_len - 1) >= seq_len - 1 - np.array([[w.scored] for w in windows])
    last_quarter = scored & (np.arange(1, seq_len) >= seq_len - math.ceil(seq_len / 4))
    if not np.isfinite(nll[scored]).all():
        raise UserError(
            f"the model's loss at {seq_len=} is not finite: try --dtype float32, or its weights are damaged"
        )
    rope = model.config.rope_scaling
    detail = [
        {"document": w.document, "start": w.start, **_mean(row[-w.scored :])}
        for w, row in zip(windows, nll, strict=True)
    ]
    return {
        "seq_len": seq_len,
        "stride": stride,
        "offset": offset,
        "windows": len(windows),
        "documents": len({w.document for w in windows}),
        "skipped_documents": sum(len(d) < offset + seq_len for d in documents),
        "group_size": pattern.group_size or None,
        "rope": rope and {name: value for name, value in dataclasses.asdict(rope).items() if value is not None},
        **_mean(nll[scored]),
        "stderr": standard_error(nll[scored]),
        "last_quarter": _mean(nll[last_quarter]),
        "windows_detail": detail,
    }


@functools.partial(jax.jit, static_argnums=0)
def _target_nll(llama: Llama, params, tokens):
    """nll [B, T - 1] of every token [B, T] but the first, given those before it."""
    hidden = llama.apply({"params": params}, tokens, method="hidden")
    hidden = hidden[:, :-1]  # pyright: ignore[reportCallIssue, reportArgumentType]  # nothing is mutable: an array
    return token_nll(hidden, output_kernel(params), tokens[:, 1:])


def _mean(nll: np.ndarray) -> dict[str, Any]:
    mean = float(nll.mean(dtype=np.float64))
    return {"tokens": nll.size, "nll": mean, "perplexity": math.exp(mean)}


def standard_error(nll: np.ndarray) -> float | None:
    """The standard error of the mean of nll [tokens], in nats; None of a single token.

    Neighbouring tokens are hard or easy together, so their plain variance promises too much. One observation is
    a block of BLOCK consecutive targets (smaller if there would be fewer than 16): the variance of a mean of
    clusters, Cochran, Sampling Techniques, 9A.
    """
    size = min(BLOCK, max(nll.size // 16, 1))
    excess = nll.astype(np.float64) - nll.mean(dtype=np.float64)
    blocks = np.add.reduceat(excess, np.arange(0, nll.size, size))
    if blocks.size < 2:
        return None
    return float(np.sqrt(blocks.size / (blocks.size - 1) * np.sum(blocks**2)) / nll.size)


# The command


def _number(kind: type, least: float, above: bool = False):
    def read(text: str):
        value = kind(text)
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {least}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it: invalid whole number value
    return read


def _lengths(text: str) -> list[int]:
    return [_number(int, 2)(part) for part in text.split(",")]


_lengths.__name__ = "list of whole numbers"


def _parser() -> argparse.ArgumentParser:
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.evals.perplexity",
        description="Perplexity of a model on text files, by context length: how well it predicts each token from "
        "those before it (lower is better), and whether more context helps it. Each file is one document; it is cut "
        "into windows of each length, and tokens are weighed equally over all files.",
        epilog="Example: python -m longlora_jax.evals.perplexity --model runs/my_run --data novel.txt "
        "--seq_len 2048,8192 --stride 2048 --json ppl.json --plot ppl.png",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, converted checkpoint or training workdir")
    add("--data", required=True, nargs="+", metavar="FILE", help="UTF-8 text files, one document each")
    add("--json", metavar="FILE", help="where to write the results")
    add("--plot", metavar="FILE.png", help="where to draw perplexity by length")
    add = parser.add_argument_group("which tokens").add_argument
    add("--seq_len", required=True, type=_lengths, metavar="T[,T...]", help="window lengths in tokens: 2048,8192")
    add(
        "--stride",
        type=_number(int, 1),
        metavar="N",
        help="a window starts every N tokens (default: T, no overlap). The first window of a file scores all its "
        "targets, each later one its last N: a smaller stride costs more and gives every token more context",
    )
    offset_help = "tokens to skip at the start of each file (default: 0)"
    add("--offset", type=_number(int, 0), default=0, metavar="N", help=offset_help)
    limit_help = "stop after N windows of each length (default: all)"
    add("--max_windows", type=_number(int, 1), metavar="N", help=limit_help)
    add = parser.add_argument_group("how the model runs").add_argument
    add("--attention", choices=("full", "s2"), default="full", help="full (default), or the pattern of training")
    ratio_help = "group size of s2 as a share of T (default: 0.25)"
    add("--group_ratio", type=_number(float, 0, above=True), default=0.25, metavar="R", help=ratio_help)
    add(
        "--rope_type",
        choices=[name for name in ROPE_TYPES if name != "longrope"],  # that one comes with trained factors
        help="stretch the model's positions for lengths beyond its window, untrained (default: as the model is)",
    )
    add(
        "--rope_factor",
        type=_number(float, 1),
        metavar="F",
        help="with --rope_type: times the model's original window (default: T / original, rounded up)",
    )
    dtype_help = "of weights and activations (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    rows_help = f"windows computed at once: speed and memory only (default: {TOKENS_AT_ONCE} tokens' worth)"
    add("--batch_size", type=_number(int, 1), metavar="N", help=rows_help)
    return parser


def _check(args: argparse.Namespace) -> None:
    """What can be known before the model is loaded."""
    if args.stride and args.stride > min(args.seq_len):
        raise UserError(
            f"--stride {args.stride} is longer than --seq_len {min(args.seq_len)}: it would leave tokens out, use "
            "at most seq_len"
        )
    if args.rope_factor and not args.rope_type:
        raise UserError("--rope_factor needs --rope_type: say which scaling")
    if args.group_ratio > 1 or (args.attention == "s2" and round(min(args.seq_len) * args.group_ratio) < 2):
        raise UserError(f"--group_ratio {args.group_ratio:g} must give groups of 2 to {min(args.seq_len)} tokens")
    for path in filter(None, (args.json, args.plot)):
        folder = Path(path).absolute().parent
        if Path(path).is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{path} cannot be written: give a file in an existing folder that you may write to")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {args.plot} must end in .png, .svg or .pdf")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("longlora_jax").setLevel(logging.INFO)
    args = _parser().parse_args(argv)
    _check(args)
    texts = [read_text(path) for path in args.data]
    model = load_model(args.model)
    tokenizer = load_tokenizer(model.tokenizer_dir)
    documents = [tokenizer.encode(text) for text in texts]
    windows = {"offset": args.offset, "max_windows": args.max_windows}
    for seq_len in args.seq_len:  # a length that fits nothing is told before hours are spent on the others
        plan_windows([len(d) for d in documents], seq_len, stride=args.stride or seq_len, **windows)
    own = model.config.max_position_embeddings
    if beyond := [f"{seq_len:,}" for seq_len in args.seq_len if seq_len > own]:
        log.info("%s tokens are more than the model's own window of %s", ", ".join(beyond), f"{own:,}")
    model = on_device(model, args.dtype)
    results = []
    for seq_len in args.seq_len:
        config = model.config
        if args.rope_type:
            config = stretch_rope(config, seq_len, args.rope_type, args.rope_factor)
        result = evaluate(
            dataclasses.replace(model, config=config),
            documents,
            seq_len,
            stride=args.stride,
            pattern=FULL if args.attention == "full" else Pattern("s2", round(seq_len * args.group_ratio)),
            dtype=args.dtype,
            batch_size=args.batch_size,
            **windows,
        )
        results.append(result)
    override = {"rope_type": args.rope_type, "rope_factor": args.rope_factor} if args.rope_type else None
    _print(results, args)
    if args.json:
        head = {"model": args.model, "data": args.data, "attention": args.attention, "dtype": args.dtype}
        write_json(args.json, head | {"rope_override": override, "results": results})
    if args.plot:
        curves = {"all targets": [(r["seq_len"], r["perplexity"]) for r in results]}
        curves["last quarter"] = [(r["seq_len"], r["last_quarter"]["perplexity"]) for r in results]
        how = f"{args.attention} attention" + (f", untrained {args.rope_type}" if override else "")
        plot_perplexity(curves, args.plot, title=f"{Path(args.model).resolve().name} ({how})", window=own)


def _print(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    rope = f", untrained {args.rope_type} rope" if args.rope_type else ""
    print(f"{args.model}: {args.attention} attention, {args.dtype}{rope}")
    print("seq_len  windows      tokens  perplexity       nll  stderr  last quarter")
    for r in results:
        error = "-" if r["stderr"] is None else f"{r['stderr']:.4f}"
        print(
            f"{r['seq_len']:>7} {r['windows']:>8} {r['tokens']:>11} {r['perplexity']:>11.3f} {r['nll']:>9.4f} "
            f"{error:>7} {r['last_quarter']['perplexity']:>13.3f}"
        )
        if r["skipped_documents"]:
            print(f"        {r['skipped_documents']} document(s) skipped: shorter than this")


if __name__ == "__main__":
    errors.run(main)
