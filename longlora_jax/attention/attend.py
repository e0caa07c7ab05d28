"""attend(): one door to every attention pattern of LongLoRA (the patterns themselves are in patterns.py).

A grouped pattern is cut into pieces that are causal inside; pieces of equal length are folded into the batch axis and
handed to a kernel; windows are the kernels' own. So the work is proportional to the pairs that the predicate allows,
and no [T, T] array exists.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlora_jax.attention.blockwise import MASKED, Rules, blockwise_attention, capped
from longlora_jax.attention.kernels import causal_attention, say_once
from longlora_jax.attention.partial import Keys, Queries, attend_sets, slower_in_sets
from longlora_jax.attention.patterns import ABLATIONS, ALIKE, GROUPED, Pattern, allowed, plain_heads


def attend(q, k, v, pattern: Pattern, *, segment_ids=None):
    """Softmax attention under a pattern of LongLoRA.

    q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K; segment_ids: [B, T] int32 or None (tokens see their
    own segment only, a run of equal ids, none of which a row uses twice; give padding a segment of its own). Any T, any
    G. Returns [B, T, N, H] in q's dtype; scores and softmax are float32. arXiv:2309.12307, section 3.2.
    """
    if pattern.name in ABLATIONS:
        return _by_predicate(q, k, v, pattern, segment_ids)
    parts = parts_of(q, k, v, pattern)
    out = [attend_part(*part, pattern, i, segment_ids) for i, part in enumerate(parts)]
    runs = short_runs(segment_ids, pattern)
    if runs is not None:
        out = [attend_short(*part, runs, pattern, x) for part, x in zip(parts, out, strict=True)]
    return jnp.concatenate(out, axis=2)


def short_runs(segment_ids, pattern: Pattern):
    """For every token the number of its segment in the row if it has at most pattern.full_below tokens, else -1.

    [B, T] int32, or None where the pattern does not ask for it or nothing is packed.
    """
    if segment_ids is None or not pattern.full_below or pattern.name not in GROUPED:
        return None

    def row(ids):
        runs = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (ids[1:] != ids[:-1]).astype(jnp.int32)]))
        return jnp.where(jnp.bincount(runs, length=ids.size)[runs] <= pattern.full_below, runs, -1)

    return jax.vmap(row)(segment_ids)


def attend_short(q, k, v, runs, pattern: Pattern, others, before: Keys | None = None):
    """Causal attention inside every segment of at most `size` tokens; for other tokens (runs -1) what `others` holds.

    size: pattern.full_below; q: [b, t, n, h]; k, v: [b, t, kv, h]; runs: [b, t], see short_runs; others: as q; before:
    Keys of the `size` tokens that came before. Who looks back `size` tokens sees all of such a segment, so pieces of
    `size` tokens see themselves and the piece before. Rows without a short segment skip it.
    """
    b, t, n, h = q.shape
    size = pattern.full_below
    if before is None:
        nothing = jnp.zeros((b, size, *k.shape[2:]), k.dtype)
        before = Keys(nothing, nothing, jnp.full((b, size), -2))

    def compute():
        # The last piece is filled up behind the last token, where nobody looks.
        pad = -t % size

        def cut(x, first=None):
            """The pieces, or with what comes before the first one those before each, as rows."""
            x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
            x = x if first is None else jnp.concatenate([first, x[:, :-size]], axis=1)
            return x.reshape(-1, size, *x.shape[2:])

        past = Keys(*(cut(x, first) for x, first in zip((k, v, runs), before[:3], strict=True)))
        out = attend_after(cut(q), cut(k), cut(v), cut(runs), past, pattern.softcap)
        out = out.reshape(b, t + pad, n, h)[:, :t]
        return jnp.where((runs >= 0)[..., None, None], out, others)

    return jax.lax.cond(jnp.any(runs >= 0), compute, lambda: others)


def attend_after(q, k, v, segment_ids, before: Keys, softcap: float) -> Any:
    """Causal attention of q [Z, T, N, H] over keys that came before all of them and over its own k, v [Z, T, K, H].

    segment_ids: [Z, T] or None; before: [Z, S, K, H], its count 0 or S where there is one, its segments other than all
    of segment_ids where the count is 0.
    """
    if not slower_in_sets(q.shape, q.dtype, k.shape[2], segment_ids is not None, softcap):
        sets = [(Keys(k, v, segment_ids), Queries(), Rules()), (before, Queries(), Rules(causal=False))]
        return attend_sets(q, segment_ids, sets, softcap)
    # By a kernel of whole rows: queries for the keys before as well, whose results are dropped.
    t, s = q.shape[1], before.k.shape[1]
    nobody = jnp.zeros((len(q), s, *q.shape[2:]), q.dtype)

    def join(x, y):
        return jnp.concatenate([x, y], axis=1)

    if segment_ids is not None or before.count is None:
        segments = None if segment_ids is None else join(before.segments, segment_ids)
        q, k, v = join(nobody, q), join(before.k, k), join(before.v, v)
        return causal_attention(q, k, v, segments, softcap=softcap)[:, s:]

    def choose(x, y):
        return jnp.where((before.count == 0)[:, None, None, None], x, y)

    def place(x, y):
        return choose(join(y, x), join(x, y))

    # Keys that do not count stand behind the queries' own: in their future, where nobody looks.
    out = causal_attention(place(nobody, q), place(before.k, k), place(before.v, v), softcap=softcap)
    return choose(out[:, :t], out[:, s:])


def parts_of(q, k, v, pattern: Pattern) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """The heads that see the same, as [(q, k, v)]: all of them, or the plain half and the shifted half."""
    plain = plain_heads(q.shape[2])
    if pattern.name in ALIKE or plain == q.shape[2]:
        return [(q, k, v)]
    return [_heads(q, k, v, 0, plain), _heads(q, k, v, plain, q.shape[2])]


def attend_part(q, k, v, pattern: Pattern, part: int, segment_ids=None):
    """attend for the heads of one part (0: plain, 1: shifted); shapes and result as attend's."""
    g = pattern.group_size
    if pattern.name in ("full", "window"):
        window = g if pattern.name == "window" else 0
        return causal_attention(q, k, v, segment_ids, window=window, softcap=pattern.softcap)
    if part == 0:
        return pieces(q, k, v, segment_ids, first=g, group=g, softcap=pattern.softcap)
    return _shifted(q, k, v, segment_ids, pattern, q.shape[1], g)


def _heads(q, k, v, start: int, stop: int):
    """The query heads [start, stop) with kv heads that divide them evenly.

    A cut inside a kv group (an odd number of kv heads, or one) leaves unequal shares; then each query head gets
    a copy of its own kv head.
    """
    rep = q.shape[2] // k.shape[2]
    first, last = start // rep, (stop - 1) // rep
    if (start % rep == 0 and stop % rep == 0) or first == last:
        return q[:, :, start:stop], k[:, :, first : last + 1], v[:, :, first : last + 1]
    copies = [min(stop, (kv + 1) * rep) - max(start, kv * rep) for kv in range(first, last + 1)]

    def own(x):
        # Broadcast slices, whose gradients are sums; an index array would be a gather, and a scatter backward.
        one = [
            jnp.broadcast_to(x[:, :, kv : kv + 1], (*x.shape[:2], n, x.shape[3])) for kv, n in enumerate(copies, first)
        ]
        return jnp.concatenate(one, axis=2)

    return q[:, :, start:stop], own(k), own(v)


def _shifted(q, k, v, segment_ids, pattern: Pattern, t: int, g: int):
    """The shifted half of the heads: other group boundaries, the same kernel."""
    half = g // 2
    if pattern.name == "s2":
        return pieces(q, k, v, segment_ids, first=g - half, group=g, softcap=pattern.softcap)
    # Both wrapping patterns are plain groups of a rolled row; they differ in where the head of the row goes.
    if pattern.name == "s2_wrap":
        order = np.roll(np.arange(t), -(half % t))
    else:  # in causal order inside each group: the head of the row comes before its tail
        group_of = (np.arange(t) + half) % t // g
        order = np.argsort(group_of, kind="stable")
    back = np.argsort(order)
    q, k, v = (x[:, order] for x in (q, k, v))
    segments = None if segment_ids is None else segment_ids[:, order]
    if segments is not None and pattern.name == "s2_wrap" and t <= g:
        # A segment over the middle of the row is now two runs, at both ends of the one group.
        say_once("attention runs the blockwise XLA kernel: a group of s2_wrap as long as a packed row splits a segment")
        return blockwise_attention(q, k, v, segments, softcap=pattern.softcap)[:, back]
    return pieces(q, k, v, segments, first=g, group=g, softcap=pattern.softcap)[:, back]


def pieces(q, k, v, segment_ids, *, first: int, group: int, softcap: float):
    """Causal attention inside consecutive pieces of a row: one of `first` tokens, then `group` each, then the rest."""
    b, t = q.shape[:2]
    first = min(first, t)
    full = (t - first) // group
    rest = t - first - full * group
    if first == group:
        first, full = 0, full + 1

    def run(start, stop, count):
        def fold(x):
            x = x[:, start:stop]
            return x.reshape(b * count, (stop - start) // count, *x.shape[2:])

        segments = None if segment_ids is None else fold(segment_ids)
        out = causal_attention(fold(q), fold(k), fold(v), segments, softcap=softcap)
        return out.reshape(b, stop - start, *q.shape[2:])

    if first and first == rest:  # the two ends of a row, equally long, in one call

        def ends(x):
            return None if x is None else jnp.concatenate([x[:, :first], x[:, t - rest :]])

        head, tail = jnp.split(causal_attention(*map(ends, (q, k, v, segment_ids)), softcap=softcap), 2)
        middle = [run(first, t - rest, full)] if full else []
        return jnp.concatenate([head, *middle, tail], axis=1)
    bounds = [(0, first, 1), (first, t - rest, full), (t - rest, t, 1)]
    return jnp.concatenate([run(*piece) for piece in bounds if piece[1] > piece[0]], axis=1)


def _by_predicate(q, k, v, pattern: Pattern, segment_ids):
    """The definition itself with a [T, T] mask: for the paper's ablations, and the oracle of every test."""
    return attend_where(mask_of(pattern, q.shape[2], q.shape[1], segment_ids), q, k, v, pattern.softcap)


def mask_of(pattern: Pattern, heads: int, t: int, segment_ids):
    """Who sees whom under a pattern: booleans [1 or B, N, T, T], for segment_ids [B, T] or None."""
    n, i, j = np.arange(heads)[:, None, None], np.arange(t)[:, None], np.arange(t)[None, :]
    mask = jnp.asarray(allowed(pattern, n, i, j, num_heads=heads, seq_len=t))[None]
    if segment_ids is not None:
        mask &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return mask


def attend_where(mask, q, k, v, softcap: float = 0.0):
    """Softmax attention of q [B, T, N, H] over k, v [B, T, K, H] where a mask of mask_of's shape says so."""
    h, n = q.shape[3], q.shape[2]
    k, v = (jnp.repeat(x, n // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqnh,bsnh->bnqs", q, k, preferred_element_type=jnp.float32) / math.sqrt(h)
    scores = jnp.where(mask, capped(scores, softcap), MASKED)
    weights = jnp.where(mask, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    # A head of block_sparse may look into another document alone: then it sees nothing, and the sum, which is 1 or
    # more for everyone else, is 0.
    total = jnp.maximum(weights.sum(-1, keepdims=True), 0.5)
    weights = (weights / total).astype(v.dtype)
    return jnp.einsum("bnqs,bsnh->bqnh", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
