"""Weights in and out: Hugging Face folders, GGUF files, converted checkpoints, workdirs."""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence

from longlora_jax import errors
from longlora_jax.files import check_new

# checkpoint.py loads jax: each command imports what it needs, so that --help answers at once.


def from_hf(args: argparse.Namespace) -> None:
    """Hugging Face folder -> converted checkpoint, each weight in the dtype that it has."""
    from longlora_jax import checkpoint, hf

    config, params = hf.load_hf(args.hf_dir)
    dtype = hf.widest_dtype(params)
    checkpoint.save_model(args.out, config, params, dtype=dtype, tokenizer_from=args.hf_dir)


def to_hf(args: argparse.Namespace) -> None:
    """Anything that load_model reads -> Hugging Face folder, adapters merged."""
    from longlora_jax import checkpoint, hf

    model = checkpoint.load_model(args.model)
    hf.save_hf(
        args.hf_dir,
        model.config,
        model.merged(),
        dtype=args.dtype,
        tokenizer_from=model.tokenizer_dir,
    )


def from_gguf(args: argparse.Namespace) -> None:
    """GGUF file -> converted checkpoint, dequantized."""
    from longlora_jax import checkpoint, gguf

    config, params, files = gguf.load_gguf(args.file, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(content)
        checkpoint.save_model(args.out, config, params, dtype=args.dtype, tokenizer_from=folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: convert_weights.py to-hf runs/my_run my_model --dtype bfloat16",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, source, target, summary, **dtype) -> None:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument(source[0], metavar=source[0].upper(), help=source[1])
        sub.add_argument(target, metavar=target.upper(), help="folder to create; it must not exist yet")
        if dtype:
            sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], **dtype)
        sub.set_defaults(function=function, target=target)

    command(
        "from-hf",
        from_hf,
        ("hf_dir", "folder with config.json and safetensors, one file or sharded"),
        "out",
        "Hugging Face folder -> converted checkpoint. Not needed for training: "
        "train.py --config.init_from=HF_DIR reads the folder itself.",
    )
    command(
        "to-hf",
        to_hf,
        ("model", "converted checkpoint, or workdir of train.py (its newest checkpoint)"),
        "hf_dir",
        "converted checkpoint or training workdir -> Hugging Face folder, adapters merged into "
        "the weights, rope scaling and window written to config.json.",
        help="dtype of the written weights (default: the one that each weight has)",
    )
    command(
        "from-gguf",
        from_gguf,
        ("file", "GGUF file of llama.cpp's `llama` architecture"),
        "out",
        "GGUF file -> converted checkpoint with tokenizer, dequantized.",
        default="float32",
        help="dtype of the dequantized weights (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; argv without the program's name, None for the process's own."""
    args = _parser().parse_args(argv)
    target = getattr(args, args.target)
    check_new(target)
    started = time.perf_counter()
    args.function(args)
    print(f"wrote {target} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    errors.run(main)
