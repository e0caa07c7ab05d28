"""Attention in jax.numpy, for any device: the tiling of FlashAttention-2 (arXiv:2307.08691).

Blocks of scores are made, used and dropped, blocks above the diagonal or before the window are never visited, and the
backward pass recomputes scores from the saved log-sum-exp of each row. Keys may be others than the queries' own: all of
them are seen then, and the log-sum-exp joins them with more (partial.py).

Sums are a softmax that is not yet divided: (weighted values [..., H], the score [...] that weights are relative to, sum
of weights [...]), the largest score so far or the logarithm of the weights' sum.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# Finite: a block without any visible key then gives weights and not NaN. They are dropped by the diagonal block,
# which comes last and where every query sees at least itself, or by what is joined.
MASKED = -1e30
NOBODY = -(2**31)  # the segment of tokens that are not there


class Rules(NamedTuple):
    """Which scores count: those of keys ahead do not where causal; window and softcap: as causal_attention's."""

    causal: bool = True
    window: int = 0
    softcap: float = 0.0


def blockwise_attention(q, k, v, segment_ids=None, *, window: int = 0, softcap: float = 0.0, block: int | None = None):
    """kernels.causal_attention in jax.numpy, for any device.

    block: side of a block of scores in tokens; no array is larger than Z * N * T * max(H, block).
    """
    rules = Rules(True, window, softcap)
    out: Any = _blocks(*_cut(q, k, v, segment_ids, segment_ids, rules, block), rules)
    return _whole(out, q.shape[2])[:, : q.shape[1]]


def blockwise_sums(q, k, v, segments_q, segments_k, rules: Rules, block: int | None = None):
    """Sums of q [Z, T, N, H] over k and v [Z, S, K, H], float32.

    S is T where rules are causal. segments_q: [Z, T] and segments_k: [Z, S], or both None. The largest score of a query
    that sees nothing is MASKED.
    """
    t, n = q.shape[1:3]
    acc, *others = _forward(*_cut(q, k, v, segments_q, segments_k, rules, block), rules, divide=False)
    return _whole(acc, n)[:, :t], *(_whole(x[..., None], n)[:, :t, :, 0] for x in others)


def blockwise_gradients(q, k, v, segments_q, segments_k, found, d_out, rules: Rules, block: int | None = None):
    """Gradients for q, k and v of attention over these keys and others; found: (out, log-sum-exp) of all together."""
    (t, n), (s, kv_heads) = q.shape[1:3], k.shape[1:3]
    cut = _cut(q, k, v, segments_q, segments_k, rules, block)
    out, log_total = found
    # Queries that are padding get no weights: what they lack to a sum is more than float32 has.
    given = [(out, 0), (log_total[..., None], -MASKED), (d_out, 0)]
    side, count = _side(t, rules, block), cut[0].shape[0]
    out, log_total, d_out = (_fold(padded(x, side, fill), count, kv_heads) for x, fill in given)
    d_q, d_k, d_v = _backward(*cut, out, log_total[..., 0], d_out, rules)
    return _whole(d_q, n)[:, :t], _whole(d_k, kv_heads)[:, :s], _whole(d_v, kv_heads)[:, :s]


def _side(tokens: int, rules: Rules, block: int | None) -> int:
    """The side of blocks of so many tokens."""
    # An eighth of what is seen wastes little at its edges; the bounds suit a CPU's cache and its loop overhead.
    return min(tokens, block or min(max(min(tokens, rules.window or tokens) // 8, 64), 512))


def padded(x, side: int, fill: float = 0, *, axis: int = 1, lanes: int = 1):
    """x filled up to a multiple of side along an axis, and of lanes along the last, if that is another."""
    sides = {x.ndim - 1: lanes, axis: side}
    return jnp.pad(x, [(0, -n % sides.get(i, 1)) for i, n in enumerate(x.shape)], constant_values=fill)


def _fold(x, count: int, kv_heads: int):
    """[Z, T, N, H] as [blocks, Z, K, N/K * b, H].

    Blocks first, so that a loop step reads contiguous memory; the queries that share a kv head are rows.
    """
    z, t, n, h = x.shape
    x = x.reshape(z, count, t // count, kv_heads, n // kv_heads, h).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(count, z, kv_heads, -1, h)


def _whole(x, heads: int):
    """[Z, T, N, H] of _fold's blocks."""
    count, z, kv_heads, rows, h = x.shape
    rep = heads // kv_heads
    x = x.reshape(count, z, kv_heads, rep, rows // rep, h).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(z, -1, heads, h)


def _cut(q, k, v, segments_q, segments_k, rules: Rules, block: int | None):
    """The arguments of _blocks: padded to whole blocks and folded."""
    (t, n), (s, kv_heads) = q.shape[1:3], k.shape[1:3]
    assert n % kv_heads == 0 and (t == s or not rules.causal), (q.shape, k.shape)
    side_q, side_k = _side(t, rules, block), _side(s, rules, block)
    # Without a mask, keys that are padding are another segment's; with one, they lie in the future of every real query.
    if segments_k is None and not rules.causal and s % side_k:
        segments_q, segments_k = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    q, k, v = padded(q, side_q), padded(k, side_k), padded(v, side_k)
    count_q, count_k = q.shape[1] // side_q, k.shape[1] // side_k
    if segments_k is not None:
        segments_q = padded(segments_q, side_q).reshape(-1, count_q, side_q).swapaxes(0, 1)
        segments_k = padded(segments_k, side_k, NOBODY).reshape(-1, count_k, side_k).swapaxes(0, 1)
    q, k, v = _fold(q, count_q, kv_heads), _fold(k, count_k, kv_heads), _fold(v, count_k, kv_heads)
    return q, k, v, segments_q, segments_k


def nothing(shape):
    """Sums of no keys for queries of a shape [..., H]."""
    rows = shape[:-1]
    return jnp.zeros(shape, jnp.float32), jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)


def capped(scores, softcap: float):
    """softcap * tanh(scores / softcap); as they are where it is 0."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def cap_slope(scores, softcap: float):
    """The derivative of capped, of what it gave, MASKED or not."""
    # Those that a mask hides have no weight, and their square no room in float32.
    return 1 - jnp.square(jnp.maximum(scores, -softcap) / softcap)


def scores_of(q, k, softcap: float):
    """Scaled, capped scores [Z, K, ..., S] in float32 of q [Z, K, ..., H], by kv head, and k [Z, K, S, H]."""
    scores = jnp.einsum("zk...h,zksh->zk...s", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    return capped(scores, softcap)


def add_block(sums, scores, values):
    """Sums with those of a block more: scores [Z, K, ..., S], MASKED where they do not count; values [Z, K, S, H]."""
    acc, top, total = sums
    new_top = jnp.maximum(top, scores.max(-1))
    # Where nothing was seen yet all weights are one: the first score that counts makes them vanish.
    weights, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
    new = jnp.einsum("zk...s,zksh->zk...h", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return acc * decay[..., None] + new, new_top, total * decay + weights.sum(-1)


def divided(sums):
    """(out, log-sum-exp) of sums."""
    acc, top, total = sums
    return acc / total[..., None], top + jnp.log(total)


def _reach(window: int, block: int) -> tuple[int, int]:
    """How many of the blocks before its own a block of queries sees in a window: (wholly, at all)."""
    return max(window // block - 1, 0), (window + block - 2) // block


def _scores(q, k, segments_q, segments_k, rules: Rules, back=None):
    """Scaled, capped scores [Z, K, rep * b, c] in float32 of a block of b queries against a block of c keys.

    back: how many blocks the keys lie before the queries, None where all of them may be seen.
    """
    scores = scores_of(q, k, rules.softcap)
    rows, block = scores.shape[-2:]
    allowed = None
    if back is not None:
        distance = np.arange(rows)[:, None] % block - np.arange(block) + back * block
        allowed = ((distance >= 0) & (distance < rules.window) if rules.window else distance >= 0)[None, None]
    if segments_q is not None:
        same = segments_q[:, :, None] == segments_k[:, None, :]
        same = jnp.tile(same, (1, rows // same.shape[1], 1))[:, None]
        allowed = same if allowed is None else same & allowed
    return scores if allowed is None else jnp.where(allowed, scores, MASKED)


def _at(x, i) -> Any:  # None only for None: callers know
    return None if x is None else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(q, k, v, segments_q, segments_k, rules: Rules) -> jax.Array:
    """q: [n, Z, K, rep * b, H]; k, v: [m, Z, K, c, H]; segments: [n, Z, b] and [m, Z, c], or None. Returns q's shape.

    m is n and c is b where rules are causal.
    """
    return _forward(q, k, v, segments_q, segments_k, rules)[0]


def _forward(q, k, v, segments_q, segments_k, rules: Rules, divide: bool = True):
    """_blocks' result and the log-sum-exp [n, Z, K, rep * b] f32, or sums."""

    def query_block(i):
        q_i, seg_i = _at(q, i), _at(segments_q, i)

        def key_block(j, sums, back=None):
            return add_block(sums, _scores(q_i, _at(k, j), seg_i, _at(segments_k, j), rules, back), _at(v, j))

        start, whole = nothing(q_i.shape), 0
        if rules.window:
            whole, touched = (jnp.maximum(i - blocks, 0) for blocks in _reach(rules.window, k.shape[-2]))
            start = jax.lax.fori_loop(touched, whole, lambda j, carry: key_block(j, carry, i - j), start)
        sums = jax.lax.fori_loop(whole, i if rules.causal else k.shape[0], key_block, start)
        sums = key_block(i, sums, back=0) if rules.causal else sums
        if not divide:
            return sums
        out, log_total = divided(sums)
        return out.astype(q.dtype), log_total

    return jax.lax.map(query_block, jnp.arange(q.shape[0]))


def _vjp_forward(q, k, v, segments_q, segments_k, rules: Rules):
    # Named for the remat policy that keeps them (model.REMAT): then the backward pass starts without this forward.
    found = _forward(q, k, v, segments_q, segments_k, rules)
    out, log_total = (checkpoint_name(x, "attention") for x in found)
    return out, (q, k, v, segments_q, segments_k, out, log_total)


def _vjp_backward(rules: Rules, residuals, d_out):
    q, k, v, segments_q, segments_k, out, log_total = residuals
    return *_backward(q, k, v, segments_q, segments_k, out, log_total, d_out, rules), None, None


def _backward(q, k, v, segments_q, segments_k, out, log_total, d_out, rules: Rules):
    """Gradients for q, k and v; out and log_total: _forward's, or those of more keys than these."""
    n = q.shape[0]
    scale = 1.0 / math.sqrt(q.shape[-1])
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def key_block(d_q, j):
        k_j, v_j, seg_j = _at(k, j), _at(v, j), _at(segments_k, j)

        def query_block(i, carry, back=None):
            d_q, d_k, d_v = carry
            q_i, d_out_i = _at(q, i), _at(d_out, i)
            scores = _scores(q_i, k_j, _at(segments_q, i), seg_j, rules, back)
            weights = jnp.exp(scores - _at(log_total, i)[..., None])
            f32 = {"preferred_element_type": jnp.float32}
            d_v += jnp.einsum("zkqs,zkqh->zksh", weights.astype(q.dtype), d_out_i, **f32)
            d_weights = jnp.einsum("zkqh,zksh->zkqs", d_out_i, v_j, **f32)
            d_scores = weights * (d_weights - _at(delta, i)[..., None]) * scale
            if rules.softcap:
                d_scores *= cap_slope(scores, rules.softcap)
            d_scores = d_scores.astype(q.dtype)
            d_k += jnp.einsum("zkqs,zkqh->zksh", d_scores, q_i, **f32)
            d_q = d_q.at[i].add(jnp.einsum("zkqs,zksh->zkqh", d_scores, k_j, **f32))
            return d_q, d_k, d_v

        start = (d_q, jnp.zeros(k_j.shape, jnp.float32), jnp.zeros(v_j.shape, jnp.float32))
        if not rules.causal:
            d_q, d_k, d_v = jax.lax.fori_loop(0, n, query_block, start)
            return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))
        whole = n
        if rules.window:
            whole, touched = (jnp.minimum(j + 1 + blocks, n) for blocks in _reach(rules.window, k.shape[-2]))
        carry = jax.lax.fori_loop(j + 1, whole, query_block, query_block(j, start, back=0))
        if rules.window:
            carry = jax.lax.fori_loop(whole, touched, lambda i, carry: query_block(i, carry, i - j), carry)
        d_q, d_k, d_v = carry
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[0]))
    return d_q.astype(q.dtype), d_k, d_v


_blocks.defvjp(_vjp_forward, _vjp_backward)
