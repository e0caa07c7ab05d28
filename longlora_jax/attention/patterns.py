"""The attention patterns of LongLoRA, and sliding windows, as predicates: who may see whom. The single source of truth.

Every kernel and every shortcut of attend.py is tested against `allowed`.
"""

import math
from dataclasses import dataclass

import numpy as np

from longlora_jax.errors import UserError

GROUPED = ("s2", "s2_wrap", "s2_swap", "short")
ABLATIONS = ("dilated", "block_sparse", "stride_sparse")
PATTERNS = ("full", "window", *GROUPED, *ABLATIONS)
ALIKE = ("full", "window", "short")  # all heads see the same: no half of them is shifted


@dataclass(frozen=True)
class Pattern:
    """Which keys a query may see: a name out of PATTERNS and the group size G in tokens (0 for `full`).

    A `window` of W = group_size tokens is a query's own and the W - 1 before it, the sliding_window of transformers.
    full_below: tokens of a segment of at most so many see all of their segment that came before, whatever the groups.
    softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2, arXiv:2408.00118); 0: as they are.
    """

    name: str
    group_size: int = 0
    full_below: int = 0
    softcap: float = 0.0

    def __post_init__(self):
        if self.name not in PATTERNS:
            raise UserError(f"attention pattern {self.name!r} is unknown: use one of {', '.join(PATTERNS)}")
        if self.name == "window":
            if self.group_size < 1:
                raise UserError(f"attention pattern 'window' got group_size={self.group_size}: give 1 token or more")
            if self.full_below:
                raise UserError(f"attention pattern 'window' has no groups: leave out full_below={self.full_below}")
        elif self.name != "full" and self.group_size < 2:
            raise UserError(
                f"attention pattern {self.name!r} got group_size={self.group_size}: give a group of 2 tokens or more"
            )
        if not 0 <= self.softcap < math.inf:
            raise UserError(
                f"attention got softcap={self.softcap}: give a positive number, or 0 for scores as they are"
            )

    def __str__(self):
        size = {"full": "", "window": f"W={self.group_size}"}.get(self.name, f"G={self.group_size}")
        given = [x for x in (size, f"softcap={self.softcap:g}" if self.softcap else "") if x]
        return f"{self.name}({', '.join(given)})" if given else self.name


FULL = Pattern("full")


def plain_heads(num_heads: int) -> int:
    """How many of the first query heads stay unshifted: heads h < N / 2, so the middle head of an odd N too."""
    return (num_heads + 1) // 2


def allowed(pattern: Pattern, head, i, j, *, num_heads: int, seq_len: int, segment_ids=None):
    """Whether query position i of a head may see key position j.

    head, i, j: integers or integer arrays that broadcast; num_heads N and seq_len T are those of the model and
    the row; segment_ids: [T] or None, a segment being a run of equal ids. Returns booleans of the broadcast shape.
    arXiv:2309.12307, sections 3.2 and B; other than its Algorithm 1, `s2` wraps nothing round (`s2_wrap` does).
    """
    head, i, j = np.broadcast_arrays(head, i, j)
    g, t = pattern.group_size, seq_len
    causal = j <= i
    match pattern.name:
        case "full":
            seen = causal
        case "window":
            seen = causal & (i - j < g)
        case "short":
            seen = causal & (i // g == j // g)
        case "s2" | "s2_wrap" | "s2_swap":
            half = g // 2  # of an odd group too: (i + G/2) // G is the same whole number
            if pattern.name == "s2":
                shifted = causal & ((i + half) // g == (j + half) // g)
            elif pattern.name == "s2_swap":
                shifted = causal & ((i + half) % t // g == (j + half) % t // g)
            else:
                rolled_i, rolled_j = (i - half) % t, (j - half) % t
                shifted = (rolled_j <= rolled_i) & (rolled_i // g == rolled_j // g)
            seen = np.where(head < plain_heads(num_heads), causal & (i // g == j // g), shifted)
        case "dilated":  # a window of G keys, every one for the first half of the heads, every second for the rest
            step = np.where(head < plain_heads(num_heads), 1, 2)
            seen = causal & ((i - j) % step == 0) & ((i - j) // step < g)
        case "block_sparse":  # four kinds of heads: the own block, the one before, two before, three before
            back = np.minimum(head * 4 // num_heads, i // g)
            seen = causal & (i // g - j // g == back)
        case "stride_sparse":  # the last G tokens, and every G-th before them
            seen = causal & ((i - j < g) | ((i - j) % g == 0))
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        if pattern.full_below:
            runs = np.cumsum(np.diff(segment_ids, prepend=segment_ids[0]) != 0)
            short = np.bincount(runs)[runs] <= pattern.full_below
            seen = np.where(short[i], causal & (runs[i] == runs[j]), seen)
        seen = seen & (segment_ids[i] == segment_ids[j])
    return seen
