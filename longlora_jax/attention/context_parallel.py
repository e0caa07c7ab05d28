"""Attention over a mesh: rows, heads and the sequence cut over devices, no device holding a whole row.

LongLoRA's groups are local, so a sequence that is cut over the `context` axis needs little from elsewhere:

- A shard of whole groups computes the plain heads alone. The shifted heads have a group that straddles the cut: for
  them it needs the last half group of keys and values of the shard before it, from one neighbour, half of the heads.
- A shard of half a group is in the same place for either half of the heads by turns: an odd shard ends a plain group,
  an even one ends a shifted group. It too needs one neighbour's keys and values, of one half of the heads.
- A sliding window W needs the W - 1 tokens of keys and values before its shard, of all heads: from one neighbour, and
  from those before it where W - 1 is more than a shard.
- Anything else (full attention, a quarter of a group) passes heads round instead: all-to-all, after which every
  device has whole rows of a few heads. kv heads are copied until the axis divides them.
- Where the axis does not divide the query heads, all-to-all would fill them up with zeros, and compute those as well:
  nine heads over eight devices are 16. There, under full attention, keys and values go round instead (ring.py). A ring
  sends more, 2 K heads for each other device beside all-to-all's 2 N + 2 K, which is why it is not taken elsewhere. Two
  keep all-to-all: shards of an odd number of tokens, which have no halves, and rows whose fast kernel computes no sets
  of keys (partial.slower_in_sets).

All of it runs inside shard_map: what is exchanged is what is written here.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.attention.attend import (
    attend,
    attend_after,
    attend_part,
    attend_short,
    parts_of,
    pieces,
    short_runs,
)
from longlora_jax.attention.blockwise import NOBODY, Rules
from longlora_jax.attention.kernels import causal_attention
from longlora_jax.attention.partial import Keys, Queries, attend_sets, slower_in_sets
from longlora_jax.attention.patterns import ABLATIONS, Pattern
from longlora_jax.attention.ring import ring_attention
from longlora_jax.errors import UserError

NOTHING, NEIGHBOUR, TURNS, HEADS = "nothing", "neighbour", "neighbour by turns", "all-to-all over heads"
RING = "ring of keys and values"


def exchange(pattern: Pattern, seq_len: int, num_heads: int, num_kv_heads: int, context: int, tensor: int = 1) -> str:
    """What attention exchanges over a context axis of that size: NOTHING, NEIGHBOUR, TURNS, HEADS or RING.

    tensor: the size of the tensor axis, that heads are cut over. Where slower_in_sets, as packed rows on Hopper, HEADS
    takes the place of RING.
    """
    shard, g = seq_len // context, pattern.group_size
    if context == 1 or (pattern.name == "short" and shard % g == 0):
        return NOTHING
    if pattern.name == "window" and g - 1 <= seq_len - shard:  # all before the last shard: then it is full attention
        return NEIGHBOUR if g > 1 else NOTHING
    if pattern.name == "s2" and shard % g == 0:
        return NEIGHBOUR
    # A cut inside of a kv group leaves two halves of unequal shapes, which cannot take turns.
    if pattern.name == "s2" and 2 * shard == g and num_heads % 2 == 0 and num_kv_heads % 2 == 0:
        return TURNS
    full = pattern.name == "full" or (pattern.name == "window" and g >= seq_len)
    share = num_heads if num_heads % tensor or num_kv_heads % tensor else num_heads // tensor
    return RING if full and share % context and shard % 2 == 0 else HEADS


def heads_passed(num_heads: int, num_kv_heads: int, context: int) -> tuple[int, int]:
    """How many query heads and kv heads all-to-all takes round, copies and zeros with them."""
    if num_heads % context:
        filled = num_heads + -num_heads % context
        return filled, filled
    return num_heads, math.lcm(num_kv_heads, context)


def attend_on_mesh(q, k, v, pattern: Pattern, mesh: Mesh | None, *, segment_ids=None):
    """attention.attend with rows over data and fsdp, the sequence over context and heads over tensor.

    Shapes and meaning as there. T must be a multiple of the context axis (ValueError); rows and heads that their
    axes do not divide are computed by all devices of the axis. Without a mesh, or on one device, it is attend.
    """
    if mesh is None or mesh.size == 1:
        return attend(q, k, v, pattern, segment_ids=segment_ids)
    context = mesh.shape["context"]
    if q.shape[1] % context:
        raise UserError(f"seq_len={q.shape[1]} is not a multiple of mesh.context={context}: choose another of the two")
    if pattern.name in ABLATIONS:
        if context > 1:
            raise UserError(f"attention.pattern={pattern.name!r} runs on whole rows: set mesh.context=1")
        parts = [(q, k, v)]
    else:
        parts = parts_of(q, k, v, pattern)
    how = exchange(pattern, q.shape[1], q.shape[2], k.shape[2], context, mesh.shape["tensor"])
    packed = segment_ids is not None
    if how == RING and slower_in_sets(q.shape, q.dtype, k.shape[2], packed, pattern.softcap):
        how = HEADS
    rows = row_axes(q.shape[0], mesh)
    specs = [(P(rows, "context", _head_axis(part, pattern, mesh)),) * 3 for part in parts]
    runs = short_runs(segment_ids, pattern)
    if runs is not None and pattern.full_below > q.shape[1] // context:
        raise UserError(
            f"attention.full_below={pattern.full_below} is more than the {q.shape[1] // context} tokens of a device: "
            "lower it or mesh.context"
        )
    segments = [x for x in (segment_ids, runs) if x is not None]

    def local(*args: Any):
        parts: Any = args[: len(specs)]
        given = args[len(specs) :]
        out = groups(parts, given[0] if given else None)
        if runs is None:
            return out
        return tuple(_short(q, k, v, given[1], pattern, x, context) for (q, k, v), x in zip(parts, out, strict=True))

    def groups(parts: Any, segment_ids):
        if pattern.name in ABLATIONS:
            q, k, v = parts[0]
            return (attend(q, k, v, pattern, segment_ids=segment_ids),)
        if how == TURNS:
            plain, shifted = parts
            return _by_turns(plain, shifted, pattern, segment_ids, context)
        neighbour = _window if pattern.name == "window" else _whole_groups
        one: Any = {NOTHING: attend_part, NEIGHBOUR: neighbour, HEADS: _by_heads, RING: _round}[how]
        one = one if how == NOTHING else functools.partial(one, context=context)
        return tuple(one(q, k, v, pattern, i, segment_ids) for i, (q, k, v) in enumerate(parts))

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*specs, *(P(rows, "context") for _ in segments)),
        out_specs=tuple(spec[0] for spec in specs),
        check_vma=False,
    )
    return jnp.concatenate(run(*parts, *segments), axis=2)


def row_axes(rows: int, mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh that rows of a batch are cut over: data and fsdp, as far as they divide them."""
    axes, ways = [], 1
    for name in ("data", "fsdp"):
        if rows % (ways * mesh.shape[name]) == 0:
            axes, ways = [*axes, name], ways * mesh.shape[name]
    return tuple(axes)


def constrain(x, mesh: Mesh | None):
    """x [B, T, ...] held to where activations live: rows over data and fsdp, the sequence over context."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(row_axes(x.shape[0], mesh), "context")))


def _head_axis(part, pattern: Pattern, mesh: Mesh) -> str | None:
    fits = all(x.shape[2] % mesh.shape["tensor"] == 0 for x in part)
    return "tensor" if fits and pattern.name not in ABLATIONS else None  # an ablation's heads are not alike


def _from_the_left(x, context: int, hops: int = 1):
    """What the shard so many before this one gives; zeros on the first shards."""
    return jax.lax.ppermute(x, "context", [(i, i + hops) for i in range(context - hops)])


def _window(q, k, v, pattern: Pattern, part: int, segment_ids, *, context: int):
    """A window W that reaches into the shards before: [b, t, n, h] local, the tokens before it are W - 1."""
    t, size = q.shape[1], pattern.group_size - 1

    def before(x):  # the nearest first
        hops = range(-(-size // t), 0, -1)
        shares = [_from_the_left(x[:, -min(t, size - (hop - 1) * t) :], context, hop) for hop in hops]
        return jnp.flip(jnp.concatenate(shares, axis=1), 1)

    there = jnp.full(len(q), jnp.minimum(jax.lax.axis_index("context") * t, size))  # since the row began
    own = Keys(k, v, segment_ids)
    others = Keys(*jax.tree.map(before, own[:3]))
    # All queries see the nearest keys; of the rest, which are t at most, the first query sees all, the next one less.
    edge = max(size - t, 0)
    near, far = jax.tree.map(lambda x: x[:, :edge], others), jax.tree.map(lambda x: x[:, edge:], others)
    window = pattern.group_size if pattern.group_size < t else 0
    sets = [(own, Queries(), Rules(window=window))]
    if edge:
        sets.append((near._replace(count=jnp.minimum(there, edge)), Queries(), Rules(causal=False)))
    far = far._replace(count=jnp.maximum(there - edge, 0))
    sets.append((far, Queries(first=size - edge, turned=True), Rules()))
    return attend_sets(q, segment_ids, sets, pattern.softcap)


def _whole_groups(q, k, v, pattern: Pattern, part: int, segment_ids, *, context: int):
    """A shard of whole groups: [b, t, n, h] local, t a multiple of G."""
    g = pattern.group_size
    if part == 0:
        return attend_part(q, k, v, pattern, part, segment_ids)
    half, t = g // 2, q.shape[1]
    before = _neighbour(k[:, -half:], v[:, -half:], None if segment_ids is None else segment_ids[:, -half:], context)
    first = g - half  # tokens here of the group that began in the shard before
    cap = pattern.softcap
    head = _after(before, q[:, :first], k[:, :first], v[:, :first], _cut(segment_ids, 0, first), cap)
    q, k, v = (x[:, first:] for x in (q, k, v))
    rest = pieces(q, k, v, _cut(segment_ids, first, t), first=g, group=g, softcap=cap)
    return jnp.concatenate([head, rest], axis=1)


def _by_turns(plain, shifted, pattern: Pattern, segment_ids, context: int):
    """A shard of half a group: the half of the heads whose group ends here needs the shard before, by turns."""
    odd = jax.lax.axis_index("context") % 2 == 1

    def turn(one, other, on):
        return tuple(jnp.where(on, x, y) for x, y in zip(one, other, strict=True))

    ends, begins = turn(plain, shifted, odd), turn(shifted, plain, odd)
    # The shard after this one is of the other kind: what ends there is what begins here.
    before = _neighbour(begins[1], begins[2], segment_ids, context)
    out_ends = _after(before, ends[0], ends[1], ends[2], segment_ids, pattern.softcap)
    out_begins = causal_attention(begins[0], begins[1], begins[2], segment_ids, softcap=pattern.softcap)
    return turn((out_ends, out_begins), (out_begins, out_ends), odd)


def _neighbour(k, v, segments, context: int):
    """(k, v, segments) of the shard before; on the first shard its tokens are nobody's. segments may be None."""
    k, v = _from_the_left(k, context), _from_the_left(v, context)
    if segments is not None:
        segments = jnp.where(jax.lax.axis_index("context") == 0, NOBODY, _from_the_left(segments, context))
    return k, v, segments


def _after(before, q, k, v, segment_ids, softcap: float) -> Any:
    """attention.attend_after of a shard's tokens, with those before from a neighbour: the first shard has none."""
    k_before, v_before, segments_before = before
    count = jnp.full(len(q), jnp.where(jax.lax.axis_index("context") == 0, 0, k_before.shape[1]))
    return attend_after(q, k, v, segment_ids, Keys(k_before, v_before, segments_before, count), softcap)


def _short(q, k, v, runs, pattern: Pattern, others, context: int):
    """attention.attend_short on a shard, with the tokens before it from one neighbour."""
    before, size = None, pattern.full_below
    if context > 1:
        k_before, v_before, runs_before = (_from_the_left(x[:, -size:], context) for x in (k, v, runs))
        first = jax.lax.axis_index("context") == 0
        before = Keys(k_before, v_before, jnp.where(first, -2, runs_before))
    return attend_short(q, k, v, runs, pattern, others, before)


def _cut(segment_ids, start: int, stop: int):
    return None if segment_ids is None else segment_ids[:, start:stop]


def _round(q, k, v, pattern: Pattern, part: int, segment_ids, *, context: int):
    """Full attention, keys and values passed round."""
    return ring_attention(q, k, v, segment_ids, softcap=pattern.softcap, context=context)


def _by_heads(q, k, v, pattern: Pattern, part: int, segment_ids, *, context: int):
    """Whole rows of a share of the heads: all-to-all there and back."""
    n = q.shape[2]
    heads, kv_heads = heads_passed(n, k.shape[2], context)
    # A kv head is copied for every share of the heads that reads it, or, where zeros make the shares even, for every
    # query head.
    k, v = (jnp.repeat(x, min(kv_heads, n) // x.shape[2], axis=2) for x in (k, v))
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, wanted - x.shape[2]), (0, 0)))
        for x, wanted in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    swap = functools.partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    if segment_ids is not None:
        segment_ids = jax.lax.all_gather(segment_ids, "context", axis=1, tiled=True)
    out = attend_part(q, k, v, pattern, part, segment_ids)
    return swap(out, split_axis=1, concat_axis=2)[:, :, :n]
