"""Continues a text, or answers questions about one: python -m longlora_jax.generate --model DIR --prompt_file FILE."""

import argparse
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from longlora_jax import errors
from longlora_jax.config import ModelConfig
from longlora_jax.data import Tokenizer, load_tokenizer, read_text
from longlora_jax.data.chat import ChatFormat, ends_with_any, stop_ids
from longlora_jax.data.stream import TextStream
from longlora_jax.errors import UserError, number
from longlora_jax.files import check_writable, write_json
from longlora_jax.generate.generation import common_prefix, load_for_generation, prompt_ids
from longlora_jax.generate.session import SEEDS, Sampling, Session, chunk_size, complete
from longlora_jax.progress import progress_bar
from longlora_jax.weights.load import open_model
from longlora_jax.weights.workdir import at_step

MOST = 10**9  # of what can be counted on the command line: two of them are an int32


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
    add("--step", metavar="N", help=errors.STEP_HELP)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text")
    prompt.add_argument("--prompt_file", metavar="FILE", help="a UTF-8 file with the text")
    add(
        "--question",
        action="append",
        metavar="TEXT",
        help="asked after the text, or without one, as the model was trained to be asked (its chat template); may be "
        "given several times",
    )
    add("--system", default="", metavar="TEXT", help="a system message, said before the text and the question")
    new_help = "tokens to write at most (default: %(default)s)"
    add("--max_new_tokens", type=number(int, 1, MOST), default=256, metavar="N", help=new_help)
    add("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end before any of these texts")
    add("--json", metavar="FILE", help="where to write what was generated, and how fast")
    add = parser.add_argument_group("how tokens are drawn").add_argument
    temperature_help = "0 (default) takes the likeliest token, 1 draws as the model says, more is wilder"
    add("--temperature", type=number(float, 0, MOST), default=0.0, metavar="T", help=temperature_help)
    add(
        "--top_k", type=number(int, 0, MOST), default=0, metavar="K", help="draw from the K likeliest (default: 0, all)"
    )
    top_p_help = "draw from the likeliest that sum up to P (default: 1, all)"
    add("--top_p", type=number(float, 0, MOST), default=1.0, metavar="P", help=top_p_help)
    seeds = number(int, 0, SEEDS - 1, wanted=f"at least 0 and at most {SEEDS - 1}")
    add("--seed", type=seeds, default=0, metavar="N", help="of the random numbers (default: 0)")
    add = parser.add_argument_group("how the model runs").add_argument
    chunk_help = f"tokens of the prompt computed at once: {errors.CHUNK_HELP}"
    add("--chunk", type=number(int, 1, MOST), metavar="N", help=chunk_help)
    window_help = "remember only the last M tokens, and take a text of any length (default: remember all)"
    add("--window", type=number(int, 1, MOST), default=0, metavar="M", help=window_help)
    sinks_help = "with --window: and the first N tokens (default: 4)"
    add("--sinks", type=number(int, 0, MOST), metavar="N", help=sinks_help)
    dtype_help = "of weights, activations and cache (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    add("--quantize", choices=errors.QUANTIZE, default="none", help=errors.QUANTIZE_HELP)
    return parser


def _check(args: argparse.Namespace) -> str:
    """What can be known before a model is opened; returns the text."""
    Sampling(args.temperature, args.top_k, args.top_p).validate()
    if args.sinks is not None and not args.window:
        raise UserError("--sinks needs --window: say how many last tokens to remember beside the first")
    texts = {
        "--prompt": [args.prompt or ""],
        "--question": args.question or [],
        "--stop": args.stop,
        "--system": [args.system],
    }
    for name, given in texts.items():
        if re.search("[\ud800-\udfff]", "".join(given)):  # what Python makes of bytes that are none
            raise UserError(f"{name} is not UTF-8: write it again, or save a text as UTF-8 and give --prompt_file")
    if args.json:
        check_writable(args.json)
    if args.system and not args.question:
        raise UserError("--system is said before a question: give --question")
    if args.prompt_file is not None:
        text = read_text(args.prompt_file)
    elif args.prompt is not None:
        text = args.prompt
    elif args.question:
        return ""
    else:
        raise UserError("there is nothing to go on with: give --prompt, --prompt_file or --question (see --help)")
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
    errors.start_logging()
    args = _parser().parse_args(argv)
    text = _check(args)
    args.sinks = (4 if args.sinks is None else args.sinks) if args.window else 0
    args.model = at_step(args.model, args.step)
    opened = open_model(args.model, quantize=args.quantize)
    tokenizer = load_tokenizer(opened.tokenizer_dir)
    chat = opened.chat_format()
    prompts = [prompt_ids(text, q, tokenizer, chat, args.system) for q in args.question or [None]]
    longest = max(map(len, prompts))
    _check_window(opened.config, longest, args)
    if (largest := max(int(p.max()) for p in prompts)) >= opened.config.vocab_size:
        raise UserError(f"token {largest} is outside the model's vocabulary of {opened.config.vocab_size}")
    llama, params = load_for_generation(opened, args.dtype)
    memory = {"chunk": min(chunk_size(args.chunk), longest), "sinks": args.sinks, "window": args.window}
    session = Session(llama, params, 1, longest + args.max_new_tokens, **memory)
    shared = common_prefix(prompts)
    session.compile([shared, *(len(ids) - shared for ids in prompts)])
    seconds = _read(session, prompts[0][:shared]) if shared else 0.0
    session.mark()
    answers = []
    for i, ids in enumerate(prompts):
        session.rewind()
        asked = {"question": args.question[i]} if args.question else {}
        if len(prompts) > 1:
            print(f"> {args.question[i]}")
        answer = _answer(session, ids[shared:], tokenizer, chat, args)
        answers.append(asked | {"prompt_tokens": len(ids)} | answer)
    if args.json:
        head = {"model": args.model, "dtype": args.dtype, "quantize": args.quantize, **memory}
        head |= {"shared_tokens": shared, "shared_seconds": seconds}
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
    session: Session, ids: np.ndarray, tokenizer: Tokenizer, chat: ChatFormat, args: argparse.Namespace
) -> dict[str, Any]:
    """Reads what is left of a prompt, prints the answer as it comes, and returns its part of the JSON."""
    seconds = _read(session, ids)
    text, times = TextStream(tokenizer, [*args.stop, *chat.stops]), []
    stops = stop_ids(args.stop, tokenizer)

    def on_token(_, token: int):
        times.append(time.perf_counter())
        if token not in chat.end_ids:
            print(text.push(token), end="", flush=True)

    (tokens,) = complete(
        session,
        args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        seed=args.seed,
        eos_ids=chat.end_ids,
        stop=lambda row, tokens: text.stopped or ends_with_any(tokens, stops),
        on_token=on_token,
    )
    print(text.finish())
    stopped = text.stopped or ends_with_any(tokens, stops)
    return {
        "tokens": tokens,
        "text": text.text,
        "finished_by": "stop" if stopped else "eos" if tokens[-1] in chat.end_ids else "length",
        "prefill_seconds": seconds,
        "decode_tokens_per_second": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
    }


if __name__ == "__main__":
    errors.run(main)
