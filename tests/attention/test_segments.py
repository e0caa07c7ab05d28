"""Packed rows by cuDNN's segments: which call gets which document, what comes of it, and the program for a Hopper GPU.

There is no GPU here: attention by offsets in plain jax.numpy (tests/helpers/segment_kernel.py) stands in for a kernel.
"""

import functools
import re
from collections import Counter

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import segment_kernel
from arrays import assert_close, mesh_of, random_qkv, run, same_segment
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from tiny import random_batch, random_params, tiny_config

from longlora_jax.attention import kernels, partial, segments
from longlora_jax.attention.attend import attend
from longlora_jax.attention.context_parallel import attend_on_mesh
from longlora_jax.attention.kernels import compiled_for, gpu_fault
from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.model.decoder import Llama

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
BF16 = "bfloat16"
NEEDS = "need a Hopper GPU (compute capability 9.0)"


def row_of(*lengths: int) -> np.ndarray:
    """Segment ids of a row as data/pack.py gives them: 1, 2, ... and the last one, padding, 0."""
    ids = [*range(1, len(lengths)), 0]
    return np.repeat(ids, lengths).astype(np.int32)


def packed_rows(rng, b: int, t: int) -> np.ndarray:
    """Rows [b, t] with documents of all lengths, from a token to most of a row."""
    rows = []
    for _ in range(b):
        lengths = []
        while sum(lengths) < t:
            lengths.append(int(np.exp(rng.uniform(0, np.log(t)))) + 1)
        lengths[-1] -= sum(lengths) - t
        rows.append(row_of(*lengths))
    return np.stack(rows)


@pytest.fixture
def stands_in(monkeypatch):
    """A Hopper GPU that is not there: the stand-in for the kernel, in float32, and short segments of 10 tokens."""
    asked = []

    def forward(q, *rest):
        asked.append(q.shape[1])
        return segment_kernel.forward(q, *rest)

    for module in (kernels, partial):
        monkeypatch.setattr(module, "gpu_fault", lambda *_, **__: "")
    monkeypatch.setattr(segments, "SHORT", 10)
    monkeypatch.setattr(segments, "forward", forward)
    monkeypatch.setattr(segments, "backward", segment_kernel.backward)
    return asked


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU to compile for: JAX asks the library and the device before it traces a call of cuDNN."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_900)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda wanted: float(wanted) <= 9.0)
    monkeypatch.setattr(kernels, "device_capability", lambda: "9.0")
    kernels.say_once.cache_clear()


@pytest.mark.parametrize("seed", range(3))
def test_every_document_has_one_slot(monkeypatch, seed):
    """Catches: a document that is lost where a row has more than the slots, one given twice, a length that is cut."""
    monkeypatch.setattr(segments, "SHORT", 8)
    ids = packed_rows(np.random.default_rng(seed), 3, 512)
    if seed == 0:
        ids[0] = row_of(*[1] * 511, 1)
    if seed == 1:
        ids[0] = row_of(*[33] * 15, 17)

    @jax.jit
    def asked(ids):
        begins, length = segments.runs_of(ids)
        call = segments.call_of(length, 512)
        return [segments.offsets_of(begins, length, call, i) for i in range(segments.calls_for(512))]

    found = []
    for i, places in enumerate(asked(ids)):
        offsets, lengths = map(np.asarray, places)
        size = 512 // segments.SLOTS**i
        assert offsets.shape == (3 * 512 // size, segments.SLOTS + 1) and (offsets[:, -1] == -1).all()
        for row, slot in zip(*np.nonzero(lengths >= 0), strict=True):
            assert lengths[row, slot] <= size
            found.append((row * size + offsets[row, slot], lengths[row, slot]))
        # JAX moves what is there to the left of each, and cuDNN reads the two side by side.
        np.testing.assert_array_equal(lengths >= 0, offsets[:, :-1] >= 0)
    starts = [np.flatnonzero(np.diff(row, prepend=-1)) for row in ids]
    pairs = [(512 * z + a, b - a) for z, s in enumerate(starts) for a, b in zip(s, [*s[1:], 512], strict=True)]
    assert sorted(found) == [(a, n) for a, n in pairs if n > 512 // segments.SLOTS ** segments.calls_for(512)]


@pytest.mark.parametrize(
    ("pattern", "n", "kv_heads"),
    [
        pytest.param(FULL, 4, 2, marks=pytest.mark.slow),
        (Pattern("s2", 37), 6, 1),  # the cut of the heads is inside of the kv group
        pytest.param(Pattern("s2", 45, full_below=15), 2, 2, marks=pytest.mark.slow),
        pytest.param(Pattern("s2_swap", 45), 2, 2, marks=pytest.mark.slow),
        # One group, in which the roll cuts a document in two.
        pytest.param(Pattern("s2_wrap", 200), 2, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_segments_are_the_predicate(stands_in, pattern, n, kv_heads):
    """Catches: a document that begins inside of a group or of its shifted half and sees the one before it, kv heads
    beside their queries, a token between two segments that is read (it is NaN), a row whose length nothing divides, and
    padding."""
    t = 90
    qkv = random_qkv(n, 2, t, n, kv_heads, 4)
    # A document from the middle of a group over the next, some of a token; more than the slots of a call.
    ids = np.stack([row_of(5, 1, 12, 40, 3, 29), row_of(*[6] * 8, 9, *[1] * 11, 22)])

    def ours(q, k, v):
        with compiled_for("gpu"):
            return attend(q, k, v, pattern, segment_ids=jnp.asarray(ids))

    found = run(ours, *qkv)
    seen = brute_force.mask(pattern.name, pattern.group_size, heads=n, t=t)[None] & same_segment(ids)
    if pattern.full_below:
        lengths = np.stack([np.bincount(row)[row] for row in ids])
        short = (lengths <= pattern.full_below)[:, None, :, None]
        seen = np.where(short, np.tri(t, dtype=bool)[None, None] & same_segment(ids), seen)
    assert_close(found, brute_force.attention(*qkv[:3], seen, qkv[3]))
    assert stands_in and (pattern is not FULL or set(stands_in) == {96, 24})  # rows of two lengths


@pytest.mark.slow
@needs_8
def test_segments_on_a_mesh(stands_in):
    """Catches: a document over the cut of two shards, and tokens before the first shard, taken for one segment."""
    qkv = random_qkv(0, 2, 80, 4, 2, 4)
    ids = jnp.asarray(packed_rows(np.random.default_rng(3), 2, 80))

    def ours(q, k, v):
        with compiled_for("gpu"):
            return attend_on_mesh(q, k, v, Pattern("s2", 40), mesh_of(context=2), segment_ids=ids)

    seen = brute_force.mask("s2", 40, heads=4, t=80)[None] & same_segment(np.asarray(ids))
    assert_close(run(ours, *qkv), brute_force.attention(*qkv[:3], seen, qkv[3]))
    assert stands_in


def test_only_the_calls_slots_grow_memory():
    """Catches: a slot for each document that a long row could have, which costs cuDNN rows x slots x length."""
    assert [segments.calls_for(t) for t in (1, 128, 129, 4096, 8192, 16_384, 100_000)] == [0, 0, 1, 3, 3, 4, 5]
    for t in (129, 4096, 25_000, 100_000):
        pad = -t % segments.SLOTS ** segments.calls_for(t)
        assert pad < t / 32 and (t + pad) // segments.SLOTS ** segments.calls_for(t) <= segments.SHORT


@pytest.mark.parametrize(
    ("shape", "options", "fault"),
    [
        ((4, 8192, 32, 128), {"capability": "9.0"}, ""),
        ((1, 77, 9, 64), {"capability": "9.0"}, ""),
        ((4, 8192, 32, 128), {"capability": "8.0"}, f"{NEEDS}: this GPU has 8.0"),
        ((4, 8192, 32, 128), {"capability": "10.0"}, f"{NEEDS}: this GPU has 10.0"),
        ((4, 8192, 32, 128), {"capability": None}, f"{NEEDS}: this machine's GPU is not known"),
        ((4, 8192, 32, 256), {"capability": "9.0"}, "head_dim of at most 128, not 256"),
        ((4, 8192, 32, 128), {"capability": "9.0", "window": 512}, "a window inside of its segments"),
        ((4, 8192, 32, 128), {"capability": "9.0", "softcap": 50.0}, "capped"),
        ((4, 131_072, 32, 128), {"capability": "9.0"}, "2,147,483,648 numbers is too large"),
    ],
)
def test_what_segments_take(shape, options, fault):
    """Catches: a GPU or a row that JAX or the library refuses at run time, offsets that overflow, a window dropped."""
    found = gpu_fault(shape, BF16, shape[2], True, **options)
    assert fault in found and bool(found) == bool(fault)


@pytest.mark.parametrize(("version", "known"), [((0, 10, 1), False), ((0, 10, 2), True), ((0, 12, 0), False)])
def test_a_jax_that_is_not_known_is_not_trusted(version, known, monkeypatch):
    """Catches: a private function called after it has changed its arguments, or is gone."""
    assert bool(segments.jax_fault(version)) != known
    monkeypatch.setattr(jax_cudnn, "_dot_product_attention_bwd_rule", lambda scale, res: None)
    assert "not public" in segments.jax_fault(version)
    monkeypatch.delattr(jax_cudnn, "_dot_product_attention_bwd_rule")
    assert "not public" in segments.jax_fault(version)


def cudnn_calls(function, *args) -> Counter:
    """cuDNN's calls of a program for NVIDIA's GPUs: how often each (name, shape of q, kv heads)."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = text.count("@__cudnn$")
    assert text.count(r"\22mask_type\22: \22PADDING_CAUSAL\22") == calls
    assert len(re.findall(rf"max_seg_per_batch\\22: {segments.SLOTS}\b", text)) == calls
    found = re.findall(r"@__cudnn\$(\w+)\(.*?: \(tensor<([\dx]+)x\w+>, tensor<\d+x\d+x(\d+)x", text)
    return Counter((name, tuple(int(n) for n in shape.split("x")), int(kv)) for name, shape, kv in found)


def gradients(pattern, **options):
    """The gradients of attend's sum, compiled for a GPU."""

    def total(q, k, v):
        with compiled_for("gpu"):
            return attend(q, k, v, pattern, **options).astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1, 2))


def qkv_shapes(t: int, n: int, k: int, h: int):
    return tuple(jax.ShapeDtypeStruct((2, t, heads, h), BF16) for heads in (n, k, k))


def test_packed_rows_reach_cudnn(hopper, caplog):
    """Catches: the blockwise kernel for a packed row on Hopper, another mask than that of segments, a lost level."""
    found = cudnn_calls(gradients(FULL, segment_ids=jnp.zeros((2, 2050), jnp.int32)), *qkv_shapes(2050, 4, 2, 64))
    kv = 2 if jax.__version_info__ >= (0, 11, 2) else 4  # earlier ones misplace grouped heads: each has a copy
    shapes = [(2, 2112, 4, 64), (8, 528, 4, 64), (32, 132, 4, 64)]
    assert found == {(name, s, kv): 1 for name in ("fmhaSoftmax", "fmhaSoftmaxBackward") for s in shapes}
    assert not caplog.records
    with compiled_for("gpu"):
        assert kernels.kernel_name(packed=True) == "cudnn's segments on gpu"
        assert kernels.kernel_name("float32", packed=True) == kernels.kernel_name(BF16, 256, packed=True)


def test_what_segments_do_not_take_is_said(hopper, caplog):
    """Catches: a window or a cap that is dropped in silence because the row is packed."""
    segment_ids = jnp.zeros((2, 512), jnp.int32)
    for pattern in (Pattern("window", 100), Pattern("full", softcap=30.0)):
        assert not cudnn_calls(gradients(pattern, segment_ids=segment_ids), *qkv_shapes(512, 4, 2, 64))
    told = [
        record.message.removeprefix("attention runs the blockwise XLA kernel, not cuDNN's: ")
        for record in caplog.records
    ]
    assert [line.split(",")[0] for line in told] == ["rows are packed", "scores are capped"]


@pytest.mark.parametrize(("remat", "forwards"), [("attention", 1), ("block", 2)])
def test_remat_attention_keeps_what_segments_made(hopper, remat, forwards):
    """Catches: packed attention computed again where its output and sums are kept, or kept where nothing is."""
    model = Llama(tiny_config(head_dim=16), dtype=jnp.bfloat16, remat=remat)
    params, batch = random_params(model), random_batch(1, 512)
    segment_ids = jnp.asarray(np.repeat([[1, 2]], 256, axis=1))

    def total(params):
        with compiled_for("gpu"):
            return model.apply({"params": params}, batch["tokens"], segment_ids=segment_ids).sum()

    found = cudnn_calls(jax.grad(total), params)
    for name, times in (("fmhaSoftmax", forwards), ("fmhaSoftmaxBackward", 1)):
        assert sum(n for (kind, *_), n in found.items() if kind == name) == times


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("t", "n", "k", "h"), [(4096, 8, 8, 128), (2050, 9, 3, 64), (600, 4, 1, 80)])
def test_cudnns_segments_compute_the_same(t, n, k, h):
    """On a GPU: forward and gradients against float64, as near to it as the blockwise kernel in the same dtype."""
    if fault := gpu_fault((2, t, n, h), BF16, k, True, capability=kernels.device_capability()):
        pytest.skip(fault)
    rng = np.random.default_rng(t)
    ids = packed_rows(rng, 2, t)
    rounded = [jnp.asarray(rng.normal(size=(2, t, heads, h)), BF16) for heads in (n, k, k, n)]
    exact = [np.asarray(x, np.float32) for x in rounded]
    oracle = brute_force.attention(*exact[:3], np.tri(t, dtype=bool)[None, None] & same_segment(ids), exact[3])
    found = {}
    for name, kernel in (("ours", segments.segmented_attention), ("blockwise", kernels.blockwise_attention)):
        found[name] = run(functools.partial(kernel, segment_ids=jnp.asarray(ids)), *rounded, options=None)
    for ours, other, right in zip(found["ours"], found["blockwise"], oracle, strict=True):
        error, allowed = (np.abs(np.asarray(x, np.float32) - right).max() for x in (ours, other))
        assert error <= 2 * allowed + 1e-3, (error, allowed)
