"""What cuDNN is asked for in packed rows, in plain jax.numpy: attention by offsets and lengths, one slot at a time.

It is no kinder than the library: it never sees segment ids, a segment longer than a row is cut off, and what lies in no
segment comes back as NaN, where cuDNN leaves whatever was in memory.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def slots(offsets, lengths, rows: int, t: int):
    """The places of every slot's tokens in all rows laid end to end, [rows * slots, t], and which of them count."""
    starts = np.arange(rows)[:, None] * t + offsets[:, :-1]
    place = starts.reshape(-1, 1) + np.arange(t)[None]
    valid = (np.arange(t)[None] < lengths.reshape(-1, 1)) & (offsets[:, :-1].reshape(-1, 1) >= 0)
    return jnp.where(valid, place, rows * t), valid


def attention(q, k, v, offsets, lengths):
    """The output; NaN in no segment."""
    rows, t, n, h = q.shape
    place, valid = slots(offsets, lengths, rows, t)
    rep = n // k.shape[2]
    one = [x.reshape(rows * t, *x.shape[2:]).at[place].get(mode="fill", fill_value=0) for x in (q, k, v)]
    q_s, k_s, v_s = one[0], jnp.repeat(one[1], rep, axis=2), jnp.repeat(one[2], rep, axis=2)
    scores = jnp.einsum("stnh,sunh->sntu", q_s, k_s) / math.sqrt(h)
    seen = (np.tri(t, dtype=bool)[None] & valid[:, None, :])[:, None]
    out = jnp.einsum("sntu,sunh->stnh", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), v_s)
    return jnp.full((rows * t, n, h), jnp.nan, q.dtype).at[place].set(out, mode="drop").reshape(q.shape)


def forward(q, k, v, offsets, lengths):
    """In the place of segments.forward."""
    sums = jnp.zeros((q.shape[0] * lengths.shape[1], q.shape[2], q.shape[1]), jnp.float32)
    return attention(q, k, v, offsets, lengths), sums


def backward(q, k, v, out, d_out, sums, offsets, lengths):
    """In the place of segments.backward."""
    rows, t = q.shape[:2]
    place, _ = slots(offsets, lengths, rows, t)
    inside = jnp.zeros(rows * t, bool).at[place].set(True, mode="drop").reshape(rows, t, 1, 1)
    _, back = jax.vjp(lambda q, k, v: attention(q, k, v, offsets, lengths), q, k, v)
    # What it reads of the output is what this call wrote, and of its gradient nothing else either.
    return tuple(jnp.where(inside, x, jnp.nan) for x in back(jnp.where(inside & (out == out), d_out, 0)))
