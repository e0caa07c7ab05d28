"""The kernel of CPUs, strips of scores, against brute force; longer rows and windows run the blocks of blockwise.py."""

import brute_force
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import assert_close, random_qkv, random_segments, run, same_segment

from longlora_jax.attention import strips
from longlora_jax.attention.kernels import blockwise_attention, causal_attention
from longlora_jax.attention.strips import strip_attention, strip_side


@pytest.mark.parametrize(
    ("t", "side", "n", "kv_heads", "softcap", "packed", "scores"),
    [
        (24, 8, 4, 4, 0.0, False, 8 * 24 * 2),  # two heads at a time
        (23, 4, 6, 2, 0.0, True, 10**6),  # all heads of a row, which share kv heads; a rest
        (31, 8, 3, 3, 0.7, False, 8 * 32 * 2),  # three heads, of which two do not go together
        (16, 4, 6, 2, 0.7, True, 1),  # one after the other
        (9, 16, 5, 1, 0.0, True, 10**6),  # one strip, longer than the row
        (5, 1, 2, 1, 0.0, False, 1),
    ],
)
def test_strips(monkeypatch, t, side, n, kv_heads, softcap, packed, scores):
    """Catches: a strip that ends too soon or sees ahead, another head's or row's keys, a cap without its derivative."""
    monkeypatch.setattr(strips, "SCORES", scores)
    qkv = random_qkv(t, 2, t, n, kv_heads, 6)
    segments = random_segments(t, 2, t) if packed else None
    ours = run(lambda *x: strip_attention(*x, side, segments, softcap=softcap), *qkv)
    seen = np.tri(t, dtype=bool)[None, None] & same_segment(segments)
    assert_close(ours, brute_force.attention(*qkv[:3], seen, qkv[3], softcap))


@pytest.mark.parametrize("packed", [False, True])
def test_strips_of_its_own_choice(packed):
    """The kernel as it is used, fully optimized: three strips, the last one not full, two heads of four at a time."""
    t = 400
    qkv = random_qkv(t, 2, t, 8, 4, 8)
    segments = random_segments(t, 2, t) if packed else None
    ours = run(lambda *x: causal_attention(*x, segments), *qkv, options=None)
    seen = np.tri(t, dtype=bool)[None, None] & same_segment(segments)
    assert_close(ours, brute_force.attention(*qkv[:3], seen, qkv[3]))


def test_strip_side():
    """Catches: rows that are filled up by a quarter, a strip of thousands of tokens, dozens of strips to compile."""
    for t in range(1, 4097):
        side = strip_side(t)
        assert side <= 512 and -(-t // side) <= strips.MOST
        assert -(-t // side) * side - t <= t // 8 + 15 if t >= 128 else side == t
    assert strip_side(4097) is None
    assert [strip_side(t) for t in (512, 1024, 2048, 4096)] == [128, 256, 512, 512]


@pytest.mark.parametrize(
    ("t", "window", "in_strips"), [(48, 0, True), (48, 48, True), (48, 16, False), (6000, 0, False)]
)
def test_which_rows_run_strips(monkeypatch, t, window, in_strips):
    """Catches: a window that strips would not see, a long row whose scores would fill the memory."""
    ran = []
    for name in ("strip_attention", "blockwise_attention"):
        monkeypatch.setattr(f"longlora_jax.attention.kernels.{name}", lambda q, *_, name=name, **__: ran.append(name))
    x = jnp.zeros((1, t, 1, 4))
    causal_attention(x, x, x, window=window)
    assert ran == ["strip_attention" if in_strips else "blockwise_attention"]


def test_a_long_row_computes_the_same_in_blocks():
    """Catches: a bound between the two kernels across which results differ."""
    qkv = random_qkv(1, 1, 300, 2, 1, 8)
    ours = run(lambda *x: strip_attention(*x, 128), *qkv)
    assert_close(ours, run(blockwise_attention, *qkv))
