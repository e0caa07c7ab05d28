"""Which kernel runs, and why: the choice for GPUs by table, the program that comes of it, and its numbers on a GPU."""

import functools
import logging
import re

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from tiny import random_batch, random_params, tiny_config

from longlora_jax.attention import kernels
from longlora_jax.attention.attend import attend
from longlora_jax.attention.context_parallel import attend_on_mesh
from longlora_jax.attention.kernels import (
    blockwise_attention,
    causal_mask,
    compiled_for,
    cudnn_attention,
    gpu_fault,
    kernel_name,
)
from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import MeshConfig
from longlora_jax.model.decoder import Llama
from longlora_jax.parallel.sharding import make_mesh

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
BF16 = "bfloat16"


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks the library for its version before it traces a call of it: here there is no library."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91_000)
    kernels.say_once.cache_clear()


@pytest.mark.parametrize(
    ("shape", "dtype", "kv_heads", "segments", "capability", "fault"),
    [
        ((4, 8192, 32, 128), BF16, 32, False, "9.0", ""),
        ((4, 8192, 32, 128), BF16, 32, False, None, ""),
        ((4, 25_000, 64, 128), "float16", 8, False, "8.0", ""),
        ((1, 77, 9, 64), BF16, 3, False, "12.0", ""),
        ((4, 8192, 32, 128), "float32", 32, False, "9.0", "not float32"),
        ((4, 8192, 32, 256), BF16, 32, False, "9.0", ""),
        ((4, 8192, 32, 256), BF16, 32, False, "12.0", ""),
        ((4, 8192, 32, 100), BF16, 32, False, "8.0", "multiple of 8 and at most 128, not 100"),
        ((4, 8192, 32, 256), BF16, 32, False, "8.9", "multiple of 8 and at most 128, not 256"),
        ((4, 8192, 32, 256), BF16, 32, False, None, "multiple of 8 and at most 128, not 256"),
        ((4, 8192, 32, 264), BF16, 32, False, "9.0", "multiple of 8 and at most 256, not 264"),
        ((4, 8192, 3, 64), BF16, 2, False, "9.0", "3 query heads are no multiple of 2 kv heads"),
        ((4, 8192, 32, 128), BF16, 32, True, "9.0", ""),
        ((4, 8192, 32, 128), "float32", 32, True, "9.0", "not float32"),
        ((4, 8192, 32, 128), BF16, 32, True, "8.9", "rows are packed"),
        ((4, 8192, 32, 128), BF16, 32, False, "7.5", "compute capability 8.0 or later, this GPU has 7.5"),
        ((4, 8192, 32, 128), BF16, 32, False, "", "NVIDIA"),
    ],
)
def test_what_cudnn_takes(shape, dtype, kv_heads, segments, capability, fault):
    """Catches: "12.0" read as less than "8.0", a shape that JAX refuses at trace time, packed rows unmasked."""
    found = gpu_fault(shape, dtype, kv_heads, segments, capability=capability)
    assert fault in found and bool(found) == bool(fault)


def test_the_log_names_the_kernel_that_runs():
    """Catches: a log of cuDNN where float32 or an odd head runs the blockwise kernel."""
    with compiled_for("gpu"):
        assert kernel_name() == kernel_name(BF16, 64) == "cudnn on gpu"
        assert kernel_name("float32", 128) == kernel_name(BF16, 100) == "xla-blockwise on gpu"


def calls(function, *args) -> list[tuple[str, tuple[int, ...], int]]:
    """cuDNN's calls of a program for NVIDIA's GPUs: (name, shape of q, kv heads)."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(r"\22mask_type\22: \22CAUSAL\22") == text.count("@__cudnn$")
    found = re.findall(r"@(__cudnn\$\w+)\(.*?: \(tensor<([\dx]+)x\w+>, tensor<\d+x\d+x(\d+)x", text)
    return sorted((name, tuple(int(n) for n in shape.split("x")), int(kv)) for name, shape, kv in found)


def qkv(t: int, n: int, k: int, h: int, dtype=BF16, rows: int = 2):
    """Shapes of q, k and v."""
    return tuple(jax.ShapeDtypeStruct((rows, t, heads, h), dtype) for heads in (n, k, k))


def gradients(pattern, **options):
    """The gradients of attend's sum, compiled for a GPU."""

    def total(q, k, v):
        with compiled_for("gpu"):
            return attend(q, k, v, pattern, **options).astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1, 2))


def test_groups_reach_cudnn_as_rows(cudnn):
    """Catches: groups that are not folded, kv heads copied for each query head, a backward pass of another kernel."""
    rows = [(8, 16, 2, 64), (4, 8, 2, 64), (6, 16, 2, 64)]  # 4 plain groups; both halves at the ends, 3 whole ones
    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    expected = [(name, shape, 1) for name in (forward, backward) for shape in rows]
    assert calls(gradients(Pattern("s2", 16)), *qkv(64, 4, 2, 64)) == sorted(expected)


def test_an_odd_number_of_tokens_trains_by_cudnn(cudnn):
    """Catches: JAX's refusal of odd lengths in training, met on a GPU with a row of 77 tokens; a query that is lost."""
    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    even = (2, 78, 4, 64)
    assert calls(gradients(FULL), *qkv(77, 4, 2, 64)) == [(forward, even, 2), (backward, even, 2)]
    shapes = jax.eval_shape(gradients(FULL), *qkv(77, 4, 2, 64))
    assert [x.shape for x in shapes] == [(2, 77, 4, 64), (2, 77, 2, 64), (2, 77, 2, 64)]


def test_what_cudnn_does_not_take_is_said_once(cudnn, caplog):
    """Catches: a slower kernel in silence, or one line a layer; packed rows that see each other."""
    segments = jnp.zeros((2, 64), jnp.int32)
    with caplog.at_level(logging.INFO, logger="longlora_jax"):
        assert calls(gradients(FULL), *qkv(64, 4, 2, 64, "float32")) == []
        assert calls(gradients(FULL, segment_ids=segments), *qkv(64, 4, 2, 64)) == []
        assert calls(gradients(Pattern("s2", 16), segment_ids=segments), *qkv(64, 4, 2, 64)) == []
    assert [record.message for record in caplog.records] == [
        "attention runs the blockwise XLA kernel, not cuDNN's: it takes bfloat16 and float16, not float32",
        "attention runs the blockwise XLA kernel, not cuDNN's: rows are packed, and its segments need a Hopper GPU "
        "(compute capability 9.0): this machine's GPU is not known",
    ]


@needs_8
def test_cudnn_runs_inside_of_a_mesh(cudnn):
    """Catches: a call that XLA's partitioner would have to cut, which gathers the rows of all devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))

    def total(q, k, v):
        with compiled_for("gpu"):
            return attend_on_mesh(q, k, v, FULL, mesh).astype(jnp.float32).sum()

    found = calls(jax.grad(total), *qkv(64, 8, 8, 64, rows=4))
    # A row of the two of an fsdp share, whole; of 8 heads a half by tensor and half of those by the exchange of heads.
    assert [(shape, kv) for _, shape, kv in found] == [((2, 64, 2, 64), 2)] * 2


@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("attention", 1), ("block", 2)])
def test_remat_attention_keeps_what_cudnn_made(cudnn, remat, forwards):
    """Catches: cuDNN's output kept and its sums not, so that the backward pass begins with the forward again."""
    config = tiny_config(head_dim=16)
    model = Llama(config, dtype=jnp.bfloat16, remat=remat)
    params, batch = random_params(model), random_batch(1, 32)

    def total(params):
        with compiled_for("gpu"):
            return model.apply({"params": params}, batch["tokens"]).sum()

    names = [name for name, *_ in calls(jax.grad(total), params)]
    assert names.count("__cudnn$fmhaSoftmax") == forwards and names.count("__cudnn$fmhaSoftmaxBackward") == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("t", "n", "k", "h", "window"),
    [
        (1024, 8, 8, 128, 0),
        (1000, 8, 2, 64, 0),
        (77, 9, 3, 80, 0),
        (2, 2, 2, 64, 0),
        (1024, 8, 2, 128, 200),
        (77, 4, 2, 64, 1),
        (1000, 4, 2, 256, 0),
        (1000, 4, 2, 256, 512),
    ],
)
def test_cudnn_computes_the_same(t, n, k, h, window, dtype):
    """On a GPU: forward and gradients against float64, as near to it as the blockwise kernel in the same dtype."""
    if fault := gpu_fault((2, t, n, h), dtype, k, False, capability=kernels.device_capability()):
        pytest.skip(fault)
    rng = np.random.default_rng(t)
    exact = [rng.normal(size=(2, t, heads, h)).astype(np.float32) for heads in (n, k, k, n)]
    rounded = [jnp.asarray(x, dtype) for x in exact]
    exact = [np.asarray(x, np.float32) for x in rounded]

    def run(function, q, k, v, g):
        out, back = jax.vjp(function, q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *back(g))]

    seen = (np.tri(t, dtype=bool) & ~np.tri(t, k=-(window or t), dtype=bool))[None, None]
    oracle = brute_force.attention(*exact[:3], seen, exact[3])
    ours = run(jax.jit(functools.partial(cudnn_attention, window=window)), *rounded)
    blockwise = run(jax.jit(functools.partial(blockwise_attention, window=window)), *rounded)
    for found, other, right in zip(ours, blockwise, oracle, strict=True):
        error, allowed = np.abs(found - right).max(), np.abs(other - right).max()
        # Both round the weights to the dtype once; cuDNN's blocks differ, so its worst element may be another.
        assert error <= 2 * allowed + 1e-3, (error, allowed)


@pytest.mark.parametrize("block", [128, 256])
def test_the_quick_causal_mask_is_splashs_own(block):
    """Catches: a block on the diagonal that is taken for full or empty, and with it what the kernel visits."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def kernel(mask):
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
        masks = splash.MultiHeadMask([mask] * 2)
        return splash.make_splash_mha(mask=masks, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    ours, theirs = kernel(causal_mask(1024)), kernel(splash.CausalMask((1024, 1024)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))
