"""What attention remembers while a model reads and writes on: keys and values, of all tokens or of a few.

A cache of all tokens holds keys as they are rotated for their positions, in blocks of slots; each layer has a run of
blocks. A layer with full attention has a slot for every position; one with a sliding window has a ring that holds the
window and a chunk. What a row's padding left behind lies in the future of all its tokens until they overwrite it: rows
of any lengths go together. On a mesh every block is cut over the devices that rows and heads leave: each attends to its
own share of the slots, and what it found is put together by log-sum-exp; keys and values stay where they are.

A sink cache (StreamingLLM, arXiv:2309.17453) holds the first `sinks` tokens and a ring of the last ones. A token sees
the sinks and the last `window` tokens, itself among them, at positions counted within the cache: it stands at
min(p, sinks + window - 1), its neighbours at their true distance from it, the sinks at 0, 1, ... So two tokens are
never further apart than sinks + window - 1, however much was read. This holds for each token of a chunk by itself:
chunks of any size give what single tokens give. Keys are kept unrotated, because their positions move.
(StreamingLLM's code lets a token see `window` tokens and itself.)
"""

import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.attention.blockwise import MASKED, Rules, add_block, divided, nothing, scores_of
from longlora_jax.attention.context_parallel import row_axes
from longlora_jax.attention.kernels import platform
from longlora_jax.attention.partial import Keys, chunk_kernel, join, join_over, sums_of
from longlora_jax.attention.rope import apply_rope
from longlora_jax.errors import UserError
from longlora_jax.model.layers import frequencies_of, tables_of
from longlora_jax.model_config import ModelConfig

BLOCK = 512  # keys that are scored at once: no array is larger than B * N * T * BLOCK, or B * N * BLOCK^2
PIECE = 8192  # keys that a TPU's or GPU's kernel is given at once: much work beside what putting sums together takes
NO_LIMIT = 2**31 - 1


class Cut(NamedTuple):
    """The axes of a mesh that a cache is cut over, of each of its sides."""

    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()


class Cache(flax.struct.PyTreeNode):
    """Keys and values of all layers, of rows that have read lengths [B] int32 tokens.

    keys, values: [blocks, B, K, slots, H], of a sink cache one block for each layer. first, blocks: [L] int32, the run
    of blocks of each layer; reach: [L] int32, how many tokens it sees, those of its window or all. frequencies: [ropes,
    B, R/2] f32 of the rotary embeddings (model/layers.py) of the tokens to come; layer: whose turn it is.
    windows: whether some layers see less than all; sinks, window: of a sink cache, in tokens; window 0 is a cache of
    all tokens.
    """

    keys: jax.Array
    values: jax.Array
    first: jax.Array
    blocks: jax.Array
    reach: jax.Array
    lengths: jax.Array
    frequencies: jax.Array
    layer: jax.Array
    attention_factors: tuple[float, ...] = flax.struct.field(pytree_node=False)
    softcap: float | None = flax.struct.field(pytree_node=False)
    windows: bool = flax.struct.field(pytree_node=False)
    sinks: int = flax.struct.field(pytree_node=False)
    window: int = flax.struct.field(pytree_node=False)


def new_cache(
    config: ModelConfig, rows: int, tokens: int, *, dtype, chunk: int, sinks: int = 0, window: int = 0, mesh=None
) -> Cache:
    """An empty cache for rows of up to `tokens` tokens that come in chunks of up to `chunk`.

    With a window it takes any number of tokens. On a mesh it is cut as cut_of says.
    """
    empty = functools.partial(_empty, config, rows, tokens, dtype, chunk, sinks, window, mesh)
    places = None if mesh is None else cache_shardings(jax.eval_shape(empty), mesh)
    return jax.jit(empty, out_shardings=places)()


def abstract_cache(
    config: ModelConfig, rows: int, tokens: int, *, dtype, chunk: int, sinks: int = 0, window: int = 0, mesh=None
) -> Cache:
    """new_cache's shapes, dtypes and shardings, without its arrays: a cache of jax.ShapeDtypeStruct."""
    cache = jax.eval_shape(functools.partial(_empty, config, rows, tokens, dtype, chunk, sinks, window, mesh))
    if mesh is None:
        return cache
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, cache, cache_shardings(cache, mesh))


def _empty(config: ModelConfig, rows: int, tokens: int, dtype, chunk: int, sinks: int, window: int, mesh) -> Cache:
    if window and (any(config.windows) or len(set(config.ropes)) > 1):
        raise UserError(
            "a model with sliding windows, or with layers without rotary embedding, has no sink cache: leave out "
            "--sinks and --window (its own windows bound what most of its layers remember)"
        )
    # A chunk is written whole, though its end may be padding beyond the last token.
    if window:
        size, counts, reach = _few_sizes(sinks + window + chunk), [1] * config.num_hidden_layers, [0]
    else:
        needed = [min(tokens, own or tokens) + chunk for own in config.windows]
        cut = cut_of(rows, config.num_key_value_heads, mesh)
        ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in cut.slots)
        size = _block_size(*(-(-slots(needed) // ways) for slots in (min, max))) * ways
        counts = [-(-slots // size) for slots in needed]
        reach = [own or NO_LIMIT for own in config.windows]
    shape = (sum(counts), rows, config.num_key_value_heads, size, config.head_dim)
    frequencies, factors = frequencies_of(config, sinks + window if window else 1)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        first=jnp.asarray(np.cumsum([0, *counts[:-1]]), jnp.int32),
        blocks=jnp.asarray(counts, jnp.int32),
        reach=jnp.asarray(reach, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        frequencies=jnp.tile(frequencies[:, None], (1, rows, 1)),
        layer=jnp.zeros((), jnp.int32),
        attention_factors=factors,
        softcap=config.attn_logit_softcapping,
        windows=any(config.windows),
        sinks=sinks,
        window=window,
    )


def _block_size(least: int, most: int) -> int:
    """Slots of a block, of a device whose layers have so many or more: the layer with most has blocks of equal size.

    BLOCK or less where no kernel runs, else PIECE or less; as a ring takes a whole block or more, a quarter of PIECE
    beside short rings.
    """
    largest = BLOCK if platform() == "cpu" else max(min(PIECE, _few_sizes(least)), PIECE // 4)
    return _few_sizes(-(-most // -(-most // largest)))


def _few_sizes(slots: int) -> int:
    """The least of a few sizes that holds so many slots, so that little is compiled anew."""
    return -(-slots // BLOCK) * BLOCK if slots > BLOCK else 1 << (slots - 1).bit_length()


def cut_of(rows: int, kv_heads: int, mesh: Mesh | None) -> Cut:
    """How a cache of all tokens is cut on a mesh: rows over data and fsdp, heads over tensor and over what rows left of
    the others, as far as they divide them, and slots over what is left then."""
    if mesh is None:
        return Cut()
    over_rows = row_axes(rows, mesh)
    over_heads, ways = [], 1
    for axis in ("tensor", "fsdp", "data"):
        if axis not in over_rows and kv_heads % (ways * mesh.shape[axis]) == 0:
            over_heads, ways = [*over_heads, axis], ways * mesh.shape[axis]
    taken = {*over_rows, *over_heads}
    return Cut(over_rows, tuple(over_heads), tuple(a for a, n in mesh.shape.items() if a not in taken and n > 1))


def cache_shardings(cache: Cache, mesh: Mesh) -> Cache:
    """Where the arrays of a cache lie on a mesh: a cache of NamedShardings. Slots of a sink cache are not cut."""
    cut = cut_of(cache.keys.shape[1], cache.keys.shape[2], mesh)
    spec = P(None, cut.rows, cut.heads) if cache.window else P(None, *cut)
    big, small = NamedSharding(mesh, spec), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: big if x.ndim == 5 else small, cache)


def cache_tables(cache: Cache, t: int) -> tuple[Any, Any]:
    """(cos, sin) for t tokens that follow: as tables_of has them, of a sink cache tuples (see attend_to_cache)."""
    new = cache.lengths[:, None] + jnp.arange(t)[None]
    if not cache.window:
        return _tables(cache, new)
    slots = cache.keys.shape[3]
    rows = jnp.zeros_like(cache.lengths)[:, None]
    # The ring's positions count from `window` tokens before the first new one: angles stay small for ever.
    first = cache.lengths[:, None] - cache.window
    turns = (
        rows + cache.window + jnp.arange(t)[None],
        _in_ring(cache, t) - first,
        jnp.minimum(new, cache.sinks + cache.window - 1),
        rows + jnp.arange(cache.sinks)[None],
    )
    assert slots == turns[1].shape[1]
    cos, sin = zip(*(_tables(cache, positions) for positions in turns), strict=True)
    return cos, sin


def _tables(cache: Cache, positions):
    return tables_of(cache.frequencies, cache.attention_factors, positions)


def _in_ring(cache: Cache, t: int):
    """The position [B, S] of what lies in each slot of the ring once t more tokens are written; < sinks: nothing."""
    ring = cache.keys.shape[3] - cache.sinks
    last = cache.lengths[:, None] + t - 1 - cache.sinks
    slot = jnp.arange(-cache.sinks, ring)[None]
    return jnp.where(slot >= 0, last - (last - slot) % ring, -1) + cache.sinks


def attend_to_cache(q, k, v, cos, sin, cache: Cache, mesh: Mesh | None = None):
    """Writes keys and values of new tokens into the layer whose turn it is and attends to it; the turn goes on.

    q: [B, T, N, H]; k, v: [B, T, K, H], not rotated; cos, sin: of cache_tables. Returns ([B, T, N, H], cache). Scores
    and softmax are float32. Work grows with the longest row, in blocks, and not with the cache's size.
    """
    with jax.named_scope("cache"):
        if cache.window:
            out, cache = _attend_to_few(q, k, v, cos, sin, cache)
        else:
            out, cache = _attend_to_all(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, cache, mesh)
    return out.astype(q.dtype), cache.replace(layer=cache.layer + 1)


def _attend_to_all(q, k, v, cache: Cache, mesh: Mesh | None):
    if mesh is None or mesh.size == 1:
        return _attend_to_share(q, k, v, cache, (), 1, 0)
    cut = cut_of(q.shape[0], k.shape[2], mesh)
    ways = math.prod(mesh.shape[axis] for axis in cut.slots)
    small = cache.replace(keys=None, values=None)

    def local(q, k, v, keys, values, small):
        share = jax.lax.axis_index(cut.slots) if cut.slots else 0
        out, cache = _attend_to_share(q, k, v, small.replace(keys=keys, values=values), cut.slots, ways, share)
        return out, cache.keys, cache.values

    new, held = P(cut.rows, None, cut.heads), P(None, *cut)
    by_row = jax.tree.map(lambda x: P(), small).replace(lengths=P(cut.rows))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(new, new, new, held, held, by_row), out_specs=(new, held, held), check_vma=False
    )
    out, keys, values = run(q, k, v, cache.keys, cache.values, small)
    return out, cache.replace(keys=keys, values=values)


def _attend_to_share(q, k, v, cache: Cache, axes: tuple[str, ...], ways: int, share):
    """On one device: its rows and heads, and of every block its share of the slots, one of so many along axes."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N or K, T, H]
    kv_heads, t = k.shape[1:3]
    here, first, blocks = cache.keys.shape[3], cache.first[cache.layer], cache.blocks[cache.layer]
    size = here * ways
    slots, reach = blocks * size, cache.reach[cache.layer]
    new = cache.lengths[:, None] + jnp.arange(t)[None]
    at = new % slots
    within = at % size - share * here

    # One scatter of rows of H numbers: with heads in its windows, XLA would turn a TPU's cache about, and copy it.
    rows, heads = jnp.arange(q.shape[0])[:, None, None], jnp.arange(kv_heads)[None, :, None]
    block_at = (first + at // size)[:, None]
    slot_at = jnp.where((within >= 0) & (within < here), within, here)[:, None]  # what another device has is dropped

    def write(array, new):
        return array.at[block_at, rows, heads, slot_at].set(new, mode="drop")

    before, cache = cache, cache.replace(keys=write(cache.keys, k), values=write(cache.values, v))
    last = cache.lengths[:, None] + t - 1
    grouped = _by_kv_head(q, kv_heads)
    step = here if t * here <= BLOCK * BLOCK else min(here, BLOCK)
    parts = here // step

    def block(i, sums):
        j, start = i // parts, i % parts * step
        slot = j * size + share * here + start + jnp.arange(step)[None]
        position = (last - (last - slot) % slots)[:, None]  # of what lies in each slot, [B, 1, step]; < 0: nothing
        ahead = new[:, :, None] - position
        keys, values = (_block(x, first + j, start, step) for x in (cache.keys, cache.values))
        seen = (position >= 0) & (ahead >= 0) & (ahead < reach)
        return add_block(sums, _seen_scores(grouped, keys, seen, cache), values)

    def by_blocks():
        longest = (jnp.max(cache.lengths) + t + size - 1) // size
        sums = jax.lax.fori_loop(0, parts * jnp.minimum(longest, blocks), block, nothing(grouped.shape))
        return tuple(x.reshape(*q.shape[:3], *x.shape[4:]) for x in sums)

    rules = Rules(softcap=cache.softcap or 0.0)
    kernel = chunk_kernel(q.shape, q.dtype, kv_heads, here, softcap=rules.softcap)
    piece = functools.partial(sums_of, kernel, q, None, heads_first=True)

    def by_kernel():
        def past(j, sums):
            held = jnp.clip(before.lengths - j * size - share * here, 0, here)
            keys, values = (_block(x, first + j, 0, here) for x in (cache.keys, cache.values))
            return join(sums, piece(Keys(keys, values, count=held), rules._replace(causal=False)))

        pieces = (jnp.max(before.lengths) + size - 1) // size
        acc, top, total = piece(Keys(k, v), rules)
        own = acc, jnp.where(share == 0, top, MASKED), total  # every device has the chunk; it counts once
        return join(jax.lax.fori_loop(0, pieces, past, nothing(q.shape)), own)

    if not kernel:
        sums = by_blocks()
    elif cache.windows:
        sums = jax.lax.cond(reach == NO_LIMIT, by_kernel, by_blocks)
    else:
        sums = by_kernel()
    return divided(join_over(sums, axes))[0].swapaxes(1, 2), cache


def _attend_to_few(q, k, v, cos, sin, cache: Cache):
    t, sinks, slots = q.shape[1], cache.sinks, cache.keys.shape[3]
    new = cache.lengths[:, None] + jnp.arange(t)[None]
    at = jnp.where(new < sinks, new, sinks + (new - sinks) % (slots - sinks))
    rows = jnp.arange(q.shape[0])[:, None]
    cache = cache.replace(
        keys=cache.keys.at[cache.layer, rows, :, at].set(k), values=cache.values.at[cache.layer, rows, :, at].set(v)
    )
    in_ring = _in_ring(cache, t)
    near, far = (_by_kv_head(apply_rope(q, cos[i], sin[i]).swapaxes(1, 2), k.shape[2]) for i in (0, 2))
    sums = nothing(near.shape)
    if sinks:
        keys, values = (x[cache.layer, :, :, :sinks] for x in (cache.keys, cache.values))
        seen = jnp.arange(sinks)[None, None] <= new[:, :, None]
        sums = add_block(sums, _seen_scores(far, _turned(keys, cos[3], sin[3]), seen, cache), values)
    size = min(BLOCK, slots)

    def block(j, sums):
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=1)  # noqa: E731
        position = part(in_ring)[:, None]
        seen = (position >= sinks) & (position <= new[:, :, None]) & (position > new[:, :, None] - cache.window)
        keys = _turned(_block(cache.keys, cache.layer, j * size, size), part(cos[1]), part(sin[1]))
        values = _block(cache.values, cache.layer, j * size, size)
        return add_block(sums, _seen_scores(near, keys, seen, cache), values)

    out, _ = divided(jax.lax.fori_loop(0, slots // size, block, sums))
    return out.reshape(len(q), -1, t, q.shape[3]).swapaxes(1, 2), cache


def _by_kv_head(q, kv_heads: int):
    """[B, N, T, H] as [B, K, N/K, T, H]."""
    return q.reshape(len(q), kv_heads, -1, *q.shape[2:])


def _seen_scores(q, keys, seen, cache: Cache):
    """Scores [B, K, N/K, T, s] of _by_kv_head's queries and keys [B, K, s, H]; seen: [B, T, s]."""
    return jnp.where(seen[:, None, None], scores_of(q, keys, cache.softcap or 0.0), MASKED)


def _turned(keys, cos, sin):
    """apply_rope of keys [B, K, S, H]."""
    return apply_rope(keys.swapaxes(1, 2), cos, sin).swapaxes(1, 2)


def _block(array, block, start, size: int):
    """Slots [start, start + size) of a block, [B, K, size, H]."""
    _, b, kv_heads, _, h = array.shape
    held = jax.lax.dynamic_slice(array, (block, 0, 0, start, 0), (1, b, kv_heads, size, h))[0]
    # Else XLA gives all values the layout that the product of one token's weights likes: a copy of the cache a step.
    return with_layout_constraint(held, Layout(major_to_minor=(0, 1, 2, 3)))
