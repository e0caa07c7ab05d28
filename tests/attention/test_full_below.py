"""Short segments of packed rows have full attention inside, whatever the groups; long ones keep their pattern."""

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import F32, assert_close, mesh_of, random_qkv, run

from longlora_jax.attention.attend import attend
from longlora_jax.attention.context_parallel import attend_on_mesh
from longlora_jax.attention.patterns import Pattern, allowed
from longlora_jax.errors import UserError

LENGTHS = [5, 1, 13, 6, 7, 20, 8, 4]  # of the segments of a row of 64 tokens; the last is padding
SEGMENTS = np.stack([np.repeat([1, 2, 3, 4, 5, 6, 7, 0], LENGTHS), np.repeat([1, 2, 1], [30, 7, 27])])


def oracle_mask(name: str, g: int, below: int, heads: int) -> np.ndarray:
    """Booleans [B, heads, T, T], pair by pair."""
    t = SEGMENTS.shape[1]
    grouped = brute_force.mask(name, g, heads=heads, t=t)
    seen = np.zeros((len(SEGMENTS), heads, t, t), bool)
    for b, row in enumerate(SEGMENTS):
        first = 0
        while first < t:
            last = first
            while last < t and row[last] == row[first]:
                last += 1
            for i in range(first, last):
                for j in range(t):
                    if last - first <= below:
                        seen[b, :, i, j] = first <= j <= i
                    else:
                        seen[b, :, i, j] = grouped[:, i, j] & (row[i] == row[j])
            first = last
    return seen


# All are compiled anew: the quick one is a short segment inside of a group.
QUICK_BELOW = {("s2", 7)}


@pytest.mark.parametrize(
    ("name", "below"),
    [
        pytest.param(name, below, marks=() if (name, below) in QUICK_BELOW else pytest.mark.slow)
        for name in ("s2", "s2_swap", "short")
        for below in (1, 7, 13, 64)
    ],
)
def test_short_segments_see_all_of_themselves(name, below):
    """Catches: a segment cut at a group's boundary or at a piece's, one token too many taken for short."""
    pattern = Pattern(name, 16, below)
    q, k, v, d_out = random_qkv(0, 2, 64, 4, 2, 6)
    mask = oracle_mask(name, 16, below, 4)
    index = np.arange(64)
    for row, wanted in zip(SEGMENTS, mask, strict=True):
        predicate = allowed(
            pattern, np.arange(4)[:, None, None], index[:, None], index, num_heads=4, seq_len=64, segment_ids=row
        )
        np.testing.assert_array_equal(predicate, wanted)
    ours = run(lambda q, k, v: attend(q, k, v, pattern, segment_ids=jnp.asarray(SEGMENTS)), q, k, v, d_out)
    assert_close(ours, brute_force.attention(q, k, v, mask, d_out), **F32)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
@pytest.mark.parametrize(
    "g, axes",
    [
        pytest.param(8, {"context": 4}, marks=pytest.mark.slow),
        pytest.param(16, {"context": 8}, marks=pytest.mark.slow),
        pytest.param(32, {"context": 8}, marks=pytest.mark.slow),
        (16, {"context": 2, "tensor": 2, "fsdp": 2}),
    ],
    ids=["whole groups", "half a group", "heads passed round", "everything"],
)
def test_on_a_mesh_too(g, axes):
    """Catches: a short segment that loses what lies on the device before, or takes the last device for the first's."""
    pattern, mesh = Pattern("s2", g, 7, softcap=0.9), mesh_of(**axes)
    qkv = random_qkv(1, 2, 64, 4, 4, 6)
    ours = run(lambda *x: attend_on_mesh(*x, pattern, mesh, segment_ids=jnp.asarray(SEGMENTS)), *qkv)
    assert_close(ours, brute_force.attention(*qkv[:3], oracle_mask("s2", g, 7, 4), qkv[3], pattern.softcap), **F32)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
def test_more_than_a_neighbour_has_is_refused():
    """Catches: segments that are silently cut where they begin two devices back."""
    q, k, v, _ = random_qkv(1, 2, 64, 4, 4, 6)
    with pytest.raises(UserError, match="attention.full_below=17 is more than the 16 tokens of a device"):
        attend_on_mesh(q, k, v, Pattern("s2", 16, 17), mesh_of(context=4), segment_ids=jnp.asarray(SEGMENTS))
