"""Topic retrieval: a long conversation that goes from topic to topic, and the question which one was the first.

As in LongChat's test (lmsys.org/blog/2023-06-29-longchat), with other topics and words: all that is said is made of a
few sentences around the topic, so an answer can be judged by a program. It is right when it names the first topic.
"""

from collections.abc import Sequence

import numpy as np

from longlora_jax import errors
from longlora_jax.evals.answers import words
from longlora_jax.evals.reader import Reader, fit
from longlora_jax.evals.retrieval import Task, grid_parser, run_grid

TASK = (
    "Below is the record of a long talk between a user and an assistant. They go from topic to topic; each begins with "
    "the words 'Let us talk about' and its name. After the record comes a question about it."
)
QUESTION = "The record ends here. What is the very first topic that the user and the assistant talked about?"
LEAD = " The very first topic was"
ASPECTS = ("history", "craft", "future", "economics", "physics", "etiquette", "folklore", "teaching")
SUBJECTS = (
    *(
        "stone bridges",
        "beekeeping",
        "sailing ships",
        "lace making",
        "chess openings",
        "coral reefs",
        "sourdough bread",
    ),
    *("mountain railways", "paper folding", "volcanoes", "opera houses", "pottery", "lighthouses", "bird migration"),
    *("tea ceremonies", "sundials", "comic books", "glaciers", "puppet theatre", "marathon running", "typewriters"),
    *("mushroom hunting", "solar eclipses", "carpets", "canals", "perfume", "windmills", "crossword puzzles"),
    *("desert plants", "street markets", "tree houses", "violins"),
)
ASKED = (
    "What should a beginner know about {topic}?",
    "Why do so many people care about {topic}?",
    "What do most people get wrong about {topic}?",
    "How did you learn about {topic}?",
    "Which book on {topic} would you give to a friend?",
    "Is there anything in {topic} that still surprises experts?",
)
ANSWERED = (
    "A good start is to look closely and to take notes; patience matters more than talent here.",
    "It joins practical skill and quiet pleasure, and there is always something left to find out.",
    "Many believe that it is only for specialists, but an hour a week is enough to get somewhere.",
    "Mostly by asking those who have done it for years, and by making every mistake at least once.",
    "The older ones are often the better ones: they explain the reasons and not only the rules.",
    "Certainly. Whenever somebody measures it with care, one of the old certainties turns out to be wrong.",
)
TURNS = 10  # of a topic: about 450 tokens


def conversation(turns: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """(turns, topics) of a conversation: each turn is what the user and the assistant say, TURNS of them a topic."""
    subjects, first = rng.permutation(len(SUBJECTS)), int(rng.integers(len(ASPECTS)))
    topics = [
        # Each subject comes once before one comes again, and then with another aspect.
        f"the {ASPECTS[(first + n + n // len(SUBJECTS)) % len(ASPECTS)]} of {SUBJECTS[subjects[n % len(SUBJECTS)]]}"
        for n in range(-(-turns // TURNS))
    ]
    said = []
    for turn in range(turns):
        topic = topics[turn // TURNS]
        opening = f"Let us talk about {topic}. " if turn % TURNS == 0 else ""
        asked = ASKED[int(rng.integers(len(ASKED)))].format(topic=topic)
        said.append(f"USER: {opening}{asked}\nASSISTANT: {ANSWERED[int(rng.integers(len(ANSWERED)))]}")
    return said, topics


def prompt(reader: Reader, length: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """(ids, first topic) of a conversation of at most `length` tokens, as many whole turns as there is room for."""
    most = min(length // 20, TURNS * len(SUBJECTS) * len(ASPECTS))  # no turn is as short as 20 tokens
    said, topics = conversation(max(most, 1), rng)

    def render(turns: int) -> np.ndarray:
        return reader.ids("\n".join([TASK, "", *said[: turns + 1], "", QUESTION]), LEAD)

    return fit(render, length, most - 1), topics[0]


def judge(answer: str, topic: str) -> float:
    """1 if the words of the topic are in the answer, one after the other."""
    return float(f" {' '.join(words(topic))} " in f" {' '.join(words(answer))} ")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    parser = grid_parser(
        "topics",
        "Topic retrieval: asks for the first topic of a long conversation that goes from topic to topic.",
        "--lengths 1024,4096 --json topics.json --plot topics.png",
    )
    args = parser.parse_args(argv)

    def ask(reader: Reader, length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        return prompt(reader, length, rng)

    def stop(text: str) -> bool:
        return "\n" in text.lstrip() or "." in text

    run_grid(Task("topics", ask, judge, stop, 32, {}), args, None)


if __name__ == "__main__":
    errors.run(main)
