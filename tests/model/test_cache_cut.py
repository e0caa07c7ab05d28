"""The cache of all tokens, cut over a mesh and read by the fast kernels: what one device and plain blocks give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import tiny_config

from longlora_jax.attention import partial
from longlora_jax.config import MeshConfig
from longlora_jax.model import cache as cache_module
from longlora_jax.model.cache import attend_to_cache, cache_shardings, cut_of, new_cache
from longlora_jax.parallel.sharding import make_mesh
from longlora_jax.plan.collectives import collectives

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
HEADS, H = 8, 6
READS = [(20, 7), (1, 1), (20, 0), (1, 1), (1, 1)]  # tokens of each row in a chunk; what is less is padding


def mesh_of(*axes):
    return make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])


def config_of(kv_heads: int, **options):
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": kv_heads, "head_dim": H, "num_hidden_layers": 2}
    return tiny_config(**sizes | {"max_position_embeddings": 512} | options)


def outputs(config, mesh=None, rows: int = 2, tokens: int = 150):
    """attend_to_cache of both layers for each chunk, [T, N, H] of the tokens that count, of the first row and so on."""
    cache = new_cache(config, rows, tokens, dtype=jnp.float32, chunk=32, mesh=mesh)
    rng = np.random.default_rng(0)
    found = []

    @jax.jit
    def run(cache, layers):
        out = []
        cos, sin = jnp.ones((rows, layers[0][0].shape[1], H // 2)), jnp.zeros((rows, layers[0][0].shape[1], H // 2))
        for q, k, v in layers:
            y, cache = attend_to_cache(q, k, v, cos, sin, cache, mesh)
            out.append(y)
        return out, cache

    for counts in READS:
        counts = np.array(counts[:rows])
        t = counts.max()
        shapes = [(rows, t, heads, H) for heads in (HEADS, config.num_key_value_heads, config.num_key_value_heads)]
        out, cache = run(cache, [[2 * rng.normal(size=s).astype(np.float32) for s in shapes] for _ in range(2)])
        cache = cache.replace(lengths=cache.lengths + counts, layer=jnp.zeros_like(cache.layer))
        found += [np.asarray(y)[row, :count] for y in out for row, count in enumerate(counts)]
    return found


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # values of about 2, sums in another order


WINDOWED = {"sliding_window": 11, "layer_types": ("sliding_attention", "full_attention"), "attn_logit_softcapping": 3.0}


@needs_8
@pytest.mark.parametrize(
    ("axes", "rows", "kv_heads", "options", "slots"),
    [
        ((2, 2, 1, 2), 2, 2, WINDOWED, ("fsdp",)),
        ((1, 1, 4, 2), 1, 2, {}, ("context",)),
        pytest.param((2, 2, 1, 2), 1, 4, {}, ("data",), marks=pytest.mark.slow),
        pytest.param((1, 3, 1, 1), 1, 2, WINDOWED, ("fsdp",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_cut_cache_gives_what_a_whole_one_gives(axes, rows, kv_heads, options, slots, monkeypatch):
    """Catches: a token that two devices write or none, a share that is scored at another's positions, a ring that goes
    round on one device alone, a sum over axes that hold other heads or rows, a cache that somebody holds whole."""
    monkeypatch.setattr(cache_module, "BLOCK", 16)  # several blocks, each of them cut
    config, mesh = config_of(kv_heads, **options), mesh_of(*axes)
    assert cut_of(rows, kv_heads, mesh).slots == slots
    close(outputs(config, mesh, rows=rows), outputs(config, rows=rows))
    keys = new_cache(config, rows, 150, dtype=jnp.float32, chunk=32, mesh=mesh).keys
    assert np.prod(keys.sharding.shard_shape(keys.shape)) * mesh.size == keys.size


@needs_8
@pytest.mark.parametrize("t", [1, 32])
def test_a_step_sends_sums_and_no_keys(t):
    """Catches: a cache that is gathered, or moved about, for a token or a chunk."""
    config, mesh = config_of(2), mesh_of(1, 4, 1, 2)
    cache = new_cache(config, 1, 4000, dtype=jnp.float32, chunk=32, mesh=mesh)
    here = NamedSharding(mesh, P(None, None, "tensor"))
    q, k, v = (jax.ShapeDtypeStruct((1, t, heads, H), jnp.float32, sharding=here) for heads in (HEADS, 2, 2))
    cos = jnp.ones((1, t, H // 2))

    def step(q, k, v, cache):
        y, cache = attend_to_cache(q, k, v, cos, 0 * cos, cache, mesh)
        return y, jax.lax.with_sharding_constraint(cache, cache_shardings(cache, mesh))

    compiled = jax.jit(step, donate_argnums=3, out_shardings=None).lower(q, k, v, cache).compile()
    found = collectives(compiled.as_text(), mesh)
    sums = {one for one in found if one.axis == "fsdp"}
    assert sums and {one.op for one in sums} == {"all-reduce"}
    assert max(one.bytes for one in found) <= HEADS // 2 * t * (H + 1) * 4  # (weighted values, sum of weights)
    share = cache.keys.size * 4 // 8
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * share


def plain_part(q, k, v, segments_q, segments_k, rules):
    """What a kernel finds for a set of keys, with all scores at once."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("bnth,bnsh->bnts", q, k) / q.shape[-1] ** 0.5
    scores = rules.softcap * jnp.tanh(scores / rules.softcap) if rules.softcap else scores
    assert rules.causal == (segments_k is None)
    seen = jnp.tri(q.shape[2], dtype=bool)[None] if rules.causal else segments_q[:, :, None] == segments_k[:, None]
    scores = jnp.where(seen[:, None], scores, -2.4e38)
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, -1)


@needs_8
@pytest.mark.parametrize(
    ("axes", "options"),
    [
        pytest.param(None, WINDOWED, marks=pytest.mark.slow),
        pytest.param((1, 4, 1, 2), {}, marks=pytest.mark.slow),
        ((2, 2, 1, 2), WINDOWED),
    ],
    ids=str,
)
def test_the_kernels_path_gives_what_blocks_give(axes, options, monkeypatch):
    """Catches: a chunk counted on every device, a past that ends at the wrong slot of a share, a window that a kernel
    does not see, rows of other lengths; decode steps beside chunks."""
    monkeypatch.setattr(cache_module, "BLOCK", 16)
    config = config_of(2, **options)
    expected = outputs(config)
    calls = []

    def part(*args):
        calls.append(args)
        return plain_part(*args)

    monkeypatch.setattr(partial, "splash_part", part)
    choose = lambda shape, dtype, kv_heads, keys, *, softcap: "splash" if shape[2] > 1 else ""  # noqa: E731
    monkeypatch.setattr(cache_module, "chunk_kernel", choose)
    mesh = axes and mesh_of(*axes)
    close(outputs(config, mesh), expected)
    assert len(calls) == 2 * 2  # the past and the chunk, of two layers, in the one program that reads chunks
