"""Causal attention for CPUs: strips of scores, a few heads at a time.

A strip is a block of queries against all keys that they see, or in the backward pass a block of keys against all
queries that see them. It is made whole, so softmax needs no running maximum, and of a few heads only, so that it stays
in a cache. Its products are large, and read their operands as they lie. CPUs have no use for 16 bits: all of it is
float32. Blocks of scores in loops (blockwise.py), for rows of more strips than can be unrolled, take up to twice as
long.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlora_jax.attention.blockwise import MASKED, cap_slope, capped, padded

SCORES = 2**18  # of the heads that are computed together: 1 MB in float32
MOST = 8  # strips of a row, each of which is compiled on its own


def strip_side(t: int) -> int | None:
    """The tokens in a strip of rows of t tokens, None where there would be too many strips."""
    # More strips waste less on pairs that lie ahead (a fifth of four strips', a ninth of eight's), and compile longer.
    count = max(min(t // 128, 4), -(-t // 512), 1)
    side = -(-t // count)
    side += -side % 16
    return min(side, t) if count <= MOST else None


def strip_attention(q, k, v, side: int, segment_ids=None, *, softcap: float = 0.0):
    """kernels.causal_attention without a window, in strips of so many tokens (strip_side).

    No array is larger than Z * N * T * max(H, side).
    """
    (z, t, n, h), kv_heads = q.shape, k.shape[2]
    # Tokens that fill up the last strip lie in the future of every query.
    q, k, v = (padded(x, side) for x in (q, k, v))
    segments = None if segment_ids is None else padded(segment_ids, side)
    out: Any = _strips(q.reshape(z, -1, kv_heads, n // kv_heads, h), k, v, segments, side, softcap)
    return out.reshape(z, -1, n, h)[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _strips(q, k, v, segments, side: int, softcap: float):
    """q: [Z, T, K, R, H], R query heads to a kv head; k, v: [Z, T, K, H]; segments: [Z, T] or None. As q."""
    return _forward(q, k, v, segments, side, softcap)[0]


def _few_heads(function, side: int, results, segments, q, *others):
    """function(segments, q, *others) for a few kv heads of a row after the other.

    segments: [Z, T] or None; all others and results: [Z, T, K, ...], of which function takes and gives [T, k, ...] in
    float32. results: their shapes and dtypes.
    """
    z, t, kv_heads, shared = q.shape[:4]
    most = max(SCORES // (shared * side * t), 1)
    together = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)

    def step(i, found):
        row, first = i // (kv_heads // together), i % (kv_heads // together) * together

        def some(x):
            start, sizes = (row, 0, first) + (0,) * (x.ndim - 3), (1, t, together, *x.shape[3:])
            return jax.lax.dynamic_slice(x, start, sizes)[0].astype(jnp.float32)

        new = function(None if segments is None else segments[row], some(q), *map(some, others))

        def put(x, y):
            return jax.lax.dynamic_update_slice(x, y[None].astype(x.dtype), (row, 0, first) + (0,) * (x.ndim - 3))

        return jax.tree.map(put, found, new)

    return jax.lax.fori_loop(0, z * kv_heads // together, step, tuple(jnp.zeros(x.shape, x.dtype) for x in results))


def _scores(first, second, softcap: float, *allowed):
    """Capped scores [k, X, Y] of [k, X, H] and [k, Y, H], MASKED where one of `allowed`, [X, Y] or None, is False."""
    scores = capped(jnp.einsum("kxh,kyh->kxy", first, second), softcap)
    allowed = [x for x in allowed if x is not None]
    return jnp.where(functools.reduce(jnp.logical_and, allowed)[None], scores, MASKED) if allowed else scores


def _forward(q, k, v, segments, side: int, softcap: float):
    """_strips' result and the log-sum-exp [Z, T, K, R] f32."""
    h = q.shape[-1]

    def heads(segments, q, k, v):
        q, k, v = jnp.moveaxis(q / math.sqrt(h), 0, 2), k.swapaxes(0, 1), v.swapaxes(0, 1)
        shared, outs, logs = q.shape[1], [], []
        for start in range(0, q.shape[2], side):
            own = slice(start, start + side)
            q_i = q[:, :, own].reshape(-1, shared * side, h)
            # Keys before the strip's own need no mask.
            before: list[tuple[slice, Any]] = [(slice(0, start), None)] if start else []
            sets = [*before, (own, (jnp.arange(shared * side) % side)[:, None] >= jnp.arange(side)[None])]
            scores = []
            for keys, causal in sets:
                same = None if segments is None else jnp.tile(segments[own], shared)[:, None] == segments[keys][None]
                scores.append(_scores(q_i, k[:, keys], softcap, causal, same))
            top = functools.reduce(jnp.maximum, (x.max(-1) for x in scores))
            weights = [jnp.exp(x - top[..., None]) for x in scores]
            total: Any = sum(x.sum(-1) for x in weights)
            found = [jnp.einsum("kxy,kyh->kxh", x, v[:, keys]) for x, (keys, _) in zip(weights, sets, strict=True)]
            outs.append((sum(found) / total[..., None]).reshape(-1, shared, side, h))
            logs.append((top + jnp.log(total)).reshape(-1, shared, side))
        return tuple(jnp.moveaxis(jnp.concatenate(x, axis=2), 2, 0) for x in (outs, logs))

    results = q, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    return _few_heads(heads, side, results, segments, q, k, v)


def _vjp_forward(q, k, v, segments, side: int, softcap: float):
    # Named for the remat policy that keeps them (model.REMAT): then the backward pass starts without this forward.
    out, log_total = (checkpoint_name(x, "attention") for x in _forward(q, k, v, segments, side, softcap))
    return out, (q, k, v, segments, out, log_total)


def _vjp_backward(side: int, softcap: float, residuals, d_out):
    q, k, v, segments, out, log_total = residuals
    # Not a sum of a product, which XLA:CPU computes at a twentieth of the speed where an axis has one entry.
    delta = jnp.einsum("ztkrh,ztkrh->ztkr", d_out.astype(jnp.float32), out.astype(jnp.float32))
    h = q.shape[-1]

    def heads(segments, q, k, v, log_total, delta, d_out):
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        q, log_total, delta, d_out = (jnp.moveaxis(x, 0, 2) for x in (q / math.sqrt(h), log_total, delta, d_out))
        shared, t = q.shape[1:3]
        d_k, d_v = [], []
        # Tokens last: then the product that makes it reads a strip by rows.
        d_q = jnp.zeros((k.shape[0], h, shared, t))
        for start in range(0, t, side):
            own, later = slice(start, start + side), slice(start, t)
            q_i, d_out_i = (x[:, :, later].reshape(-1, shared * (t - start), h) for x in (q, d_out))
            log_i, delta_i = (x[:, :, later].reshape(-1, 1, shared * (t - start)) for x in (log_total, delta))
            k_j, v_j = k[:, own], v[:, own]
            causal = jnp.arange(side)[:, None] <= (jnp.arange(shared * (t - start)) % (t - start))[None]
            same = None if segments is None else segments[own, None] == jnp.tile(segments[later], shared)[None]
            scores = _scores(k_j, q_i, softcap, causal, same)
            weights = jnp.exp(scores - log_i)
            d_v.append(jnp.einsum("kyx,kxh->kyh", weights, d_out_i))
            d_scores = weights * (jnp.einsum("kyh,kxh->kyx", v_j, d_out_i) - delta_i)
            if softcap:
                d_scores *= cap_slope(scores, softcap)
            d_k.append(jnp.einsum("kyx,kxh->kyh", d_scores, q_i))
            d_q_i = jnp.einsum("kyh,kyx->khx", k_j, d_scores)
            d_q = d_q.at[..., later].add(d_q_i.reshape(-1, h, shared, t - start))
        d_k, d_v = (jnp.concatenate(x, axis=1).swapaxes(0, 1) for x in (d_k, d_v))
        return d_q.transpose(3, 0, 2, 1) / math.sqrt(h), d_k, d_v

    return *_few_heads(heads, side, (q, k, v), segments, q, k, v, log_total, delta, d_out), None


_strips.defvjp(_vjp_forward, _vjp_backward)
