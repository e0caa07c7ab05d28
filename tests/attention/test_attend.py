"""attend() against the brute-force predicate: values, gradients, causality, and the work that is really done."""

import functools
import math
from unittest import mock

import brute_force
import jax
import jax.numpy as jnp
import jaxpr_arrays
import numpy as np
import pytest
from arrays import F32, QUICK, assert_close, random_qkv, random_segments, run, same_segment
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longlora_jax.attention import attend as attend_module
from longlora_jax.attention import blockwise
from longlora_jax.attention.attend import attend
from longlora_jax.attention.kernels import blockwise_attention, compiled_for, kernel_name, splash_attention
from longlora_jax.attention.patterns import FULL, GROUPED, PATTERNS, Pattern
from longlora_jax.attention.strips import strip_attention, strip_side


def pattern_of(name, g):
    return FULL if name == "full" else Pattern(name, g)


def with_blocks(block):
    """attend() with a kernel that cuts rows into blocks of so many tokens, as it would only do from 64 on."""
    return mock.patch.object(attend_module, "causal_attention", functools.partial(blockwise_attention, block=block))


# What the others are made of is here; their reach is compared bit by bit below.
QUICK_PATTERNS = ("full", "s2", "window")


MOSTLY_QUICK = [pytest.param(name, marks=() if name in QUICK_PATTERNS else pytest.mark.slow) for name in PATTERNS]


@pytest.mark.parametrize("name", MOSTLY_QUICK)
@settings(max_examples=1)
@given(
    g=st.integers(2, 14),
    t=st.integers(1, 40),
    kv_heads=st.integers(1, 3),
    rep=st.integers(1, 4),
    b=st.integers(1, 3),
    packed=st.booleans(),
    block=st.sampled_from([None, 3, 4, 8]),
    seed=st.integers(0, 99),
)
@example(g=8, t=32, kv_heads=2, rep=2, b=2, packed=False, block=None, seed=0)  # what a config gives
@example(g=6, t=40, kv_heads=1, rep=5, b=1, packed=True, block=4, seed=1)  # MQA, odd N: the cut is in the kv group
@example(g=7, t=31, kv_heads=3, rep=2, b=2, packed=True, block=3, seed=2)  # odd K, odd G, a rest
@example(g=14, t=5, kv_heads=1, rep=2, b=1, packed=False, block=4, seed=3)  # a row shorter than half a group
@example(g=2, t=1, kv_heads=1, rep=1, b=1, packed=True, block=None, seed=4)  # one token, one head
def test_attend_is_the_predicate(name, g, t, kv_heads, rep, b, packed, block, seed):
    """Any wrong boundary, fold, head cut, padding, segment or block, in values or in gradients."""
    n = kv_heads * rep
    qkv = random_qkv(seed, b, t, n, kv_heads, 4)
    segments = random_segments(seed, b, t) if packed else None
    with with_blocks(block):
        ours = run(lambda *qkv: attend(*qkv, pattern_of(name, g), segment_ids=segments), *qkv)
    seen = brute_force.mask(name, g, heads=n, t=t)[None] & same_segment(segments)
    assert_close(ours, brute_force.attention(*qkv[:3], seen, qkv[3]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("t", "block"), [(130, None), (200, 48)])
def test_kernel_in_blocks_of_its_own_choice(t, block, packed):
    """The kernel as it is used, fully optimized: default blocks, a block that does not divide the row."""
    qkv = random_qkv(t, 2, t, 4, 2, 8)
    segments = random_segments(t, 2, t) if packed else None
    ours = run(lambda *qkv: blockwise_attention(*qkv, segments, block=block), *qkv, options=None)
    seen = np.tri(t, dtype=bool)[None, None] & same_segment(segments)
    assert_close(ours, brute_force.attention(*qkv[:3], seen, qkv[3]))


@pytest.mark.parametrize(
    ("t", "n", "k", "h", "packed"),
    [
        (200, 4, 2, 8, True),
        (300, 2, 2, 130, False),
        pytest.param(200, 4, 2, 8, False, marks=pytest.mark.slow),
        pytest.param(300, 2, 2, 130, True, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_of_tpus_computes_the_same(t, n, k, h, packed):
    """Splash attention, interpreted: padding of rows and lanes that is seen, a scale that is forgotten, kv heads."""
    qkv = random_qkv(t, 2, t, n, k, h)
    segments = jnp.asarray(random_segments(t, 2, t)) if packed else None
    ours = run(lambda *qkv: splash_attention(*qkv, segments, interpret=True), *qkv, options=None)
    seen = np.tri(t, dtype=bool)[None, None] & same_segment(segments)
    # The kernel's own exponentials and its blocks' order: errors of some 1e-6 at values of up to 10.
    assert_close(ours, brute_force.attention(*qkv[:3], seen, qkv[3]), rtol=1e-5, atol=3e-5)


def test_the_platform_chooses_the_kernel():
    """Catches: a planner on a laptop that plans for the laptop's kernel."""
    assert kernel_name() == "xla-strips on cpu"
    with compiled_for("tpu"):
        assert kernel_name() == "splash on tpu"
    assert kernel_name() == "xla-strips on cpu"
    assert kernel_name(tokens=4096) == "xla-strips on cpu" and kernel_name(tokens=4097) == "xla-blockwise on cpu"


@pytest.mark.parametrize(
    "kernel",
    [functools.partial(blockwise_attention, block=4), functools.partial(strip_attention, side=8)],
    ids=["blocks", "strips"],
)
def test_large_scores_do_not_overflow(kernel):
    """exp() of a score before the row's maximum is taken off: 88 is enough for inf in float32."""
    q, k, v, d_out = random_qkv(0, 1, 24, 2, 2, 4)
    q *= 300
    ours = run(kernel, q, k, v, d_out)
    oracle = brute_force.attention(q, k, v, np.tri(24, dtype=bool), d_out)
    # A score of 1,000 has an error of 6e-5 in float32, and its exponential the same relative one.
    assert_close(ours, oracle, rtol=1e-3, atol=1e-3 * float(np.abs(oracle[2]).max()))


@pytest.mark.parametrize("name", ("full", *GROUPED, "dilated"))
def test_bfloat16(name):
    """A softmax or a sum in bfloat16: over 128 keys such errors add up to several percent."""
    t, g = 128, 32
    q, k, v, d_out = random_qkv(5, 1, t, 4, 2, 8)
    # Scores up to 40: rounded to bfloat16 their exponentials would be off by up to 13%.
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in (8 * q, k, v, d_out)]
    ours = run(lambda *qkv: attend(*qkv, pattern_of(name, g)), *qkv)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    oracle = brute_force.attention(*qkv[:3], brute_force.mask(name, g, heads=4, t=t)[None], qkv[3])
    # The same rounded inputs. Weights, their gradients and results keep 2^-9 of their value: 2^-7 of the largest is
    # what comes out, and three times that with scores in bfloat16.
    for x, y in zip(ours, oracle, strict=True):
        assert np.abs(np.asarray(x, np.float64) - y).max() < 2**-6 * np.abs(y).max()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("t", "g"), [(24, 8), (23, 6)])
def test_a_changed_token_reaches_those_who_may_see_it_and_nobody_else(name, t, g):
    """A future leak, or a token that its readers lost. Only s2_wrap shows the future: there the leak is expected."""
    n = 4
    q, k, v, _ = random_qkv(1, 1, t, n, 2, 4)
    changed = [np.repeat(x, t, axis=0) for x in (q, k, v)]  # row j: token j is another one
    for x, seed in zip(changed, range(3), strict=True):
        x[np.arange(t), np.arange(t)] += np.random.default_rng(seed).standard_normal(x.shape[2:])
    function = jax.jit(lambda *qkv: attend(*qkv, pattern_of(name, g)), compiler_options=QUICK)
    with with_blocks(4):
        before, after = function(*(np.repeat(x, t, axis=0) for x in (q, k, v))), function(*changed)
    moved = (np.asarray(before) != np.asarray(after)).any(-1)  # [j, i, head], bitwise
    seen = brute_force.mask(name, g, heads=n, t=t).transpose(2, 1, 0)
    seen = seen | np.eye(t, dtype=bool)[:, :, None] & seen.any(0)[None]  # its own query changed as well
    np.testing.assert_array_equal(moved, seen)
    future = np.tri(t, k=-1, dtype=bool)[:, :, None] & moved
    leak = np.zeros_like(future)
    if name == "s2_wrap":
        leak = np.tri(t, k=-1, dtype=bool)[:, :, None] & seen
        assert leak.any() and not leak[:, g // 2 :].any() and not leak[..., : n // 2].any()
    np.testing.assert_array_equal(future, leak)


@pytest.mark.parametrize("shift", [4, -4])
def test_rolling_by_plus_or_minus_half_a_group_is_the_same_function(shift):
    """The paper's variant 1: a shift the other way. Also that the shift back undoes the shift."""
    b, t, g = 2, 32, 8
    q, k, v, _ = random_qkv(2, b, t, 4, 4, 4)
    rolled = [np.roll(x, shift, axis=1) for x in (q, k, v)]
    tail_apart = np.roll(np.repeat((np.arange(t) >= g // 2)[None], b, 0), shift, axis=1).astype(np.int32)
    compiled = jax.jit(attend, static_argnums=3, compiler_options=QUICK)
    for name, segments in (("s2_wrap", None), ("s2", tail_apart)):
        by_hand = np.roll(compiled(*rolled, Pattern("short", g), segment_ids=segments), -shift, axis=1)
        ours = compiled(q, k, v, Pattern(name, g))
        np.testing.assert_allclose(ours[:, :, 2:], by_hand[:, :, 2:], err_msg=name, **F32)


@pytest.mark.parametrize("name", MOSTLY_QUICK)
def test_padding_and_lonely_tokens_give_no_nan(name):
    """A query that sees nothing, a row that is nothing but padding: 0 / 0 in values or in gradients."""
    t = 22
    qkv = random_qkv(3, 3, t, 3, 1, 4)
    segments = np.zeros((3, t), np.int32)
    segments[1] = np.arange(t)  # every token is a document of its own
    segments[2, :5] = 1
    qkv[0][0], qkv[1][0], qkv[2][0] = 0, 0, 0  # what an all-padding row may hold
    with with_blocks(4):
        ours = run(lambda *qkv: attend(*qkv, pattern_of(name, 6), segment_ids=segments), *qkv)
    assert all(np.isfinite(x).all() for x in ours)
    if name != "block_sparse":  # a token alone sees itself alone; heads of block_sparse look elsewhere
        np.testing.assert_allclose(ours[0][1], np.repeat(qkv[2][1], 3, axis=1), **F32)


@pytest.mark.parametrize("name", ("full", "window", *GROUPED))
@pytest.mark.parametrize("packed", [False, True])
def test_no_square_array_is_ever_built(name, packed):
    """A mask or scores of [T, T]: 40 GB a head in float32 at the paper's 100,000 tokens."""
    b, t, n, h, g = 2, 1024, 4, 16, 128
    x = jax.ShapeDtypeStruct((b, t, n, h), jnp.float32)
    kv = jax.ShapeDtypeStruct((b, t, 1, h), jnp.float32)
    segments = np.zeros((b, t), np.int32) if packed else None

    def loss(q, k, v):
        return attend(q, k, v, pattern_of(name, g), segment_ids=segments).sum()

    built = jaxpr_arrays.shapes(jax.value_and_grad(loss, argnums=(0, 1, 2)), x, kv, kv)
    # The scores: the walk went into the loops. A window's are those of blocks, of an axis more than the strips'.
    side, axes = (64, 4) if name == "window" else (strip_side(t if name == "full" else g), 3)
    assert any(len(shape) == axes and shape[-1] == side for shape in built)
    assert max(map(math.prod, built)) <= b * n * t * side
    assert not [shape for shape in built if sum(size >= t for size in shape) > 1]
    dense = jaxpr_arrays.shapes(lambda q, k, v: attend(q, k, v, Pattern("dilated", g)), x, kv, kv)
    assert max(map(math.prod, dense)) == b * n * t * t  # the walk would see it


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(("t", "g", "n"), [(64, 16, 4), (50, 12, 3), (7, 10, 2)])
def test_pieces_hold_the_allowed_pairs_and_no_more(name, t, g, n):
    """Groups computed and thrown away: pairs of all pieces that reach the kernel are those of the predicate."""
    handed = 0

    def count(q, k, v, segment_ids=None, **_):
        nonlocal handed
        rows, length, heads, _ = q.shape
        handed += rows * heads * length * (length + 1) // 2
        return q

    x = np.zeros((2, t, n, 4), np.float32)
    with mock.patch.object(attend_module, "causal_attention", count):
        attend(x, x, x, Pattern(name, g))
    assert handed == 2 * brute_force.mask(name, g, heads=n, t=t).sum()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("window", "blocks", "masked"),  # of 5 x 5 blocks of 8 tokens
    [(0, 15, 5), (1, 5, 5), (2, 9, 9), (8, 9, 9), (9, 9, 9), (10, 12, 12), (16, 12, 8), (17, 12, 8), (18, 14, 10)],
)
def test_kernel_visits_what_is_seen_and_masks_its_edges(window, blocks, masked, backward):
    """Scores computed only to be masked: twice the work of causal attention, far more than that of a window."""
    visited = []
    kernel_scores = blockwise._scores

    def scores(*args):
        jax.debug.callback(visited.append, args[-1] is not None)  # whether the block is masked
        return kernel_scores(*args)

    qkv = random_qkv(0, 1, 40, 2, 1, 4)
    with mock.patch.object(blockwise, "_scores", scores):
        if backward:
            run(lambda *qkv: blockwise_attention(*qkv, window=window, block=8), *qkv)
        else:
            jax.jit(lambda *qkv: blockwise_attention(*qkv, window=window, block=8))(*qkv[:3])
    jax.effects_barrier()
    passes = 2 if backward else 1  # the backward pass computes each block once more
    assert len(visited) == passes * blocks
    assert sum(map(bool, visited)) == passes * masked
