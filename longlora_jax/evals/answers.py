"""How answers are compared: SQuAD's normalisation, exact match and F1 (Rajpurkar et al., arXiv:1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """The words of a text without what does not count: case, punctuation, the articles a, an and the."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer has the words of one of the references, and no others, in their order."""
    return any(words(answer) == words(reference) for reference in references)


def f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the answer's words, for the reference where it is best.

    Where one of the two has no words it is 1 if neither has, else 0.
    """

    def one(reference: str) -> float:
        given, wanted = words(answer), words(reference)
        if not given or not wanted:
            return float(given == wanted)
        return 2 * sum((Counter(given) & Counter(wanted)).values()) / (len(given) + len(wanted))

    return max(map(one, references))
