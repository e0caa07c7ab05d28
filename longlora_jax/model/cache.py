"""What attention remembers while a model reads and writes on: keys and values, of all tokens or of a few.

A cache of all tokens holds keys as they are rotated for their positions, in blocks of slots; each layer has a run of
blocks. A layer with full attention has a slot for every position; one with a sliding window has a ring that holds the
window and a chunk. What a row's padding left behind lies in the future of all its tokens until they overwrite it: rows
of any lengths go together.

A sink cache (StreamingLLM, arXiv:2309.17453) holds the first `sinks` tokens and a ring of the last ones. A token sees
the sinks and the last `window` tokens, itself among them, at positions counted within the cache: it stands at
min(p, sinks + window - 1), its neighbours at their true distance from it, the sinks at 0, 1, ... So two tokens are
never further apart than sinks + window - 1, however much was read. This holds for each token of a chunk by itself:
chunks of any size give what single tokens give. Keys are kept unrotated, because their positions move.
(StreamingLLM's code lets a token see `window` tokens and itself.)
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.attention.context_parallel import row_axes
from longlora_jax.attention.kernels import MASKED
from longlora_jax.attention.rope import apply_rope
from longlora_jax.errors import UserError
from longlora_jax.model.layers import frequencies_of, tables_of
from longlora_jax.model_config import ModelConfig

BLOCK = 512  # keys that are scored at once: no array is larger than B * N * T * BLOCK
NO_LIMIT = 2**31 - 1


class Cache(flax.struct.PyTreeNode):
    """Keys and values of all layers, of rows that have read lengths [B] int32 tokens.

    keys, values: [blocks, B, K, slots, H], of a sink cache one block for each layer. first, blocks: [L] int32, the run
    of blocks of each layer; reach: [L] int32, how many tokens it sees, those of its window or all. frequencies: [ropes,
    B, R/2] f32 of the rotary embeddings (model/layers.py) of the tokens to come; layer: whose turn it is.
    sinks, window: of a sink cache, in tokens; window 0 is a cache of all tokens.
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
    sinks: int = flax.struct.field(pytree_node=False)
    window: int = flax.struct.field(pytree_node=False)


def new_cache(
    config: ModelConfig, rows: int, tokens: int, *, dtype, chunk: int, sinks: int = 0, window: int = 0, mesh=None
) -> Cache:
    """An empty cache for rows of up to `tokens` tokens that come in chunks of up to `chunk`.

    With a window it takes any number of tokens. On a mesh rows lie over data and fsdp, heads over tensor and over what
    the rows left of the others.
    """
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
        size = min(BLOCK, _few_sizes(max(needed)))
        counts = [-(-slots // size) for slots in needed]
        reach = [own or NO_LIMIT for own in config.windows]
    shape = (sum(counts), rows, config.num_key_value_heads, size, config.head_dim)
    frequencies, factors = frequencies_of(config, sinks + window if window else 1)

    def empty():
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
            sinks=sinks,
            window=window,
        )

    places = None if mesh is None else cache_shardings(jax.eval_shape(empty), mesh)
    return jax.jit(empty, out_shardings=places)()


def _few_sizes(slots: int) -> int:
    """The least of a few sizes that holds so many slots, so that little is compiled anew."""
    return -(-slots // BLOCK) * BLOCK if slots > BLOCK else 1 << (slots - 1).bit_length()


def cache_shardings(cache: Cache, mesh: Mesh) -> Cache:
    """Where the arrays of a cache lie on a mesh: a cache of NamedShardings."""
    rows, heads = cache.keys.shape[1:3]
    over_rows = row_axes(rows, mesh)
    over_heads, ways = [], 1
    for axis in ("tensor", "fsdp", "data"):
        if axis not in over_rows and heads % (ways * mesh.shape[axis]) == 0:
            over_heads, ways = [*over_heads, axis], ways * mesh.shape[axis]
    big, small = NamedSharding(mesh, P(None, over_rows, tuple(over_heads))), NamedSharding(mesh, P())
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


def attend_to_cache(q, k, v, cos, sin, cache: Cache):
    """Writes keys and values of new tokens into the layer whose turn it is and attends to it; the turn goes on.

    q: [B, T, N, H]; k, v: [B, T, K, H], not rotated; cos, sin: of cache_tables. Returns ([B, T, N, H], cache). Scores
    and softmax are float32. Work grows with the longest row, in blocks of BLOCK, and not with the cache's size.
    """
    with jax.named_scope("cache"):
        out, cache = (_attend_to_few if cache.window else _attend_to_all)(q, k, v, cos, sin, cache)
    return out.astype(q.dtype), cache.replace(layer=cache.layer + 1)


def _attend_to_all(q, k, v, cos, sin, cache: Cache):
    t = q.shape[1]
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    size, first, blocks = cache.keys.shape[3], cache.first[cache.layer], cache.blocks[cache.layer]
    slots, reach = blocks * size, cache.reach[cache.layer]
    new = cache.lengths[:, None] + jnp.arange(t)[None]
    at = new % slots

    def write(array, new):
        one_row = lambda row, new, block, slot: row.at[block, :, slot].set(new)  # noqa: E731
        return jax.vmap(one_row, (1, 0, 0, 0), 1)(array, new, first + at // size, at % size)

    cache = cache.replace(keys=write(cache.keys, k), values=write(cache.values, v))
    last = cache.lengths[:, None] + t - 1
    q = _by_kv_head(q, k.shape[2])

    def block(j, sums):
        slot = j * size + jnp.arange(size)[None]
        position = (last - (last - slot) % slots)[:, None]  # of what lies in each slot, [B, 1, size]; < 0: nothing
        ahead = new[:, :, None] - position
        keys, values = (jax.lax.dynamic_index_in_dim(x, first + j, keepdims=False) for x in (cache.keys, cache.values))
        seen = (position >= 0) & (ahead >= 0) & (ahead < reach)
        return _add(sums, _scores(q, keys, seen, cache.softcap), values)

    longest = (jnp.max(cache.lengths) + t + size - 1) // size
    return _mean(jax.lax.fori_loop(0, jnp.minimum(longest, blocks), block, _nothing(q))), cache


def _attend_to_few(q, k, v, cos, sin, cache: Cache):
    t, sinks, slots = q.shape[1], cache.sinks, cache.keys.shape[3]
    new = cache.lengths[:, None] + jnp.arange(t)[None]
    at = jnp.where(new < sinks, new, sinks + (new - sinks) % (slots - sinks))
    rows = jnp.arange(q.shape[0])[:, None]
    cache = cache.replace(
        keys=cache.keys.at[cache.layer, rows, :, at].set(k), values=cache.values.at[cache.layer, rows, :, at].set(v)
    )
    in_ring = _in_ring(cache, t)
    near, far = (_by_kv_head(apply_rope(q, cos[i], sin[i]), k.shape[2]) for i in (0, 2))
    sums = _nothing(near)
    if sinks:
        keys, values = (x[cache.layer, :, :, :sinks] for x in (cache.keys, cache.values))
        seen = jnp.arange(sinks)[None, None] <= new[:, :, None]
        sums = _add(sums, _scores(far, _turned(keys, cos[3], sin[3]), seen, cache.softcap), values)
    size = min(BLOCK, slots)

    def block(j, sums):
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=1)  # noqa: E731
        position = part(in_ring)[:, None]
        seen = (position >= sinks) & (position <= new[:, :, None]) & (position > new[:, :, None] - cache.window)
        keys = _turned(_block(cache.keys, cache.layer, j, size), part(cos[1]), part(sin[1]))
        values = _block(cache.values, cache.layer, j, size)
        return _add(sums, _scores(near, keys, seen, cache.softcap), values)

    return _mean(jax.lax.fori_loop(0, slots // size, block, sums)), cache


def _by_kv_head(q, kv_heads: int):
    """[B, T, N, H] as [B, K, N/K, T, H]."""
    b, t, n, h = q.shape
    return q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def _turned(keys, cos, sin):
    """apply_rope of keys [B, K, S, H]."""
    return apply_rope(keys.swapaxes(1, 2), cos, sin).swapaxes(1, 2)


def _block(array, layer, j, size: int):
    """Slots [j * size, (j + 1) * size) of a layer, [B, K, size, H]."""
    _, b, kv_heads, _, h = array.shape
    return jax.lax.dynamic_slice(array, (layer, 0, 0, j * size, 0), (1, b, kv_heads, size, h))[0]


def _scores(q, keys, seen, softcap: float | None):
    """Scaled scores [B, K, R, T, s] in float32; seen: [B, T, s]."""
    scores = jnp.einsum("bkrth,bksh->bkrts", q, keys, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    return jnp.where(seen[:, None, None], scores, MASKED)


# A softmax that is summed up block by block: (weighted values, largest score, sum of weights).


def _nothing(q):
    rows = q.shape[:-1]
    return jnp.zeros(q.shape, jnp.float32), jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)


def _add(sums, scores, values):
    acc, top, total = sums
    new_top = jnp.maximum(top, scores.max(-1))
    # Where nothing was seen yet all weights are one: the first score that counts makes them vanish.
    weights, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
    new = jnp.einsum("bkrts,bksh->bkrth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return acc * decay[..., None] + new, new_top, total * decay + weights.sum(-1)


def _mean(sums):
    """[B, T, N, H] of what was summed up."""
    acc, _, total = sums
    out = acc / total[..., None]
    b, kv_heads, rep, t, h = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, kv_heads * rep, h)
