"""A chunk against what came before it, in parts: any parts together are the attention of the whole."""

import functools
import re

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from longlora_jax.attention import chunk
from longlora_jax.attention.chunk import attend_piece, chunk_kernel, join, nothing
from longlora_jax.attention.kernels import compiled_for

BF16 = jnp.bfloat16


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel's program, on this machine."""
    monkeypatch.setattr(chunk, "splash_piece", functools.partial(chunk.splash_piece, interpret=True))


@pytest.mark.parametrize(("t", "h", "softcap"), [(128, 128, 0.0), (100, 48, 2.0)], ids=str)
def test_parts_by_splash_are_the_whole(t, h, softcap, interpreted):
    """Catches: a row that sees slots which nobody wrote, a chunk that sees its future or not itself, a part that counts
    twice, scores scaled or capped twice, a query head that reads another's keys, padding that is seen."""
    lengths, pieces, size, n, k = (300, 0, 128), 3, 128, 4, 2
    rng = np.random.default_rng(0)
    q, new_k, new_v = (rng.normal(size=(3, heads, t, h)).astype(np.float32) for heads in (n, k, k))
    keys, values = (rng.normal(size=(3, k, pieces * size, h)).astype(np.float32) for _ in range(2))
    piece = jax.jit(functools.partial(attend_piece, "splash", softcap=softcap))
    sums = nothing(q.shape)
    for i in range(pieces):
        counts = jnp.clip(jnp.asarray(lengths) - i * size, 0, size)
        sums = join(sums, piece(q, *(x[:, :, i * size : (i + 1) * size] for x in (keys, values)), counts))
    acc, _, total = join(sums, piece(q, new_k, new_v))
    found = np.asarray(acc / total[..., None]).swapaxes(1, 2)
    for row, before in enumerate(lengths):
        one = [np.concatenate([x[row : row + 1, :, :before], y[row : row + 1]], 2) for x, y in
               ((keys, new_k), (values, new_v))]  # fmt: skip
        padded = np.concatenate([np.zeros((1, n, before, h)), q[row : row + 1]], 2)
        qkv = [x.swapaxes(1, 2) for x in (padded, *one)]
        seen = np.tri(before + t, dtype=bool)[None, None]
        right = brute_force.attention(*qkv, seen, np.zeros_like(qkv[0]), softcap=softcap)[0][0, before:]
        np.testing.assert_allclose(found[row], right, rtol=0, atol=1e-5)  # float32 against float64


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


def test_what_cudnn_is_asked_for(monkeypatch):
    """Catches: the chunk not causal or the past masked, lengths that do not arrive, kv heads copied for each query
    head, a log-sum-exp of bfloat16's three digits."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_000)
    q, k, past = (jax.ShapeDtypeStruct((2, heads, s, 64), BF16) for heads, s in ((4, 128), (2, 128), (2, 512)))

    def both(q, k, v, keys, values, counts):
        return join(attend_piece("cudnn", q, keys, values, counts), attend_piece("cudnn", q, k, v))

    args = (q, k, k, past, past, jax.ShapeDtypeStruct((2,), jnp.int32))
    text = jax.jit(both).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    masks = [re.search(r"mask_type\\22: \\22(\w+)", line)[1] for line in calls]
    assert masks == ["PADDING", "CAUSAL"]
    assert "tensor<2x2x512x64xbf16>" in calls[0] and calls[0].count("tensor<2xi32>") == 2
    assert all("tensor<2x4x128xf32>" in line.rpartition("->")[2] for line in calls)
    assert jax.eval_shape(both, *args)[1].dtype == jnp.float32
