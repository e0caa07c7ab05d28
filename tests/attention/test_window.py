"""Sliding windows and capped scores, in every kernel and over a mesh, against brute force."""

import re

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import assert_close, mesh_of, random_qkv, random_segments, run
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from longlora_jax.attention.attend import attend
from longlora_jax.attention.context_parallel import HEADS, NEIGHBOUR, NOTHING, attend_on_mesh, exchange
from longlora_jax.attention.kernels import (
    blockwise_attention,
    causal_attention,
    causal_mask,
    compiled_for,
    gpu_fault,
    splash_attention,
)
from longlora_jax.attention.patterns import Pattern, allowed

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")


def seen_in(window: int, t: int, segments=None):
    """Who sees whom, pair by pair: booleans that broadcast to [B, N, T, T]; 0: a row without a window."""
    seen = brute_force.mask("window", window or t, heads=1, t=t)[None]
    return seen if segments is None else seen & (segments[:, None, :, None] == segments[:, None, None, :])


@pytest.mark.parametrize(
    ("window", "softcap", "t", "packed"),  # blocks of 4 tokens
    [
        (1, 0.0, 11, False),
        (2, 0.7, 16, True),
        (4, 0.0, 23, True),
        (5, 0.0, 16, False),
        (6, 0.0, 23, False),
        (8, 0.7, 23, False),
        (8, 0.7, 16, True),
        (40, 0.0, 11, False),
        (0, 0.7, 11, False),
        (0, 0.7, 16, True),
    ],
)
def test_blockwise(window, softcap, t, packed):
    """Catches: a block of the window's edge that is left out or wholly seen, a cap without its derivative."""
    qkv = random_qkv(window, 2, t, 4, 2, 6)
    segments = random_segments(t, 2, t) if packed else None
    ours = run(lambda *x: blockwise_attention(*x, segments, window=window, softcap=softcap, block=4), *qkv)
    assert_close(ours, brute_force.attention(*qkv[:3], seen_in(window, t, segments), qkv[3], softcap))


def test_blocks_of_its_own_choice():
    """Catches: blocks that fit the row where they should fit the window, whose bounds then are another's."""
    t, window = 260, 70
    qkv = random_qkv(0, 1, t, 2, 1, 4)
    ours = run(lambda *x: blockwise_attention(*x, window=window, softcap=2.0), *qkv, options=None)
    assert_close(ours, brute_force.attention(*qkv[:3], seen_in(window, t), qkv[3], 2.0))


@pytest.mark.parametrize(
    ("t", "window", "softcap", "packed"),
    [(200, 1, 0.0, False), (300, 130, 1.5, False), (300, 129, 1.5, True)],
)
def test_splash(t, window, softcap, packed):
    """Catches: one token too many to the left, a cap after the mask, queries that see a padded block alone."""
    qkv = random_qkv(t, 1, t, 2, 1, 8)
    segments = jnp.asarray(random_segments(t, 1, t)) if packed else None
    options = {"window": window, "softcap": softcap, "interpret": True}
    ours = run(lambda *x: splash_attention(*x, segments, **options), *qkv, options=None)
    oracle = brute_force.attention(*qkv[:3], seen_in(window, t, segments), qkv[3], softcap)
    assert_close(ours, oracle, rtol=1e-5, atol=3e-5)  # as without a window: see test_attend.py


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 200, 256, 257, 512, 1000])
def test_the_quick_mask_of_a_window_is_splashs_own(window, block):
    """Catches: a block at the window's edge that is taken for full or empty, and with it what the kernel visits."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    ours, theirs = causal_mask(1024, window), splash.LocalMask((1024, 1024), (window - 1, 0), 0)
    for q in range(0, 1024, block):
        for k in range(0, 1024, block):
            index = slice(q, q + block), slice(k, k + block)
            quick, slow = ours[index], theirs[index]
            assert (quick.any(), quick.all()) == (slow.any(), slow.all())
            assert quick.size == 1 or np.array_equal(quick, slow)


def test_a_long_row_is_masked_without_its_pairs():
    """Catches: a mask of 262,144 x 262,144, or as many bools read block by block: gigabytes and minutes."""
    t, block = 2**18, 1024
    mask = causal_mask(t, 4096)
    answers = [
        mask[slice(q, q + block), slice(k, k + block)]
        for q in range(0, t, 64 * block)  # four rows of blocks
        for k in range(0, t, block)
    ]
    pairs = [id(x) for x in answers if x.size > 1]
    # On the diagonal and, but for the first row, on the window's edge; made once.
    assert len(pairs) == 4 + 3 and len(set(pairs)) == 2


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks the library for its version before it traces a call of it: here there is no library."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_000)


def lowered_for_a_gpu(t: int, h: int = 64, **options) -> str:
    """The program of causal_attention's gradients for NVIDIA's GPUs."""

    def total(q, k, v):
        with compiled_for("gpu"):
            return causal_attention(q, k, v, **options).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((2, t, heads, h), "bfloat16") for heads in (4, 2, 2)]
    return jax.jit(jax.grad(total)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("t", "window", "length"), [(64, 16, 16), (63, 1, 1), (64, 64, 0), (64, 0, 0)])
def test_cudnn_has_windows_itself(cudnn, t, window, length):
    """Catches: JAX's count without the query's own token taken for cuDNN's with it, a backward pass that sees all."""
    text = lowered_for_a_gpu(t, window=window)
    assert re.findall(r"sliding_window_length\\22: (\d+)", text) == [str(length)] * 2
    assert text.count("@__cudnn$") == 2 and text.count(r"\22mask_type\22: \22CAUSAL\22") == 2


def test_cudnn_does_not_cap_scores(cudnn):
    """Catches: Gemma 2's cap dropped in silence on a GPU."""
    assert "@__cudnn$" not in lowered_for_a_gpu(64, softcap=50.0)
    assert "capped" in gpu_fault((1, 64, 4, 64), "bfloat16", 2, False, softcap=50.0, capability="9.0")


@pytest.mark.parametrize(
    ("name", "full_below"), [("full", 0), ("window", 0), ("s2", 0), ("s2_swap", 0), ("short", 3), ("dilated", 0)]
)
def test_every_pattern_caps_scores(name, full_below):
    """Catches: a piece, a short segment or an ablation whose scores stay as they are."""
    t, n = 12, 4
    pattern = Pattern(name, 0 if name == "full" else 4, full_below, softcap=0.8)
    qkv, segments = random_qkv(3, 1, t, n, 2, 4), np.repeat([1, 2, 3], [3, 6, 3])
    heads, index = np.arange(n)[:, None, None], np.arange(t)
    seen = allowed(pattern, heads, index[:, None], index, num_heads=n, seq_len=t, segment_ids=segments)[None]
    ours = run(lambda *x: attend(*x, pattern, segment_ids=jnp.asarray(segments[None])), *qkv)
    assert_close(ours, brute_force.attention(*qkv[:3], seen, qkv[3], 0.8))


def test_far_tokens_are_never_read():
    """Catches: scores computed and then masked: what is not a number far away would come through the sums."""
    q, k, v, d_out = random_qkv(0, 1, 64, 2, 1, 4)
    k[:, :32] = v[:, :32] = np.nan  # queries 40 to 47 are a block, of which the first sees 32
    q[:, :40] = d_out[:, :40] = np.nan
    found = run(lambda *x: blockwise_attention(*x, window=9, block=8), q, k, v, d_out)
    assert all(np.isfinite(x[:, 40:]).all() and np.isnan(x[:, :32]).all() for x in found)


@pytest.mark.parametrize(
    ("window", "context", "how"),
    [(1, 4, NOTHING), (9, 1, NOTHING), (2, 4, NEIGHBOUR), (25, 4, NEIGHBOUR), (26, 4, HEADS), (32, 4, HEADS)],
)
def test_what_a_window_exchanges(window, context, how):
    """Catches: neighbours asked for more than is before the last of 4 shards of 8 tokens."""
    assert exchange(Pattern("window", window), 32, 4, 2, context) == how


CASES = {  # name: (W, mesh, (B, T, N, K), packed)
    "less than a shard": (5, {"context": 4}, (1, 32, 4, 2), False),
    "less than a shard, packed": (5, {"context": 4}, (1, 32, 4, 2), True),
    "a shard and itself": (5, {"context": 4}, (1, 16, 4, 2), False),
    "a token of the next but one": (6, {"context": 4}, (1, 16, 2, 1), False),
    "a token of the next but one, packed": (6, {"context": 4}, (1, 16, 2, 1), True),
    "shards of one token": (4, {"context": 8}, (1, 8, 2, 1), False),
    "all shards before the last": (25, {"context": 4}, (1, 32, 3, 1), False),
    "all shards before the last, packed": (25, {"context": 4}, (1, 32, 3, 1), True),
    "more than are before the last": (26, {"context": 4}, (1, 32, 4, 4), False),
    "itself alone": (1, {"context": 2}, (1, 8, 2, 2), False),
    "everything, packed": (7, {"fsdp": 2, "context": 2, "tensor": 2}, (2, 32, 8, 4), True),
}


# Some of them: each is compiled anew.
QUICK = ("a token of the next but one", "itself alone")
QUICK += ("all shards before the last, packed", "more than are before the last", "everything, packed")


@needs_8
@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CASES])
def test_a_mesh_has_the_window_of_one_device(name):
    """Catches: a token of the neighbour too many or too few, shards in disorder, zeros seen before the row begins."""
    window, axes, (b, t, n, k), packed = CASES[name]
    pattern = Pattern("window", window, softcap=0.9)
    arrays = random_qkv(0, b, t, n, k, 4)
    segments = random_segments(1, b, t) if packed else None
    ours = run(lambda *x: attend_on_mesh(*x, pattern, mesh_of(**axes), segment_ids=segments), *arrays)
    assert_close(ours, brute_force.attention(*arrays[:3], seen_in(window, t, segments), arrays[3], 0.9))
