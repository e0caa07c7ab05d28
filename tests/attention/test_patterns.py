"""patterns.allowed against the definitions written out in plain Python, and what the paper says of them."""

import brute_force
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from longlora_jax.attention.patterns import FULL, PATTERNS, Pattern, allowed, plain_heads
from longlora_jax.errors import UserError


def mask(pattern, heads, t, segment_ids=None):
    """`allowed` for all heads and pairs at once: booleans [heads, t, t]."""
    head, i, j = np.arange(heads)[:, None, None], np.arange(t)[:, None], np.arange(t)[None, :]
    return allowed(pattern, head, i, j, num_heads=heads, seq_len=t, segment_ids=segment_ids)


def pattern_of(name, g):
    return FULL if name == "full" else Pattern(name, g)


def pairs(name, g, t):
    """How many pairs the first and the last of two heads allow: (plain, shifted)."""
    return tuple(int(count) for count in mask(pattern_of(name, g), 2, t).sum((1, 2)))


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=25)
@given(g=st.integers(2, 14), heads=st.integers(1, 7), t=st.integers(1, 33))
@example(g=4, heads=3, t=16)  # the middle head of an odd number is plain
@example(g=5, heads=4, t=23)  # an odd group, a row that it does not divide
@example(g=12, heads=2, t=5)  # a row shorter than half a group
@example(g=8, heads=2, t=1)
def test_allowed_is_the_definition(name, g, heads, t):
    """A wrong boundary, half, or choice of heads."""
    np.testing.assert_array_equal(mask(pattern_of(name, g), heads, t), brute_force.mask(name, g, heads=heads, t=t))


@pytest.mark.parametrize("name", PATTERNS)
def test_segments_restrict_and_never_extend(name):
    """Documents packed in one row that read each other."""
    segments = np.array([3, 3, 3, 1, 1, 7, 7, 7, 7, 7, 7, 0, 0])
    pattern, t = pattern_of(name, 4), segments.size
    same = segments[:, None] == segments[None, :]
    np.testing.assert_array_equal(mask(pattern, 4, t, segments), mask(pattern, 4, t) & same)


def test_allowed_takes_single_numbers():
    """The predicate as one would ask it by hand."""
    s2 = Pattern("s2", 4)
    assert allowed(s2, 0, 4, 3, num_heads=2, seq_len=16) == False  # noqa: E712
    assert allowed(s2, 1, 4, 3, num_heads=2, seq_len=16) == True  # noqa: E712


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=15)
@given(g=st.integers(2, 14), t=st.integers(1, 33))
def test_everyone_sees_itself_or_something(name, g, t):
    """A row of scores with nothing to see is a division by zero."""
    seen = mask(pattern_of(name, g), 4, t)
    # Heads of block_sparse may look into an earlier block only.
    assert seen.any(-1).all() if name == "block_sparse" else seen[:, np.arange(t), np.arange(t)].all()


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "s2_wrap"])
@settings(max_examples=15)
@given(g=st.integers(2, 14), heads=st.integers(1, 5), t=st.integers(1, 33))
def test_nobody_sees_the_future(name, g, heads, t):
    """The leak of the reference's rolled heads."""
    assert not np.triu(mask(pattern_of(name, g), heads, t), 1).any()


def test_s2_wrap_leaks_exactly_the_tail_into_the_head():
    """The paper's Algorithm 1, kept as it is: the first half group of shifted heads sees the last one."""
    t, g, half = 24, 8, 4
    future = np.triu(mask(Pattern("s2_wrap", g), 4, t), 1)
    expected = np.zeros((4, t, t), bool)
    expected[2:, :half, t - half :] = True
    np.testing.assert_array_equal(future, expected)


def test_short_groups_never_exchange_and_s2_groups_do():
    """A shift that does not cross the plain boundaries: layers could be stacked and nothing would travel."""
    t, g = 16, 4
    reach = {name: np.eye(t, dtype=bool) for name in ("short", "s2")}
    for name in reach:
        step = mask(Pattern(name, g), 2, t).any(0)
        for _ in range(2 * t // g):  # a layer moves what a token knows by half a group at least
            reach[name] = step @ reach[name]
    np.testing.assert_array_equal(reach["s2"], np.tri(t, dtype=bool))
    np.testing.assert_array_equal(reach["short"], mask(Pattern("short", g), 1, t)[0])


def test_a_window_is_transformers_sliding_window():
    """One token too many: a model that was trained with W keys reads W + 1."""
    t, window = 9, 4
    config = transformers.MistralConfig(sliding_window=window, num_hidden_layers=1)
    config._attn_implementation = "eager"
    made = masking_utils.create_sliding_window_causal_mask(
        config, torch.zeros(1, t, 8), attention_mask=None, past_key_values=None, position_ids=torch.arange(t)[None]
    )
    np.testing.assert_array_equal(mask(Pattern("window", window), 1, t), made[0].numpy() == 0)


def test_a_pattern_says_what_it_is():
    """A log that leaves out what makes two runs differ."""
    assert str(FULL) == "full" and str(Pattern("s2", 8)) == "s2(G=8)"
    assert str(Pattern("window", 8, softcap=50.0)) == "window(W=8, softcap=50)"
    assert str(Pattern("full", softcap=0.5)) == "full(softcap=0.5)"


@pytest.mark.parametrize(("t", "g"), [(64, 16), (96, 8), (48, 48), (240, 6)])
def test_pair_counts(t, g):
    """T * G / 2 and T * G / 2 - G * G / 4 of the paper, and the diagonal's T / 2 that it leaves out."""
    assert pairs("full", 0, t) == (t * (t + 1) // 2,) * 2
    plain = t * g // 2 + t // 2
    assert pairs("short", g, t) == (plain, plain)
    assert pairs("s2", g, t) == (plain, plain - g * g // 4)
    assert pairs("s2_wrap", g, t) == pairs("s2_swap", g, t) == (plain, plain)


def test_a_quarter_group_costs_23_4_percent_of_full_attention():
    """The paper's ratio G = T / 4: 15/64 of the pairs, up to the diagonal's 2 / T."""
    t = 1024
    assert sum(pairs("s2", t // 4, t)) / sum(pairs("full", 0, t)) == pytest.approx(15 / 64, rel=4 / t)


def test_the_middle_head_of_an_odd_number_is_plain():
    """heads // 2 where h < N / 2 is meant."""
    assert [plain_heads(n) for n in (1, 2, 3, 4, 9)] == [1, 1, 2, 2, 5]


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (("s3", 4), "use one of"),
        (("s2", 0), "group"),
        (("short", 1), "group"),
        (("window", 0), "give 1 token or more"),
        (("window", 4, 2), "leave out full_below=2"),
        (("full", 0, 0, -1.0), "softcap=-1.0: give a positive number"),
        (("full", 0, 0, float("nan")), "softcap=nan: give a positive number"),
    ],
)
def test_bad_patterns_are_one_clear_line(given, advice):
    """A typing error that trains under another pattern."""
    with pytest.raises(UserError, match=advice) as error:
        Pattern(*given)
    assert "\n" not in str(error.value)
