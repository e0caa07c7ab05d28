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


def _few_heads(function, side: int, results, segments, *arrays):
    """function(segments, *arrays) for a few kv heads of a row after the other.

    segments: [Z, T] or None. arrays: (x, axis), x [Z, ...] with the K kv heads along it; first q [Z, T, K, R, H].
    function takes them without Z, with k heads, in float32, and gives results likewise: (shape and dtype, axis).
    """
    z, t, kv_heads, shared = arrays[0][0].shape[:4]
    most = max(SCORES // (shared * side * t), 1)
    together = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)

    def step(i, found):
        row, first = i // (kv_heads // together), i % (kv_heads // together) * together

        def corner(x, axis: int):
            return [{0: row, axis: first}.get(dim, 0) for dim in range(x.ndim)]

        def some(x, axis: int):
            sizes = [{0: 1, axis: together}.get(dim, size) for dim, size in enumerate(x.shape)]
            return jax.lax.dynamic_slice(x, corner(x, axis), sizes)[0].astype(jnp.float32)

        def put(x, axis: int, new):
            return jax.lax.dynamic_update_slice(x, new[None].astype(x.dtype), corner(x, axis))

        new = function(None if segments is None else segments[row], *(some(*x) for x in arrays))
        return tuple(put(x, axis, y) for x, (_, axis), y in zip(found, results, new, strict=True))

    start = tuple(jnp.zeros(x.shape, x.dtype) for x, _ in results)
    return jax.lax.fori_loop(0, z * kv_heads // together, step, start)


def _masked(scores, *allowed):
    """scores [k, ...], MASKED where one of `allowed`, [1, ...] or None, is False."""
    allowed = [x for x in allowed if x is not None]
    return jnp.where(functools.reduce(jnp.logical_and, allowed), scores, MASKED) if allowed else scores


def _forward(q, k, v, segments, side: int, softcap: float):
    """_strips' result and the log-sum-exp [Z, K, R, T] f32."""
    h = q.shape[-1]

    def heads(segments, q, k, v):
        q, k, v = jnp.moveaxis(q / math.sqrt(h), 0, 2), k.swapaxes(0, 1), v.swapaxes(0, 1)
        shared, outs, logs = q.shape[1], [], []
        for start in range(0, q.shape[2], side):
            own = slice(start, start + side)
            q_i = q[:, :, own].reshape(-1, shared * side, h)
            # Keys before the strip's own need no mask.
            before: list[tuple[slice, Any]] = [(slice(0, start), None)] if start else []
            sets = [*before, (own, ((jnp.arange(shared * side) % side)[:, None] >= jnp.arange(side)[None])[None])]
            scores = []
            for keys, causal in sets:
                same = None
                if segments is not None:
                    same = (jnp.tile(segments[own], shared)[:, None] == segments[keys][None])[None]
                found = capped(jnp.einsum("kxh,kyh->kxy", q_i, k[:, keys]), softcap)
                scores.append(_masked(found, causal, same))
            top = functools.reduce(jnp.maximum, (x.max(-1) for x in scores))
            weights = [jnp.exp(x - top[..., None]) for x in scores]
            total: Any = sum(x.sum(-1) for x in weights)
            found = [jnp.einsum("kxy,kyh->kxh", x, v[:, keys]) for x, (keys, _) in zip(weights, sets, strict=True)]
            outs.append((sum(found) / total[..., None]).reshape(-1, shared, side, h))
            logs.append((top + jnp.log(total)).reshape(-1, shared, side))
        return jnp.moveaxis(jnp.concatenate(outs, axis=2), 2, 0), jnp.concatenate(logs, axis=2)

    z, t, kv_heads, shared = q.shape[:4]
    results = (q, 2), (jax.ShapeDtypeStruct((z, kv_heads, shared, t), jnp.float32), 1)
    return _few_heads(heads, side, results, segments, (q, 2), (k, 2), (v, 2))


def _vjp_forward(q, k, v, segments, side: int, softcap: float):
    # Named for the remat policy that keeps them (model.REMAT): then the backward pass starts without this forward.
    out, log_total = (checkpoint_name(x, "attention") for x in _forward(q, k, v, segments, side, softcap))
    return out, (q, k, v, segments, out, log_total)


def _vjp_backward(side: int, softcap: float, residuals, d_out):
    q, k, v, segments, out, log_total = residuals
    h = q.shape[-1]
    # Not a sum of a product, which XLA:CPU computes at a twentieth of the speed where an axis has one entry.
    delta = jnp.einsum("ztkrh,ztkrh->zkrt", d_out.astype(jnp.float32), out.astype(jnp.float32))

    def heads(segments, q, k, v, d_out, log_total, delta):
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        q, d_out = (jnp.moveaxis(x, 0, 2) for x in (q / math.sqrt(h), d_out))
        shared, t = q.shape[1:3]
        d_k, d_v = [], []
        # Tokens last: then the product that makes it reads a strip by rows.
        d_q = jnp.zeros((q.shape[0], h, shared, t))
        for start in range(0, t, side):
            own, later = slice(start, start + side), slice(start, t)
            k_j, v_j = k[:, own], v[:, own]
            q_i, d_out_i = (x[:, :, later].reshape(-1, shared * (t - start), h) for x in (q, d_out))
            log_i, delta_i = log_total[:, None, :, later], delta[:, None, :, later]
            causal = jnp.arange(side)[None, :, None, None] <= jnp.arange(t - start)[None, None, None]
            same = None
            if segments is not None:
                same = segments[own][None, :, None, None] == segments[later][None, None, None]

            # The queries that share a kv head are rows of products. Between these they have an axis of their own: so
            # loops run along tokens.
            apart, rows = (-1, side, shared, t - start), (-1, side, shared * (t - start))
            scores = _masked(capped(jnp.einsum("kyh,kxh->kyx", k_j, q_i).reshape(apart), softcap), causal, same)
            weights = jnp.exp(scores - log_i)
            d_v.append(jnp.einsum("kyx,kxh->kyh", weights.reshape(rows), d_out_i))
            d_scores = weights * (jnp.einsum("kyh,kxh->kyx", v_j, d_out_i).reshape(apart) - delta_i)
            if softcap:
                d_scores *= cap_slope(scores, softcap)
            d_k.append(jnp.einsum("kyx,kxh->kyh", d_scores.reshape(rows), q_i))
            d_q_i = jnp.einsum("kyh,kyx->khx", k_j, d_scores.reshape(rows))
            # Not d_q.at[..., later].add, a scatter: jaxlib 0.11.2 crashes when it compiles that in a shard_map.
            d_q_i = d_q[..., later] + d_q_i.reshape(-1, h, shared, t - start)
            d_q = jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, start, axis=3)
        d_k, d_v = (jnp.concatenate(x, axis=1).swapaxes(0, 1) for x in (d_k, d_v))
        return d_q.transpose(3, 0, 2, 1) / math.sqrt(h), d_k, d_v

    arrays = (q, 2), (k, 2), (v, 2), (d_out, 2), (log_total, 1), (delta, 1)
    return *_few_heads(heads, side, arrays[:3], segments, *arrays), None


_strips.defvjp(_vjp_forward, _vjp_backward)
