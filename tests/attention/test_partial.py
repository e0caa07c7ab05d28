"""Attention over several sets of keys is attention over all of them, whichever kernel computes a set.

So it is of shards in training, with gradients, and of a chunk of a prompt with what came before it.
"""

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
from longlora_jax.attention.blockwise import Rules, divided, nothing
from longlora_jax.attention.context_parallel import attend_on_mesh
from longlora_jax.attention.kernels import compiled_for
from longlora_jax.attention.partial import (
    Keys,
    Queries,
    attend_sets,
    chunk_kernel,
    join,
    partial_kernel,
    slower_in_sets,
    sums_of,
)
from longlora_jax.attention.patterns import FULL

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
BF16 = "bfloat16"


def example(seed: int, t: int, near: int, far: int, counts, n: int, k: int, h: int, packed: bool):
    """Arrays (q, k, v, d_out, segments of queries and of keys) over own, near and far keys, and who sees whom.

    Own keys are seen causally; the first counts[0] of the near by all; of the far, seen[i, j] is j < far - i. A count
    is one for both rows or one for each.
    """
    rng = np.random.default_rng(seed)
    q, d_out = (rng.standard_normal((2, t, n, h), np.float32) for _ in range(2))
    keys, values = (rng.standard_normal((2, t + near + far, k, h), np.float32) for _ in range(2))
    of_q = of_k = None
    i, j = np.arange(t)[:, None], np.arange(far)[None]
    of_near, of_far = (np.broadcast_to(count, 2)[:, None, None] for count in counts)
    seen = [np.tri(t, dtype=bool), np.arange(near)[None, None] < of_near, (j < far - i) & (j < of_far)]
    seen = np.concatenate([np.broadcast_to(x, (2, t, x.shape[-1])) for x in seen], axis=2)[:, None]
    if packed:
        of_q = np.sort(rng.integers(0, 3, (2, t)), axis=1).astype(np.int32)
        of_k = np.concatenate([of_q, rng.integers(0, 3, (2, near + far))], axis=1).astype(np.int32)
        seen = seen & (of_q[:, :, None] == of_k[:, None])[:, None]
    return (q, keys, values, d_out, of_q, of_k), seen


def attend(q, keys, values, of_q, of_k, *, near: int, far: int, counts, softcap: float = 0.0):
    """attend_sets of an example."""
    t = q.shape[1]
    of_near, of_far = (jnp.broadcast_to(jnp.int32(count), 2) for count in counts)
    own, nearest, rest = (
        Keys(*(None if x is None else x[:, a:b] for x in (keys, values, of_k)))
        for a, b in ((0, t), (t, t + near), (t + near, t + near + far))
    )
    sets = [
        (own, Queries(), Rules()),
        (nearest._replace(count=of_near), Queries(), Rules(causal=False)),
        (rest._replace(count=of_far), Queries(first=far, turned=True), Rules()),
    ]
    return attend_sets(q, of_q, sets, softcap)


@pytest.fixture
def interpreted(monkeypatch):
    """Splash's programs, on this machine."""
    monkeypatch.setattr(partial, "partial_kernel", lambda *_: "splash")
    for name in ("splash_part", "splash_gradients"):
        monkeypatch.setattr(partial, name, functools.partial(getattr(partial, name), interpret=True))


CASES = [  # (t, near, far, counts, packed, softcap)
    (150, 100, 70, ((100, 31), 70), True, 0.9),
    (130, 1, 130, (0, (5, 0)), False, 0.0),
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
    for those of all, gradients of turned queries in the order of the keys, a count of another row."""
    same(case, 6, 2, 4, **F32)


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=str)
def test_sets_by_splash_are_the_whole(case, interpreted):
    """Catches, beside those: a scale that is missing from a gradient, lanes of one array in another's place."""
    same(case, 4, 2, 8, rtol=1e-5, atol=3e-5)  # as test_attend.py's, for the same kernel


@pytest.mark.parametrize(("t", "h", "softcap"), [(128, 128, 0.0), (100, 48, 2.0)], ids=str)
def test_a_chunk_by_splash_is_the_whole(t, h, softcap, interpreted):
    """Catches: a row that sees slots which nobody wrote, a chunk that sees its future or not itself, a part that counts
    twice, scores scaled or capped twice, a query head that reads another's keys, padding that is seen."""
    lengths, pieces, size, n, k = (300, 0, 128), 3, 128, 4, 2
    rng = np.random.default_rng(0)
    q, new_k, new_v = (rng.normal(size=(3, heads, t, h)).astype(np.float32) for heads in (n, k, k))
    keys, values = (rng.normal(size=(3, k, pieces * size, h)).astype(np.float32) for _ in range(2))
    own, past = Rules(softcap=softcap), Rules(causal=False, softcap=softcap)
    piece = jax.jit(functools.partial(sums_of, "splash", heads_first=True), static_argnums=3)
    sums = nothing(q.shape)
    for i in range(pieces):
        counts = jnp.clip(jnp.asarray(lengths) - i * size, 0, size)
        held = Keys(*(x[:, :, i * size : (i + 1) * size] for x in (keys, values)), count=counts)
        sums = join(sums, piece(q, None, held, past))
    found = np.asarray(divided(join(sums, piece(q, None, Keys(new_k, new_v), own)))[0]).swapaxes(1, 2)
    for row, before in enumerate(lengths):
        one = [np.concatenate([x[row : row + 1, :, :before], y[row : row + 1]], 2) for x, y in
               ((keys, new_k), (values, new_v))]  # fmt: skip
        padded = np.concatenate([np.zeros((1, n, before, h)), q[row : row + 1]], 2)
        qkv = [x.swapaxes(1, 2) for x in (padded, *one)]
        seen = np.tri(before + t, dtype=bool)[None, None]
        right = brute_force.attention(*qkv, seen, np.zeros_like(qkv[0]), softcap=softcap)[0][0, before:]
        np.testing.assert_allclose(found[row], right, rtol=0, atol=1e-5)  # float32 against float64


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


def test_who_computes_a_chunk():
    """Catches: a kernel that is given what it does not take, one token that pays for a block of 128."""
    shape = (1, 8, 512, 128)
    assert chunk_kernel(shape, BF16, 2, 8192) == ""  # a CPU
    with compiled_for("tpu"):
        assert chunk_kernel(shape, BF16, 2, 8192) == chunk_kernel(shape, jnp.float32, 2, 512, softcap=30.0) == "splash"
        assert chunk_kernel((1, 8, 1, 128), BF16, 2, 8192) == chunk_kernel(shape, BF16, 2, 64) == ""
    with compiled_for("gpu"):
        assert chunk_kernel(shape, BF16, 2, 8192) == "cudnn"
        assert chunk_kernel(shape, jnp.float32, 2, 8192) == chunk_kernel(shape, BF16, 2, 8192, softcap=30.0) == ""


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


def test_what_cudnn_is_asked_for_a_chunk(monkeypatch):
    """Catches: the chunk not causal or the past masked, lengths that do not arrive, kv heads copied for each query
    head, a log-sum-exp of bfloat16's three digits."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_000)
    q, k, past = (jax.ShapeDtypeStruct((2, heads, s, 64), BF16) for heads, s in ((4, 128), (2, 128), (2, 512)))

    def both(q, k, v, keys, values, counts):
        sets = (Keys(keys, values, count=counts), Rules(causal=False)), (Keys(k, v), Rules())
        return join(*(sums_of("cudnn", q, None, *one, heads_first=True) for one in sets))

    args = (q, k, k, past, past, jax.ShapeDtypeStruct((2,), jnp.int32))
    text = jax.jit(both).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    masks = [re.search(r"mask_type\\22: \\22(\w+)", line)[1] for line in calls]
    assert masks == ["PADDING", "CAUSAL"]
    assert "tensor<2x2x512x64xbf16>" in calls[0] and calls[0].count("tensor<2xi32>") == 2
    assert all("tensor<2x4x128xf32>" in line.rpartition("->")[2] for line in calls)
    assert jax.eval_shape(both, *args)[1].dtype == jnp.float32


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(
    ("t", "near", "far", "counts", "n", "k", "h"),
    [
        (1024, 512, 512, (512, 512), 8, 8, 128),
        (1000, 77, 1000, (30, 800), 9, 3, 64),
        (501, 2, 33, (0, 0), 4, 1, 80),
        (512, 300, 200, ((300, 7), (0, 150)), 4, 2, 64),
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
