"""The command: opens a model and serves the page."""

import argparse
import importlib.util
import socket
import sys
import threading
from collections.abc import Sequence

from longlora_jax import errors
from longlora_jax.errors import UserError, number


def _parser() -> argparse.ArgumentParser:
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.chat",
        description="A page in the browser: load a long document, see how much of the model's window it takes, ask, "
        "watch the answer come. The document is read once, for all questions about it.",
        epilog="Example: python -m longlora_jax.chat --model runs/my_run --dtype bfloat16",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, converted checkpoint or training workdir")
    add("--step", metavar="N", help=errors.STEP_HELP)
    host_help = "where to listen: whoever reaches it can use the page (default: %(default)s, this machine alone)"
    add("--host", default="127.0.0.1", metavar="HOST", help=host_help)
    ports = number(int, 1, 65535, wanted="from 1 to 65535")
    add("--port", type=ports, default=7860, metavar="N", help="(default: %(default)s)")
    new_help = "tokens of an answer at most, unless the page says otherwise (default: %(default)s)"
    add("--max_new_tokens", type=number(int, 1, 4096), default=256, metavar="N", help=new_help)
    chunk_help = f"tokens of the document computed at once: {errors.CHUNK_HELP}"
    add("--chunk", type=number(int, 1, 2**20), metavar="N", help=chunk_help)
    dtype_help = "of weights, activations and cache (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    add("--quantize", choices=errors.QUANTIZE, default="none", help=errors.QUANTIZE_HELP)
    return parser


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            tried.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be had ({error.strerror}): choose others") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    errors.start_logging()
    args = _parser().parse_args(argv)
    _check_port(args.host, args.port)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the chat page needs gradio: pip install gradio pypdf")
    # What follows takes seconds to import: faults of the call are told before.
    from longlora_jax.chat.conversation import Reader
    from longlora_jax.data.tokenizer import load_tokenizer
    from longlora_jax.weights.load import open_model
    from longlora_jax.weights.workdir import at_step

    args.model = at_step(args.model, args.step)
    opened = open_model(args.model, quantize=args.quantize)
    tokenizer = load_tokenizer(opened.tokenizer_dir)
    from longlora_jax.chat import page

    reader = Reader(opened, tokenizer, args.dtype, chunk=args.chunk)
    built = page.build(reader, args.max_new_tokens)
    print(f"{page.serve(built, args.host, args.port)} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    finally:
        built.close(verbose=False)


if __name__ == "__main__":
    errors.run(main)
