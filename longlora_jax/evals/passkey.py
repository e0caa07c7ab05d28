"""Passkey retrieval: a number hidden in a long text, asked for at the end.

The words are those of LongLoRA's passkey_retrivial.py, which has them from Landmark Attention (arXiv:2305.16300): five
parts on lines of their own, of which the second and the fourth are the same five sentences over and over, each from its
beginning; key from 1 to 50,000. Different here: prompts have exactly so many tokens, depths are chosen, a haystack may
be a natural text, and the number that the answer begins with must be the key, whole (there its first tokens only).
"""

import re
from collections.abc import Sequence

import numpy as np

from longlora_jax import errors
from longlora_jax.evals.reader import Reader, fit
from longlora_jax.evals.retrieval import (
    Task,
    add_depths,
    begun_anywhere,
    grid_parser,
    read_haystack,
    run_grid,
    split_at_sentence,
)

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FACT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
LEAD = " The pass key is"
LARGEST = 50_000


def prompt(reader: Reader, length: int, depth: float, key: int, haystack: str | None = None) -> np.ndarray:
    """The ids [length] of a prompt that hides the key; a few less where no cut of the filling gives so many.

    haystack: a natural text to hide it in, between sentences. Raises UserError for a length that cannot be.
    """

    def render(characters: int) -> np.ndarray:
        if haystack is None:
            before = round(depth * characters)
            parts = [(GARBAGE * (n // len(GARBAGE) + 1))[:n] for n in (before, characters - before)]
        else:
            parts = list(split_at_sentence(haystack[:characters], depth))
        lines = [TASK, parts[0], FACT.format(key=key), parts[1], QUESTION]
        return reader.ids("\n".join(lines), LEAD)

    return fit(render, length, 40 * length if haystack is None else len(haystack))


def judge(answer: str, key: str) -> float:
    """1 if the first number of an answer is the key."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == key)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    parser = grid_parser(
        "passkey",
        "Passkey retrieval: hides a number in a long text and asks for it, over a grid of lengths and depths. Words "
        "and text are those of LongLoRA's test.",
        "--lengths 1024,4096 --json passkey.json --plot passkey.png",
    )
    add_depths(parser)
    parser.add_argument("--haystack", metavar="FILE", help="a UTF-8 text to hide it in (default: LongLoRA's filling)")
    args = parser.parse_args(argv)
    haystack, settings = read_haystack(args.haystack) if args.haystack else (None, {"haystack": None})

    def ask(reader: Reader, length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        key = int(rng.integers(1, LARGEST, endpoint=True))
        return prompt(reader, length, depth, key, haystack and begun_anywhere(haystack, rng)), str(key)

    def stop(text: str) -> bool:
        return re.search(r"\d\D", text) is not None

    run_grid(Task("passkey", ask, judge, stop, 16, settings), args, args.depths)


if __name__ == "__main__":
    errors.run(main)
