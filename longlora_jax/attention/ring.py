"""Full attention over a sequence that is cut over devices: keys and values go round (Ring Attention, arXiv:2310.01889).

Queries stay, and no device holds a whole row. Under a causal mask the last shard sees everything and the first itself
alone: in order, all would wait for the last, about twice as long as the work takes. So tokens are dealt in halves of a
shard, one of the first and one of the last to each device (2 and 13 of 0 to 15, on eight): then every pair of devices
has half of its scores to make, whoever is ahead, and none makes one that a mask would hide but on its own diagonal. The
tokens go back to where they live, with the result.

The backward pass goes round once more: the gradients of keys and values travel with them, in float32, and come home
with a last step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlora_jax.attention.blockwise import MASKED, Rules, divided
from longlora_jax.attention.partial import Keys, gradients_of, join, partial_kernel, sums_of

AXIS = "context"


def ring_attention(q, k, v, segment_ids, *, softcap: float, context: int):
    """Causal attention inside of shard_map: q [b, t, n, h]; k, v [b, t, kv, h]; segment_ids [b, t] or None, local.

    t is even; n is any multiple of kv. Returns [b, t, n, h] in q's dtype.
    """
    kernel = partial_kernel(q.shape, q.dtype, k.shape[2], segment_ids is not None, softcap)
    q, k, v, segment_ids = jax.tree.map(functools.partial(_deal, context=context), (q, k, v, segment_ids))
    return _gather(_ring(q, k, v, segment_ids, softcap, context, kernel), context=context)


def _places(context: int, half: int) -> list[tuple[int, int]]:
    """(shard, device) of one half of all shards: of 2 * context halves, device i has the i-th and the i-th last."""
    return [(i, min(2 * i + half, 2 * (context - i) - 1 - half)) for i in range(context)]


def _deal(x, *, context: int):
    """A shard [b, t, ...] of a row for an early half and a late one."""
    halves = jnp.split(x, 2, axis=1)
    first, second = (jax.lax.ppermute(y, AXIS, _places(context, i)) for i, y in enumerate(halves))
    odd = jax.lax.axis_index(AXIS) % 2 == 1  # then the early half is the second of its shard
    return jnp.where(odd, jnp.concatenate([second, first], axis=1), jnp.concatenate([first, second], axis=1))


def _gather(x, *, context: int):
    """The shard of a row for _deal's halves."""
    early, late = jnp.split(x, 2, axis=1)
    odd = jax.lax.axis_index(AXIS) % 2 == 1
    halves = jnp.where(odd, late, early), jnp.where(odd, early, late)
    back = [[(there, here) for here, there in _places(context, i)] for i in range(2)]
    return jnp.concatenate([jax.lax.ppermute(x, AXIS, way) for x, way in zip(halves, back, strict=True)], axis=1)


def _on(x, context: int):
    """Everything to the next device."""
    return jax.tree.map(lambda y: jax.lax.ppermute(y, AXIS, [(i, (i + 1) % context) for i in range(context)]), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(q, k, v, segments, softcap: float, context: int, kernel: str):
    """ring_attention of dealt tokens."""
    return _ring_forward(q, k, v, segments, softcap, context, kernel)[0]


def _round(context: int, own: Keys, start, visit):
    """visit(hop, keys, carry) for the keys of the device that is so many before this one, hops 1 to context - 1."""

    # What is computed with is sent on at the same time: only the last keys stay.
    def turn(hop, carry):
        keys, carry = carry
        following = _on(keys, context)
        return following, visit(hop, keys, carry)

    keys, carry = jax.lax.fori_loop(1, context - 1, turn, (_on(own, context), start))
    return visit(context - 1, keys, carry)


def _ring_forward(q, k, v, segments, softcap: float, context: int, kernel: str):
    own, half = Keys(k, v, segments), q.shape[1] // 2
    seen = Rules(causal=False, softcap=softcap)

    def visit(hop, keys, sums):
        def of_a_device_before():  # whose early half all here may see, and none its late one
            return sums_of(kernel, q, segments, _half(keys), seen)

        def of_a_device_after():  # all of which is seen by the late half here, and nothing by the early one
            acc, top, total = sums_of(kernel, q[:, half:], _late(segments, half), keys, seen)
            return _behind(acc, half), _behind(top, half, MASKED), _behind(total, half)

        return join(sums, jax.lax.cond(_is_before(hop), of_a_device_before, of_a_device_after))

    # The two halves are in order, whatever lies between them.
    acc, top, total = sums_of(kernel, q, segments, own, Rules(softcap=softcap))
    out, log_total = divided(_round(context, own, (acc.astype(jnp.float32), top, total), visit))
    # Named for the remat policy that keeps them (model.REMAT): then nothing goes round for them again.
    out, log_total = checkpoint_name(out.astype(q.dtype), "attention"), checkpoint_name(log_total, "attention")
    return out, (q, k, v, segments, out, log_total)


def _ring_backward(softcap: float, context: int, kernel: str, residuals, d_out):
    q, k, v, segments, out, log_total = residuals
    own, half = Keys(k, v, segments), q.shape[1] // 2
    seen = Rules(causal=False, softcap=softcap)

    def visit(hop, keys, carry):
        def of_a_device_before():
            found = gradients_of(kernel, q, segments, _half(keys), (out, log_total), d_out, seen)
            return found[0], *(jnp.pad(x, ((0, 0), (0, half), (0, 0), (0, 0))) for x in found[1:])

        def of_a_device_after():
            late = out[:, half:], log_total[:, half:]
            found = gradients_of(kernel, q[:, half:], _late(segments, half), keys, late, d_out[:, half:], seen)
            return _behind(found[0], half), *found[1:]

        d_q, d_keys = carry
        d_keys = _on(d_keys, context)  # to where their keys are by now
        more = jax.lax.cond(_is_before(hop), of_a_device_before, of_a_device_after)
        return d_q + more[0], (d_keys[0] + more[1], d_keys[1] + more[2])

    found = gradients_of(kernel, q, segments, own, (out, log_total), d_out, Rules(softcap=softcap))
    d_q, *d_keys = (x.astype(jnp.float32) for x in found)
    d_q, d_keys = _round(context, own, (d_q, tuple(d_keys)), visit)
    d_k, d_v = _on(d_keys, context)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _is_before(hop):
    """Whether the device so many hops before this one, round the ring, is before it in the row."""
    return hop <= jax.lax.axis_index(AXIS)


def _half(keys: Keys) -> Keys:
    """The early half of what a device has."""
    return Keys(*jax.tree.map(lambda x: x[:, : x.shape[1] // 2], keys[:3]))


def _late(segments, half: int):
    return None if segments is None else segments[:, half:]


def _behind(x, half: int, fill: float = 0):
    """[b, t, ...] of the late half alone: filled up for the early one."""
    return jnp.pad(x, ((0, 0), (half, 0), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
