"""Weights in and out: Hugging Face folders, PEFT adapters, GGUF files, converted checkpoints, workdirs."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence

from longlora_jax import errors
from longlora_jax.attention.rope import ROPE_TYPES
from longlora_jax.files import check_new, read_json

# Some of these load jax: each command imports what it needs, so that --help answers at once.


def from_hf(args: argparse.Namespace) -> None:
    """Hugging Face folder -> converted checkpoint, each weight in the dtype that it has."""
    from longlora_jax.weights import converted, hf, hub

    folder = hub.local_folder(args.hf_dir)
    converted.write_converted(args.out, *hf.open_hf(folder), tokenizer_from=folder)


def to_hf(args: argparse.Namespace) -> None:
    """Anything that open_model opens -> Hugging Face folder, adapters merged."""
    from longlora_jax.weights import hf, load
    from longlora_jax.weights.base import merged_into
    from longlora_jax.weights.workdir import at_step

    model = load.open_model(at_step(args.model, args.step), args.dtype, check=True, base=args.base)
    hf.write_hf(args.hf_dir, model.config, model.table, tokenizer_from=model.tokenizer_dir, chat=model.chat_format())
    if said := merged_into(model.workdir, args.base):
        print(said)


def to_peft(args: argparse.Namespace) -> None:
    """Training workdir -> PEFT adapter, with embedding and norms where they were trained."""
    from longlora_jax.weights import converted, load, peft_export
    from longlora_jax.weights.workdir import at_step, workdir_format

    run, trained = load.open_adapters(at_step(args.workdir, args.step))
    chat = workdir_format(args.workdir)
    if not args.base and converted.is_converted(run.init_from):
        raise errors.UserError(
            f"{args.workdir} started from the converted checkpoint {run.init_from}, which PEFT cannot load: name the "
            "Hugging Face folder that it was made of with --base"
        )
    load.check_adapter_base(args.workdir, run, args.base)
    trained, base_rows = load.with_new_rows(args.workdir, run, trained, args.base)
    base, tokenizer = args.base or run.init_from, run.data.tokenizer or run.init_from
    if tokenizer == run.init_from and os.path.isdir(base):
        tokenizer = base
    if not os.path.isdir(tokenizer):
        print(f"warning: {tokenizer} is gone, so the adapter has no tokenizer: take that of {base}")
        tokenizer = None
    assert run.model is not None  # a run is saved resolved
    peft_export.save_peft(
        args.peft_dir,
        run.model,
        run.lora,
        trained,
        base=base,
        tokenizer_from=tokenizer,
        chat=chat,
        adapters_only=args.adapters_only,
        quantization=run.base_quantization,
        base_folder=run.init_from if os.path.isdir(run.init_from) else None,
        base_rows=base_rows,
    )


def from_peft(args: argparse.Namespace) -> None:
    """PEFT adapter and its base -> converted checkpoint, adapter merged."""
    from longlora_jax.data.chat import adapter_format
    from longlora_jax.weights import converted, hub, peft

    folder = hub.local_folder(args.peft_dir, what="a folder with adapter_config.json")
    config, table, tokenizer = peft.open_peft(folder, base=args.base, window=args.window, rope_type=args.rope_type)
    # Trainers write tokenizer and template beside an adapter, but no generation_config.json.
    base = args.base or read_json(os.path.join(folder, peft.SETTINGS)).get("base_model_name_or_path") or folder
    chat = adapter_format(tokenizer, hub.local_folder(base))
    converted.write_converted(args.out, config, table, tokenizer_from=tokenizer, chat=chat)


def from_gguf(args: argparse.Namespace) -> None:
    """GGUF file -> converted checkpoint, dequantized."""
    from longlora_jax.weights import converted, gguf

    config, table, files = gguf.open_gguf(args.file, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(content)
        converted.write_converted(args.out, config, table, tokenizer_from=folder)


def _parser() -> argparse.ArgumentParser:
    parser = errors.ArgumentParser(
        description=__doc__,
        epilog="Example: convert_weights.py to-hf runs/my_run my_model --dtype bfloat16",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Callable, source: tuple[str, str], target: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__.replace("_", "-"), help=summary, description=summary)
        sub.add_argument(source[0], metavar=source[0].upper(), help=source[1])
        sub.add_argument(target, metavar=target.upper(), help="folder to create; it must not exist yet")
        sub.set_defaults(function=function, target=target)
        return sub

    dtypes = {"choices": ["float32", "bfloat16", "float16"]}
    command(
        from_hf,
        ("hf_dir", "folder with config.json and safetensors or pytorch_model*.bin, or a name of the hub"),
        "out",
        "Hugging Face folder -> converted checkpoint; called again after a stop, it goes on. Not needed for training: "
        "train.py --config.init_from=HF_DIR reads the folder itself.",
    )
    export = command(
        to_hf,
        ("model", "converted checkpoint, or workdir of train.py (its newest checkpoint)"),
        "hf_dir",
        "converted checkpoint or training workdir -> Hugging Face folder, adapters merged into the weights, rope "
        "scaling and window written to config.json.",
    )
    export.add_argument(
        "--dtype", **dtypes, help="dtype of the written weights (default: the one that each has, in a run its base's)"
    )
    export.add_argument("--step", metavar="N", help=errors.STEP_HELP)
    export.add_argument("--base", metavar="DIR", help="where the base of the run lies by now, if it was moved")
    adapter_out = command(
        to_peft,
        ("workdir", "workdir of train.py (its newest checkpoint)"),
        "peft_dir",
        "training workdir -> PEFT adapter with the trained embedding and norms, and the config that it needs.",
    )
    adapter_out.add_argument("--step", metavar="N", help=errors.STEP_HELP)
    adapter_out.add_argument(
        "--base", help="what the adapter names as its base (default: the folder that the run started from)"
    )
    adapter_out.add_argument(
        "--adapters_only",
        action="store_true",
        help="leave out embedding and norms, which llama.cpp and vLLM do not read from an adapter; says what is lost",
    )
    adapter = command(
        from_peft,
        ("peft_dir", "folder with adapter_config.json (of PEFT, or of the original LongLoRA project), or a hub name"),
        "out",
        "PEFT adapter and its base -> converted checkpoint, adapter merged.",
    )
    adapter.add_argument("--base", help="folder or hub name of the base model (default: what the adapter names)")
    adapter.add_argument(
        "--window",
        type=int,
        help="tokens that the adapter was trained for, where its folder has no config.json of the extended model",
    )
    adapter.add_argument(
        "--rope_type", choices=ROPE_TYPES, default="linear", help="how --window was reached (default: %(default)s)"
    )
    command(
        from_gguf,
        ("file", "GGUF file of llama.cpp, of one of the families that are read (docs/weights.md)"),
        "out",
        "GGUF file -> converted checkpoint with tokenizer, dequantized.",
    ).add_argument(
        "--dtype", **dtypes, default="float32", help="dtype of the dequantized weights (default: %(default)s)"
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
