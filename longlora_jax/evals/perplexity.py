"""Perplexity of a model on whole documents, by context length: which tokens are scored, see scoring.py."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlora_jax import errors
from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import ModelConfig
from longlora_jax.data import Memmap, load_tokenizer, read_text
from longlora_jax.errors import UserError, number, numbers
from longlora_jax.evals.command import add_rope_flags, check_outputs, note_window, quantization_of, rope_override
from longlora_jax.evals.plots import plot_perplexity
from longlora_jax.evals.results import Results, digest, identity
from longlora_jax.evals.scoring import (
    LONGLORA_STRIDE,
    TOKENS_AT_ONCE,
    evaluate,
    evaluate_as_longlora,
    longlora_windows,
    on_device,
    plan_same_targets,
    plan_windows,
    stretch_rope,
)
from longlora_jax.weights.load import LoadedModel, open_model
from longlora_jax.weights.workdir import at_step


def _parser() -> argparse.ArgumentParser:
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.evals.perplexity",
        description="Perplexity of a model on texts, by context length: how well it predicts each token from those "
        "before it (lower is better), and whether more context helps it. Each file is one document; it is cut into "
        "windows of each length, and tokens are weighed equally over all files. Called again with the same --json it "
        "computes only lengths that are missing there.",
        epilog="Example: python -m longlora_jax.evals.perplexity --model runs/my_run --data novel.txt "
        "--seq_len 2048,8192 --stride 2048 --json ppl.json --plot ppl.png",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, converted checkpoint or training workdir")
    add("--step", metavar="N", help=errors.STEP_HELP)
    add("--data", required=True, nargs="+", metavar="FILE", help="UTF-8 texts or .bin files, one document each")
    add(
        "--bin_dtype",
        choices=("uint16", "uint32"),
        help="of the ids in .bin files, as PG19 and proof-pile are shipped by LongLoRA (default: by the vocabulary)",
    )
    add("--json", metavar="FILE", help="where to write the results, and where to find those of an earlier call")
    add("--plot", metavar="FILE.png", help="where to draw perplexity by length")
    add = parser.add_argument_group("which tokens").add_argument
    lengths_help = "window lengths in tokens: 2048,8192"
    add("--seq_len", required=True, type=numbers(int, 2), metavar="T[,T...]", help=lengths_help)
    add(
        "--stride",
        type=number(int, 1),
        metavar="N",
        help="a window starts every N tokens (default: T, no overlap). The first window of a file scores all its "
        "targets, each later one its last N: a smaller stride costs more and gives every token more context",
    )
    add(
        "--last",
        type=number(int, 1),
        metavar="K",
        help="compare lengths on the same targets: windows of every length end at the same tokens, and only the last K "
        "targets of each count. They end every --stride tokens then (at least K; default: the longest T)",
    )
    offset_help = "tokens to skip at the start of each file (default: 0)"
    add("--offset", type=number(int, 0), default=0, metavar="N", help=offset_help)
    limit_help = "stop after N windows of each length (default: all)"
    add("--max_windows", type=number(int, 1), metavar="N", help=limit_help)
    add(
        "--protocol",
        choices=("longlora",),
        help=f"longlora: as LongLoRA's eval.py computes it, one file: a window every {LONGLORA_STRIDE} tokens, each "
        "scores all its targets (default: the rule of --stride)",
    )
    protocol_help = "with --protocol: windows that its mean takes together, its --batch_size (default: 1)"
    add("--protocol_batch", type=number(int, 1), metavar="N", help=protocol_help)
    add = parser.add_argument_group("how the model runs").add_argument
    add("--attention", choices=("full", "s2"), default="full", help="full (default), or the pattern of training")
    ratio_help = "group size of s2 as a share of T (default: 0.25)"
    add("--group_ratio", type=number(float, 0, above=True), default=0.25, metavar="R", help=ratio_help)
    add_rope_flags(add, "T")
    dtype_help = "of weights and activations (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    add("--quantize", choices=errors.QUANTIZE, default="none", help=errors.QUANTIZE_HELP)
    rows_help = f"windows computed at once: speed and memory only (default: {TOKENS_AT_ONCE} tokens' worth)"
    add("--batch_size", type=number(int, 1), metavar="N", help=rows_help)
    return parser


def _check(args: argparse.Namespace) -> None:
    """What can be known before the model is loaded."""
    if args.last and args.last >= min(args.seq_len):
        raise UserError(
            f"--last {args.last} of windows of {min(args.seq_len)} tokens, which have one target less: use at most "
            f"{min(args.seq_len) - 1}, or leave out the shortest --seq_len"
        )
    if args.last and args.stride and args.stride < args.last:
        raise UserError(f"--stride {args.stride} is below --last {args.last}: targets would be scored twice, use more")
    if args.stride and not args.last and args.stride > min(args.seq_len):
        raise UserError(
            f"--stride {args.stride} is longer than --seq_len {min(args.seq_len)}: it would leave tokens out, use "
            "at most seq_len"
        )
    if args.protocol and (args.stride or args.last or args.offset or len(args.data) > 1):
        raise UserError(
            "--protocol longlora has its own windows in one file: leave out --stride, --last, --offset, more files"
        )
    if args.protocol_batch and not args.protocol:
        raise UserError("--protocol_batch needs --protocol: the mean is over tokens without it")
    rope_override(args)
    if args.group_ratio > 1 or (args.attention == "s2" and round(min(args.seq_len) * args.group_ratio) < 2):
        raise UserError(f"--group_ratio {args.group_ratio:g} must give groups of 2 to {min(args.seq_len)} tokens")
    check_outputs(args.json, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    errors.start_logging()
    args = _parser().parse_args(argv)
    _check(args)
    texts = {path: read_text(path) for path in args.data if not path.endswith(".bin")}
    args.model = at_step(args.model, args.step)
    opened = open_model(args.model, args.dtype, quantize=args.quantize)
    tokenizer = load_tokenizer(opened.tokenizer_dir) if texts else None
    documents = [
        tokenizer.encode(texts[path]) if tokenizer and path in texts else _read_bin(path, args.bin_dtype, opened.config)
        for path in args.data
    ]
    sizes = [len(d) for d in documents]
    override = rope_override(args)
    head = {"model": args.model, **identity(opened), "data": args.data, "data_tokens": sizes}
    head |= {"data_digests": [digest(np.ascontiguousarray(ids, "<i4").data) for ids in documents]}
    head |= {"attention": args.attention, "dtype": args.dtype, "rope_override": override}
    head |= {"quantize": quantization_of(args)}
    if args.attention == "s2":
        head |= {"group_ratio": args.group_ratio}
    head |= {"offset": args.offset, "max_windows": args.max_windows, "given_stride": args.stride}
    head |= {"last": args.last, "longest": max(args.seq_len) if args.last else None}  # the ends hang on the longest
    head |= {"protocol": args.protocol}
    if args.protocol:
        head |= {"protocol_batch": args.protocol_batch or 1}
    results = Results(args.json, head, ["seq_len"])
    for seq_len in args.seq_len:  # a length that fits nothing is told before hours are spent on the others
        if args.protocol:
            longlora_windows(sizes[0], seq_len)
        elif args.last:
            same = {"last": args.last, "longest": max(args.seq_len), "stride": args.stride}
            plan_same_targets(sizes, seq_len, **same, offset=args.offset)
        else:
            plan_windows(sizes, seq_len, stride=args.stride or seq_len, offset=args.offset)
    note_window(args.seq_len, opened.config)
    model = on_device(opened, args.dtype)
    for seq_len in args.seq_len:
        if not results.find(seq_len=seq_len):
            results.add(_evaluate(model, documents, seq_len, args))
    _print(results.rows, args)
    if args.plot:
        curves = {"all targets": [(r["seq_len"], r["perplexity"]) for r in results.rows]}
        if not args.protocol:
            curves["last quarter"] = [(r["seq_len"], r["last_quarter"]["perplexity"]) for r in results.rows]
        how = f"{args.attention} attention" + (f", untrained {args.rope_type}" if override else "")
        own = model.config.max_position_embeddings
        plot_perplexity(curves, args.plot, title=f"{Path(args.model).resolve().name} ({how})", window=own)


def _read_bin(path: str, dtype: str | None, config: ModelConfig) -> np.ndarray:
    """The ids [tokens] of a file of raw ids."""
    file = Memmap(path, dtype, vocab_size=config.vocab_size)
    return file.read(0, 0, int(file.lengths[0]))[0]


def _evaluate(model: LoadedModel, documents: list[np.ndarray], seq_len: int, args: argparse.Namespace) -> dict:
    if args.rope_type:
        config = stretch_rope(model.config, seq_len, args.rope_type, args.rope_factor)
        model = dataclasses.replace(model, config=config)
    how = {
        "max_windows": args.max_windows,
        "pattern": FULL if args.attention == "full" else Pattern("s2", round(seq_len * args.group_ratio)),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
    }
    if args.protocol:
        return evaluate_as_longlora(model, documents[0], seq_len, protocol_batch=args.protocol_batch or 1, **how)
    if args.last:
        how |= {"last": args.last, "longest": max(args.seq_len)}
    return evaluate(model, documents, seq_len, stride=args.stride, offset=args.offset, **how)


def _print(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    rope = f", untrained {args.rope_type} rope" if args.rope_type else ""
    same = f", the last {args.last:,} targets of windows that end at the same tokens" if args.last else ""
    print(f"{args.model}: {args.attention} attention, {args.dtype}{rope}{same}")
    print("seq_len  windows      tokens  perplexity       nll  stderr  last quarter")
    for r in results:
        error = "-" if r["stderr"] is None else f"{r['stderr']:.4f}"
        last = f"{r['last_quarter']['perplexity']:.3f}" if "last_quarter" in r else "-"
        print(
            f"{r['seq_len']:>7} {r['windows']:>8} {r['tokens']:>11} {r['perplexity']:>11.3f} {r['nll']:>9.4f} "
            f"{error:>7} {last:>13}"
        )
        if r.get("skipped_documents"):
            print(f"        {r['skipped_documents']} document(s) skipped: shorter than this")


if __name__ == "__main__":
    errors.run(main)
