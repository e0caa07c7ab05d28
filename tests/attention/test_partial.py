"""Attention over several sets of keys is attention over all of them, whichever kernel computes a set."""

import functools
import logging
import re

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import F32, assert_close, mesh_of, run
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from longlora_jax.attention import kernels, partial
from longlora_jax.attention.blockwise import Rules
from longlora_jax.attention.context_parallel import attend_on_mesh
from longlora_jax.attention.kernels import compiled_for
from longlora_jax.attention.partial import Keys, Queries, attend_sets, partial_kernel, slower_in_sets
from longlora_jax.attention.patterns import FULL

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
BF16 = "bfloat16"


def example(seed: int, t: int, near: int, far: int, counts, n: int, k: int, h: int, packed: bool):
    """Arrays (q, k, v, d_out, segments of queries and of keys) over own, near and far keys, and who sees whom.

    Own keys are seen causally; the first counts[0] of the near by all; of the far, seen[i, j] is j < far - i.
    """
    rng = np.random.default_rng(seed)
    q, d_out = (rng.standard_normal((2, t, n, h), np.float32) for _ in range(2))
    keys, values = (rng.standard_normal((2, t + near + far, k, h), np.float32) for _ in range(2))
    of_q = of_k = None
    i, j = np.arange(t)[:, None], np.arange(far)[None]
    seen = [np.tri(t, dtype=bool), np.broadcast_to(np.arange(near) < counts[0], (t, near))]
    seen = np.concatenate([*seen, (j < far - i) & (j < counts[1])], axis=1)[None, None]
    if packed:
        of_q = np.sort(rng.integers(0, 3, (2, t)), axis=1).astype(np.int32)
        of_k = np.concatenate([of_q, rng.integers(0, 3, (2, near + far))], axis=1).astype(np.int32)
        seen = seen & (of_q[:, :, None] == of_k[:, None])[:, None]
    return (q, keys, values, d_out, of_q, of_k), seen


def attend(q, keys, values, of_q, of_k, *, near: int, far: int, counts, softcap: float = 0.0):
    """attend_sets of an example."""
    t = q.shape[1]
    own, nearest, rest = (
        Keys(*(None if x is None else x[:, a:b] for x in (keys, values, of_k)))
        for a, b in ((0, t), (t, t + near), (t + near, t + near + far))
    )
    sets = [
        (own, Queries(), Rules()),
        (nearest._replace(count=jnp.int32(counts[0])), Queries(), Rules(causal=False)),
        (rest._replace(count=jnp.int32(counts[1])), Queries(first=far, turned=True), Rules()),
    ]
    return attend_sets(q, of_q, sets, softcap)


@pytest.fixture
def interpreted(monkeypatch):
    """Splash's programs, on this machine."""
    monkeypatch.setattr(partial, "partial_kernel", lambda *_: "splash")
    for name in ("splash_sums", "splash_gradients"):
        monkeypatch.setattr(partial, name, functools.partial(getattr(partial, name), interpret=True))


CASES = [  # (t, near, far, counts, packed, softcap)
    (150, 100, 70, (100, 70), True, 0.9),
    (130, 1, 130, (0, 5), False, 0.0),
    (8, 200, 8, (137, 0), False, 0.0),
    (70, 66, 3, (66, 3), True, 0.0),
]


def same(case, n, k, h, **tolerance):
    """That the kernel at hand computes a case."""
    t, near, far, counts, packed, softcap = case
    (q, keys, values, d_out, *segments), seen = example(t, t, near, far, counts, n, k, h, packed)
    options = {"near": near, "far": far, "counts": counts, "softcap": softcap}
    ours = run(lambda *x: attend(*x, *segments, **options), q, keys, values, d_out)
    assert_close(ours, brute_force.attention(q, keys, values, seen, d_out, softcap), **tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sets_by_blocks_are_the_whole(case):
    """Catches: padded keys that are seen, queries that see nothing and weigh something, a set that takes its own sums
    for those of all, gradients of turned queries in the order of the keys."""
    same(case, 6, 2, 4, **F32)


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=str)
def test_sets_by_splash_are_the_whole(case, interpreted):
    """Catches, beside those: a scale that is missing from a gradient, lanes of one array in another's place."""
    same(case, 4, 2, 8, rtol=1e-5, atol=3e-5)  # as test_attend.py's, for the same kernel


def test_who_computes_a_set(caplog):
    """Catches: packed rows whose segments cuDNN would not see, a slower kernel in silence, one that lacks gradients."""
    shape = (1, 512, 8, 128)
    kernels.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="longlora_jax"):
        assert partial_kernel(shape, BF16, 2, True) == "blockwise"  # a CPU, which has no other
        with compiled_for("tpu"):
            assert partial_kernel(shape, BF16, 2, True, 30.0) == partial_kernel(shape, "float32", 2, False) == "splash"
        with compiled_for("gpu", "9.0"):
            assert partial_kernel(shape, BF16, 2, False) == "cudnn"
            assert not caplog.records
            assert partial_kernel(shape, BF16, 2, True) == partial_kernel(shape, BF16, 2, True) == "blockwise"
            assert partial_kernel(shape, "float32", 2, False) == "blockwise"
    told = "attention over keys of several devices runs the blockwise XLA kernel: "
    assert [r.message for r in caplog.records] == [
        f"{told}rows are packed",
        f"{told}it takes bfloat16 and float16, not float32",
    ]


@needs_8
def test_packed_rows_keep_their_kernel_on_hopper(monkeypatch):
    """Catches: a ring or a neighbour's keys by blocks of XLA's, seven times slower there than cuDNN's segments."""
    shape = (1, 512, 3, 128)
    for capability, packed, dtype, slower in (
        ("9.0", True, BF16, True),
        ("9.0", False, BF16, False),
        ("8.0", True, BF16, False),  # neither has a fast one
        ("9.0", True, "float32", False),
    ):
        with compiled_for("gpu", capability):
            assert slower_in_sets(shape, dtype, 1, packed) == slower
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda wanted: float(wanted) <= 9.0)
    arrays = [jax.ShapeDtypeStruct((1, 512, heads, 64), BF16) for heads in (3, 1, 1)]
    for packed in (False, True):
        segment_ids = jnp.zeros((1, 512), jnp.int32) if packed else None
        with compiled_for("gpu", "9.0"):
            text = str(
                jax.make_jaxpr(lambda *x, s=segment_ids: attend_on_mesh(*x, FULL, mesh_of(context=2), segment_ids=s))(
                    *arrays
                )
            )
        assert ("all_to_all" in text, "ppermute" in text) == (packed, not packed)


def test_another_jax_is_not_trusted(monkeypatch):
    """Catches: a function of JAX's, not public, that is called with arguments in another order."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    assert partial.splash_fault() == ""
    monkeypatch.setattr(splash_attention_kernel, "_splash_attention_bwd", lambda res, do: None)
    assert "not public" in partial.splash_fault()
    with compiled_for("tpu"):
        assert partial_kernel((1, 512, 8, 128), BF16, 2, False) == "blockwise"
        assert slower_in_sets((1, 512, 8, 128), BF16, 2, False)


def test_what_cudnn_is_asked_for(monkeypatch):
    """Catches: own keys not causal or others' causal, a count that does not arrive, copies of kv heads."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_000)

    def total(q, keys, values):
        with compiled_for("gpu"):
            options = {"near": 33, "far": 16, "counts": (33, 16)}
            return attend(q, keys, values, None, None, **options).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((2, tokens, heads, 64), BF16) for tokens, heads in ((64, 4), (113, 2), (113, 2))]
    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    found = [
        (
            re.search(r"mask_type\\22: \\22(\w+)", line)[1],
            "Backward" in line,
            re.findall(r"tensor<2x(\d+)x[24]x64", line)[:2],
        )
        for line in text.splitlines()
        if "@__cudnn$fmha" in line
    ]
    masks = {"CAUSAL": ["64", "64"], "PADDING": ["64", "34"], "PADDING_CAUSAL": ["16", "16"]}
    assert sorted(found) == sorted((mask, back, sizes) for mask, sizes in masks.items() for back in (False, True))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(
    ("t", "near", "far", "counts", "n", "k", "h"),
    [
        (1024, 512, 512, (512, 512), 8, 8, 128),
        (1000, 77, 1000, (30, 800), 9, 3, 64),
        (501, 2, 33, (0, 0), 4, 1, 80),
    ],
)
def test_sets_by_cudnn_are_the_whole(t, near, far, counts, n, k, h):
    """On a GPU: forward and gradients against float64, as near to it as the blockwise kernel in the same dtype."""
    (*arrays, _, _), seen = example(t, t, near, far, counts, n, k, h, False)
    rounded = [jnp.asarray(x, BF16) for x in arrays]
    exact = [np.asarray(x, np.float32) for x in rounded]
    oracle = brute_force.attention(*exact[:3], seen, exact[3])
    found = {}
    for name in ("cudnn", "blockwise"):
        with pytest.MonkeyPatch.context() as patch:
            assert partial_kernel(rounded[0].shape, BF16, k, False) == "cudnn"
            patch.setattr(partial, "partial_kernel", lambda *_, name=name: name)
            both = functools.partial(attend, of_q=None, of_k=None, near=near, far=far, counts=counts)
            found[name] = run(both, *rounded, options=None)
    for ours, other, right in zip(found["cudnn"], found["blockwise"], oracle, strict=True):
        error, allowed = (np.abs(np.asarray(x, np.float32) - right).max() for x in (ours, other))
        assert error <= 2 * allowed + 1e-3, (error, allowed)
