"""Needle in a haystack: a sentence hidden between the sentences of a natural text, and a question about it.

The score of an answer is the share of the fact's words that it has; it is right when it has them all.
"""

from collections.abc import Sequence

import numpy as np

from longlora_jax import errors
from longlora_jax.evals.answers import words
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

TASK = "Read the text below and answer the question that follows it. The answer is in the text."
NAMES = ("Ottilie", "Barnaby", "Yasmin", "Leopold", "Henrike", "Matteo", "Sunniva", "Cornelius")
THINGS = ("silver compass", "blue violin", "wooden telescope", "glass chess set", "brass lantern", "red accordion")
PLACES = (
    *("in the cellar of the old bakery", "behind the clock of the town hall", "under the third step of the lighthouse"),
    *("in a hollow oak beside the mill", "above the door of the fish market", "in the organ loft of the small chapel"),
)


def prompt(reader: Reader, haystack: str, length: int, depth: float, fact: str, question: str) -> np.ndarray:
    """The ids [length] of a prompt that hides the fact; a few less where no cut of the haystack gives so many.

    Raises UserError for a length that cannot be.
    """

    def render(characters: int) -> np.ndarray:
        before, after = split_at_sentence(haystack[:characters], depth)
        text = " ".join(part for part in (before.rstrip(), fact, after) if part)
        return reader.ids(f"{TASK}\n\n{text}\n\n{question}", "" if reader.chat else "\nAnswer:")

    return fit(render, length, len(haystack))


def judge(answer: str, expected: str) -> float:
    """The share of the expected words that are in the answer's first line, whatever their order."""
    wanted = set(words(expected))
    return len(wanted & set(words(answer.strip().partition("\n")[0]))) / len(wanted)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    parser = grid_parser(
        "needle",
        "Needle in a haystack: hides a sentence in a natural text and asks about it, over a grid of lengths and "
        "depths. The score is the share of the sentence's words in the answer.",
        "--haystack novel.txt --lengths 1024,4096 --json needle.json --plot needle.png",
    )
    add_depths(parser)
    parser.add_argument("--haystack", required=True, metavar="FILE", help="a UTF-8 text to hide it in")
    args = parser.parse_args(argv)
    haystack, settings = read_haystack(args.haystack)

    def ask(reader: Reader, length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        name, thing, place = (str(rng.choice(some)) for some in (NAMES, THINGS, PLACES))
        fact, question = f"{name} keeps the {thing} {place}.", f"Where does {name} keep the {thing}?"
        return prompt(reader, begun_anywhere(haystack, rng), length, depth, fact, question), place

    def stop(text: str) -> bool:
        return "\n" in text.lstrip()

    run_grid(Task("needle", ask, judge, stop, 48, settings, graded=True), args, args.depths)


if __name__ == "__main__":
    errors.run(main)
