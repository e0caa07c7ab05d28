"""Attention over a mesh is attention on one device, forward and backward; and it exchanges what is promised."""

import re

import brute_force
import jax
import numpy as np
import pytest
from arrays import F32, assert_close, mesh_of, random_qkv, random_segments, run, same_segment
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.attention import blockwise, kernels
from longlora_jax.attention.attend import attend
from longlora_jax.attention.context_parallel import (
    HEADS,
    NEIGHBOUR,
    NOTHING,
    RING,
    TURNS,
    attend_on_mesh,
    exchange,
    heads_passed,
)
from longlora_jax.attention.patterns import FULL, Pattern, allowed
from longlora_jax.errors import UserError

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")


def s2(g, softcap=0.0):
    return Pattern("s2", g, softcap=softcap)


@pytest.fixture
def in_blocks(monkeypatch):
    """Whole rows in blocks, as sets of keys are: their counts and errors compare, and strips are more exact."""
    monkeypatch.setattr(kernels, "strip_side", lambda t: None)


CASES = {  # name: (pattern, mesh, (B, T, N, K), what is exchanged)
    "whole groups": (s2(8), {"context": 4}, (1, 64, 4, 4), NEIGHBOUR),
    "one group a shard": (s2(8), {"context": 8}, (1, 64, 4, 2), NEIGHBOUR),
    "odd group": (s2(7), {"context": 4}, (1, 56, 4, 2), NEIGHBOUR),
    "half a group": (s2(16), {"context": 8}, (2, 64, 4, 2), TURNS),
    "half a group, two shards": (s2(32), {"context": 2}, (1, 32, 4, 4), TURNS),
    "half a group, one kv head": (s2(16), {"context": 4}, (1, 32, 4, 1), HEADS),
    "odd heads": (s2(8), {"context": 2}, (1, 32, 3, 3), NEIGHBOUR),
    "a kv group in both halves": (s2(8), {"context": 2}, (2, 32, 6, 3), NEIGHBOUR),
    "a quarter of a group": (s2(32), {"context": 8}, (1, 64, 4, 2), HEADS),
    "cuts inside groups": (s2(24), {"context": 4}, (1, 64, 4, 4), HEADS),
    "full": (FULL, {"context": 4}, (1, 32, 4, 4), HEADS),
    "full, a kv head for two shards": (FULL, {"context": 4}, (1, 32, 8, 2), HEADS),
    "full, kv heads that cannot be shared out": (FULL, {"context": 2}, (1, 32, 6, 3), HEADS),
    "full, fewer heads than shards": (FULL, {"context": 8}, (2, 32, 4, 2), RING),
    "full, odd heads": (FULL, {"context": 2}, (1, 32, 3, 1), RING),
    "full, 9 heads": (FULL, {"context": 8}, (1, 48, 9, 3), RING),
    "full, 9 heads, capped": (Pattern("full", softcap=0.9), {"context": 4}, (1, 40, 9, 3), RING),
    "full, 5 heads, by an odd number of shards": (FULL, {"context": 3}, (1, 30, 5, 1), RING),
    "full, too few heads for tensor and context": (FULL, {"context": 4, "tensor": 2}, (1, 32, 4, 2), RING),
    "full, shards without halves": (FULL, {"context": 4}, (1, 12, 3, 1), HEADS),
    "short": (Pattern("short", 8), {"context": 4}, (1, 32, 4, 2), NOTHING),
    "swap": (Pattern("s2_swap", 8), {"context": 2}, (1, 32, 4, 2), HEADS),
    "wrap": (Pattern("s2_wrap", 8), {"context": 2}, (1, 32, 4, 2), HEADS),
    "heads over tensor": (s2(8), {"tensor": 2}, (1, 32, 8, 4), NOTHING),
    "a kv head for two devices": (s2(8), {"tensor": 4}, (1, 32, 8, 2), NOTHING),
    "everything, capped": (s2(8, 0.9), {"fsdp": 2, "context": 2, "tensor": 2}, (2, 32, 8, 4), NEIGHBOUR),
    "everything by turns, capped": (s2(16, 0.9), {"data": 2, "context": 2, "tensor": 2}, (2, 16, 8, 4), TURNS),
    "everything full, capped": (
        Pattern("full", softcap=0.9),
        {"fsdp": 2, "context": 2, "tensor": 2},
        (2, 32, 8, 4),
        HEADS,
    ),
    "rows that do not divide": (s2(8), {"fsdp": 2, "context": 4}, (3, 32, 4, 4), NEIGHBOUR),
    "an ablation": (Pattern("dilated", 4), {"fsdp": 2, "tensor": 2}, (2, 16, 4, 2), NOTHING),
}


# Each case once, by turns as one document and packed; the other half is slow, as all are compiled anew. So are these,
# which go ways that others go: which way is held to HOW by all.
SLOW = ("one group a shard", "half a group, two shards", "odd heads", "full, fewer heads than shards", "wrap")
SLOW += ("full, odd heads", "cuts inside groups", "full, kv heads that cannot be shared out", "full, 9 heads")
SLOW += ("full, shards without halves", "a kv group in both halves", "full, 5 heads, by an odd number of shards")
SLOW += ("a quarter of a group", "swap", "an ablation", "whole groups", "half a group", "full", "heads over tensor")


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        pytest.param(
            name, packed, id=f"{name}-{kind}", marks=() if i % 2 == packed and name not in SLOW else pytest.mark.slow
        )
        for i, name in enumerate(CASES)
        for packed, kind in ((False, "one document"), (True, "packed"))
    ],
)
def test_a_mesh_attends_as_one_device(name, packed):
    """Catches: a neighbour's half that is another's, a first shard that sees zeros, heads in disorder."""
    pattern, axes, (b, t, n, k), how = CASES[name]
    assert exchange(pattern, t, n, k, axes.get("context", 1), axes.get("tensor", 1)) == how
    mesh = mesh_of(**axes)
    qkv = random_qkv(0, b, t, n, k, 6)
    segments = random_segments(1, b, t) if packed else None
    ours = run(lambda *x: attend_on_mesh(*x, pattern, mesh, segment_ids=segments), *qkv)
    seen = brute_force.mask(pattern.name, pattern.group_size, heads=n, t=t)[None] & same_segment(segments)
    assert_close(ours, brute_force.attention(*qkv[:3], seen, qkv[3], pattern.softcap), **F32)


@pytest.mark.parametrize(
    ("pattern", "t", "heads"),
    [
        pytest.param(s2(16), 32, (8, 4), id="by turns", marks=pytest.mark.slow),
        pytest.param(s2(8), 32, (8, 4), id="a neighbour"),
        pytest.param(FULL, 256, (9, 3), id="a ring"),
    ],
)
def test_a_mesh_is_as_exact_as_one_device(pattern, t, heads, in_blocks):
    """Catches: sets of keys joined by a log-sum-exp that is rounded, which costs digits where scores are large."""
    mesh = mesh_of(context=4)
    q, k, v, d_out = random_qkv(0, 2, t, *heads, 8)
    q, k = 10 * q, 10 * k
    seen = brute_force.mask(pattern.name, pattern.group_size, heads=heads[0], t=t)[None]
    right = brute_force.attention(q, k, v, seen, d_out)

    def errors(attention):
        found = run(attention, q, k, v, d_out)
        return np.array([np.linalg.norm(np.asarray(x, np.float64) - y) for x, y in zip(found, right, strict=True)])

    alone = errors(lambda q, k, v: attend(q, k, v, pattern))
    ratio = errors(lambda q, k, v: attend_on_mesh(q, k, v, pattern, mesh)) / alone
    assert (ratio <= 1.5).all(), ratio


@pytest.mark.parametrize(
    ("heads", "axes", "how", "passed"),
    [
        ((9, 3), (8, 1), RING, (16, 16)),
        ((9, 3), (3, 1), HEADS, (9, 3)),
        ((32, 8), (16, 1), HEADS, (32, 16)),
        ((32, 8), (16, 4), RING, (16, 16)),  # heads of a tensor share: 8 and 2
        ((32, 8), (8, 4), HEADS, (8, 8)),
        ((12, 6), (4, 1), HEADS, (12, 12)),
    ],
)
def test_what_full_attention_exchanges(heads, axes, how, passed):
    """Catches: zeros passed round for heads, more copies of a kv head than there are devices that read it."""
    context, tensor = axes
    assert (
        exchange(FULL, 4096, *heads, context, tensor) == exchange(Pattern("window", 4096), 4096, *heads, *axes) == how
    )
    assert exchange(FULL, 3 * context, *heads, context, tensor) == HEADS
    assert heads_passed(*(x // tensor for x in heads), context) == passed


def collectives(compiled):
    """(operation, bytes of its result) of everything that is sent, from the text of a compiled program."""
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
    kinds = "collective-permute|all-gather|all-to-all|all-reduce|reduce-scatter"
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            total = sum(sizes[d] * int(np.prod([int(x) for x in s.split(",") if x], dtype=int)) for d, s in shapes)
            found.append((match[2], total))
    return found


@pytest.mark.parametrize("g, context", [(16, 4), (32, 4), (32, 8)], ids=["groups", "one group", "half a group"])
def test_s2_sends_half_a_group_of_half_of_the_heads(g, context):
    """Catches: an all-gather of keys, both halves sent where one is needed; the promise is bytes, not words."""
    b, t, n, k, h = 1, 128, 8, 4, 16
    mesh = mesh_of(context=context)
    place = NamedSharding(mesh, P(None, "context"))
    q, key, v, _ = (jax.device_put(x, place) for x in random_qkv(0, b, t, n, k, h))
    forward = jax.jit(lambda q, k, v: attend_on_mesh(q, k, v, s2(g), mesh), out_shardings=place)
    sent = collectives(forward.lower(q, key, v).compile())
    half_a_group_of_keys = b * (g // 2) * (k // 2) * h * 4
    assert sent == [("collective-permute", half_a_group_of_keys)] * 2, sent


@pytest.mark.parametrize("window, shares", [(8, [7]), (40, [7, 16, 16])], ids=["part of a shard", "three shards"])
def test_a_window_sends_the_tokens_before_a_shard(window, shares):
    """Catches: whole shards sent where a window needs fewer of their tokens, a pattern that passes heads round."""
    b, t, n, k, h = 1, 64, 8, 4, 16
    place = NamedSharding(mesh := mesh_of(context=4), P(None, "context"))
    q, key, v, _ = (jax.device_put(x, place) for x in random_qkv(0, b, t, n, k, h))
    pattern = Pattern("window", window)
    forward = jax.jit(lambda q, k, v: attend_on_mesh(q, k, v, pattern, mesh), out_shardings=place)
    sent = collectives(forward.lower(q, key, v).compile())
    assert sum(shares) == window - 1
    assert sorted(sent) == sorted(("collective-permute", b * s * k * h * 4) for s in 2 * shares), sent


@pytest.mark.parametrize("context, turns", [(2, 1), (4, 2)], ids=["two devices", "four"])
def test_a_ring_sends_keys_as_they_are(context, turns):
    """Catches: kv heads that travel once for each query head, zeros for heads, an all-to-all or a row gathered."""
    b, t, n, k, h = 1, 64, 9, 3, 16
    place = NamedSharding(mesh := mesh_of(context=context), P(None, "context"))
    q, key, v, _ = (jax.device_put(x, place) for x in random_qkv(0, b, t, n, k, h))
    forward = jax.jit(lambda q, k, v: attend_on_mesh(q, k, v, FULL, mesh), out_shardings=place)
    sent = collectives(forward.lower(q, key, v).compile())
    shard = b * t // context * h * 4
    # Halves there and back; keys and values once a turn, of which the loop over all but the last has one in its text.
    halves = [n * shard // 2] * 4 + [k * shard // 2] * 4
    assert sorted(sent) == sorted(("collective-permute", size) for size in [*halves, *[k * shard] * 2 * turns]), sent


@pytest.mark.parametrize(
    "pattern, heads, most",
    [(FULL, 3, 1.1), (Pattern("window", 513), 1, 1.5), (s2(512), 2, 1.3)],
    ids=["a ring", "a window of two shards", "half a group"],
)
def test_what_is_computed_is_kept(pattern, heads, most, monkeypatch, in_blocks):
    """Catches: zeros for heads, queries for the keys of a neighbour, hops whose keys all lie ahead. Scores are made for
    whole blocks: by the row, `most` times those that a query sees."""
    made = []

    def counted(*args):
        scores = blocks(*args)
        jax.debug.callback(lambda: made.append(scores.size))
        return scores

    blocks = blockwise._scores
    monkeypatch.setattr(blockwise, "_scores", counted)
    t = 1024
    q, k, v, _ = random_qkv(0, 1, t, heads, heads, 2)
    jax.block_until_ready(jax.jit(lambda *x: attend_on_mesh(*x, pattern, mesh_of(context=4)))(q, k, v))
    jax.effects_barrier()
    index = np.arange(t)
    seen = [allowed(pattern, head, index[:, None], index, num_heads=heads, seq_len=t).sum() for head in range(heads)]
    assert sum(seen) <= sum(made) <= most * sum(seen), sum(made) / sum(seen)


def test_what_cannot_be_cut_is_refused():
    """Catches: an error of shard_map, which knows nothing of seq_len."""
    q, k, v, _ = random_qkv(0, 1, 30, 4, 4, 6)
    with pytest.raises(UserError, match="seq_len=30 is not a multiple of mesh.context=4"):
        attend_on_mesh(q, k, v, FULL, mesh_of(context=4))
    with pytest.raises(UserError, match="attention.pattern='dilated' runs on whole rows: set mesh.context=1"):
        attend_on_mesh(q, k, v, Pattern("dilated", 4), mesh_of(context=2))
