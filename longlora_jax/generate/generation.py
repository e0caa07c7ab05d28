"""Text from a model: full attention over all it has read, or endless over a few first and last tokens.

`python -m longlora_jax.generate --model DIR --prompt_file book.txt --question "Who?"` (see --help).
"""

import argparse
import logging
import os
import re
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlora_jax import errors
from longlora_jax.config import MeshConfig, ModelConfig
from longlora_jax.data import Tokenizer, load_tokenizer, read_text
from longlora_jax.data.chat import has_chat_template, render_chat
from longlora_jax.data.stream import TextStream
from longlora_jax.errors import UserError
from longlora_jax.files import read_json, write_json
from longlora_jax.generate.session import SEEDS, Sampling, Session, complete
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.parallel.sharding import make_mesh, place_weights, weight_shardings
from longlora_jax.progress import progress_bar
from longlora_jax.weights.hf import GENERATION
from longlora_jax.weights.load import OpenModel, open_model

log = logging.getLogger(__name__)

MOST = 10**9  # of what can be counted on the command line: two of them are an int32


def generate(
    model: Llama,
    params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    stop: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    seed: int = 0,
    chunk: int = 512,
    sinks: int = 0,
    window: int = 0,
    on_token: Callable[[int, int], Any] = lambda row, token: None,
) -> list[list[int]]:
    """Continues prompts, ids [tokens] of any lengths, all at once; returns the new tokens of each.

    temperature 0 takes the likeliest token; otherwise top_k and top_p are transformers'. A row ends after one of
    eos_ids, when stop(row, its tokens) says so, or after max_new_tokens. chunk: tokens of the prompts computed at once.
    sinks, window: in tokens, to remember these alone (see cache.py). on_token(row, token) hears each token as it comes.
    The model's window is not checked. Raises UserError.
    """
    if len(prompts) < 1 or min(map(len, prompts)) < 1 or max_new_tokens < 1:
        raise UserError(f"{len(prompts)} prompts, {max_new_tokens=}: give prompts of a token or more, and 1 or more")
    longest = max(map(len, prompts))
    memory = {"chunk": min(chunk, longest), "sinks": sinks, "window": window}
    session = Session(model, params, len(prompts), longest + max_new_tokens, **memory)
    session.read(prompts)
    sampling = Sampling(temperature, top_k, top_p)
    how = {"sampling": sampling, "seed": seed, "eos_ids": eos_ids, "stop": stop, "on_token": on_token}
    return complete(session, max_new_tokens, **how)


class _Callable(types.ModuleType):
    """The library's name `longlora_jax.generate.generation` is this module as well as its function: it can be called."""

    def __call__(self, *args, **kwargs) -> list[list[int]]:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


def eos_ids(model: OpenModel) -> tuple[int, ...]:
    """The tokens that end an answer: all that generation_config.json names, or else config.json."""
    found = None
    for name in (GENERATION, "config.json"):
        file = os.path.join(model.tokenizer_dir, name)
        if found is None and os.path.isfile(file):
            found = read_json(file).get("eos_token_id")
    found = model.config.eos_token_id if found is None else found
    found = found if isinstance(found, list) else [found]
    return tuple(i for i in found if isinstance(i, int) and i >= 0)


def load_for_generation(model: OpenModel, dtype: str = "float32") -> tuple[Llama, Any]:
    """(model, params) on all devices, weights and activations in dtype: heads cut as far as they divide, then columns.

    Adapters are merged.
    """
    mesh, shardings = _best_mesh(model.config)
    llama = Llama(model.config, dtype=jnp.dtype(dtype), mesh=mesh)
    dtypes = jax.tree.map(lambda _: jnp.dtype(dtype), shardings)
    return llama, place_weights(model.config, model.table, shardings, dtypes)


def _best_mesh(config: ModelConfig):
    """(mesh, shardings) of the most devices, with the most of them over heads, that divide the model."""
    llama, count = Llama(config), jax.device_count()
    for used in (count, 1):
        for tensor in (n for n in range(used, 0, -1) if used % n == 0):
            mesh = make_mesh(MeshConfig(data=1, fsdp=used // tensor, context=1, tensor=tensor))
            try:
                return mesh, weight_shardings(mesh, logical_axes(llama), abstract_params(llama))
            except UserError:  # does not divide
                continue
    raise AssertionError("one device divides everything")


def prompt_ids(text: str, question: str | None, tokenizer: Tokenizer, tokenizer_dir: str) -> np.ndarray:
    """The ids [tokens] of a text, to be continued, or with a question about it, to be answered.

    A question goes through the tokenizer's chat template, if there is one, as what the user says after the text.
    """
    if question is None:
        return tokenizer.encode(text)
    asked = f"{text}\n\n{question}"
    if not has_chat_template(tokenizer_dir):
        return tokenizer.encode(f"{asked}\n")
    rendered = render_chat(tokenizer_dir, [{"role": "user", "content": asked}], add_generation_prompt=True)
    return tokenizer.encode_batch([rendered], add_bos=False)[0]


def common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """How many first tokens all prompts share, fewer than any of them has; 0 for a single one."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    differs = np.any([p[:most] != prompts[0][:most] for p in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else most


# The command


def _number(kind: type, least: float, most: float = MOST):
    def read(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least} and at most {most}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it: invalid whole number value
    return read


def _parser() -> argparse.ArgumentParser:
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.generate",
        description="Continues a text, or answers questions about one, and prints tokens as they come. Several "
        "questions share the text: it is read once.",
        epilog="Example: python -m longlora_jax.generate --model runs/my_run --prompt_file book.txt "
        '--question "Who is the narrator?" --question "Where does it end?" --json answers.json',
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, converted checkpoint or training workdir")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text")
    prompt.add_argument("--prompt_file", metavar="FILE", help="a UTF-8 file with the text")
    add(
        "--question",
        action="append",
        metavar="TEXT",
        help="asked after the text, by the tokenizer's chat template if it has one; may be given several times",
    )
    new_help = "tokens to write at most (default: %(default)s)"
    add("--max_new_tokens", type=_number(int, 1), default=256, metavar="N", help=new_help)
    add("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end before any of these texts")
    add("--json", metavar="FILE", help="where to write what was generated, and how fast")
    add = parser.add_argument_group("how tokens are drawn").add_argument
    temperature_help = "0 (default) takes the likeliest token, 1 draws as the model says, more is wilder"
    add("--temperature", type=_number(float, 0), default=0.0, metavar="T", help=temperature_help)
    add("--top_k", type=_number(int, 0), default=0, metavar="K", help="draw from the K likeliest (default: 0, all)")
    top_p_help = "draw from the likeliest that sum up to P (default: 1, all)"
    add("--top_p", type=_number(float, 0), default=1.0, metavar="P", help=top_p_help)
    add("--seed", type=_number(int, 0, SEEDS - 1), default=0, metavar="N", help="of the random numbers (default: 0)")
    add = parser.add_argument_group("how the model runs").add_argument
    chunk_help = "tokens of the prompt computed at once: speed and memory only (default: %(default)s)"
    add("--chunk", type=_number(int, 1), default=512, metavar="N", help=chunk_help)
    window_help = "remember only the last M tokens, and take a text of any length (default: remember all)"
    add("--window", type=_number(int, 1), default=0, metavar="M", help=window_help)
    sinks_help = "with --window: and the first N tokens (default: 4)"
    add("--sinks", type=_number(int, 0), metavar="N", help=sinks_help)
    dtype_help = "of weights, activations and cache (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    return parser


def _check(args: argparse.Namespace) -> str:
    """What can be known before a model is opened; returns the text."""
    Sampling(args.temperature, args.top_k, args.top_p).validate()
    if args.sinks is not None and not args.window:
        raise UserError("--sinks needs --window: say how many last tokens to remember beside the first")
    texts = {"--prompt": [args.prompt or ""], "--question": args.question or [], "--stop": args.stop}
    for name, given in texts.items():
        if re.search("[\ud800-\udfff]", "".join(given)):  # what Python makes of bytes that are none
            raise UserError(f"{name} is not UTF-8: write it again, or save a text as UTF-8 and give --prompt_file")
    if args.json:
        folder = Path(args.json).absolute().parent
        if Path(args.json).is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{args.json} cannot be written: give a file in a folder that you may write to")
    text = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    if not text.strip():
        raise UserError(f"{args.prompt_file or '--prompt'} is empty: give a text")
    return text


def _check_window(config: ModelConfig, tokens: int, args: argparse.Namespace) -> None:
    own = config.max_position_embeddings
    if args.window and args.sinks + args.window > own:
        raise UserError(
            f"--sinks {args.sinks} + --window {args.window} are more than the model's window of {own} tokens: "
            "choose fewer"
        )
    if not args.window and (needed := tokens + args.max_new_tokens) > own:
        raise UserError(
            f"{tokens} prompt tokens + --max_new_tokens {args.max_new_tokens} = {needed} are more than the model's "
            f"window of {own}: shorten one of them, or remember the last tokens alone (--window)"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("longlora_jax").setLevel(logging.INFO)
    args = _parser().parse_args(argv)
    text = _check(args)
    args.sinks = (4 if args.sinks is None else args.sinks) if args.window else 0
    opened = open_model(args.model)
    tokenizer = load_tokenizer(opened.tokenizer_dir)
    prompts = [prompt_ids(text, q, tokenizer, opened.tokenizer_dir) for q in args.question or [None]]
    longest = max(map(len, prompts))
    _check_window(opened.config, longest, args)
    if (largest := max(int(p.max()) for p in prompts)) >= opened.config.vocab_size:
        raise UserError(f"token {largest} is outside the model's vocabulary of {opened.config.vocab_size}")
    llama, params = load_for_generation(opened, args.dtype)
    memory = {"chunk": min(args.chunk, longest), "sinks": args.sinks, "window": args.window}
    session = Session(llama, params, 1, longest + args.max_new_tokens, **memory)
    shared = common_prefix(prompts)
    session.compile([shared, *(len(ids) - shared for ids in prompts)])
    seconds = _read(session, prompts[0][:shared]) if shared else 0.0
    session.mark()
    answers = []
    for number, ids in enumerate(prompts):
        session.rewind()
        asked = {"question": args.question[number]} if args.question else {}
        if len(prompts) > 1:
            print(f"> {args.question[number]}")
        answer = _answer(session, ids[shared:], tokenizer, eos_ids(opened), args)
        answers.append(asked | {"prompt_tokens": len(ids)} | answer)
    if args.json:
        head = {"model": args.model, "dtype": args.dtype, **memory, "shared_tokens": shared, "shared_seconds": seconds}
        first = answers[0] | {"prefill_seconds": seconds + answers[0]["prefill_seconds"]}
        write_json(args.json, first | head | {"answers": answers})


def _read(session: Session, ids: np.ndarray) -> float:
    """Reads ids; returns the seconds."""
    started = time.perf_counter()
    with progress_bar(len(ids), label="reading the prompt", unit="token") as bar:

        def told(tokens: int):
            session.wait()
            bar.update(tokens)

        session.read([ids], told)
    return time.perf_counter() - started


def _answer(
    session: Session, ids: np.ndarray, tokenizer: Tokenizer, ends: tuple[int, ...], args: argparse.Namespace
) -> dict[str, Any]:
    """Reads what is left of a prompt, prints the answer as it comes, and returns its part of the JSON."""
    seconds = _read(session, ids)
    text, times = TextStream(tokenizer, args.stop), []

    def on_token(_, token: int):
        times.append(time.perf_counter())
        if token not in ends:
            print(text.push(token), end="", flush=True)

    (tokens,) = complete(
        session,
        args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        seed=args.seed,
        eos_ids=ends,
        stop=lambda row, tokens: text.stopped,
        on_token=on_token,
    )
    print(text.finish())
    return {
        "tokens": tokens,
        "text": text.text,
        "finished_by": "stop" if text.stopped else "eos" if tokens[-1] in ends else "length",
        "prefill_seconds": seconds,
        "decode_tokens_per_second": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
    }


if __name__ == "__main__":
    errors.run(main)
