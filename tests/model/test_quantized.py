"""A base in four and eight bits: bitsandbytes' codes and scales, unpacked in their block and nowhere else."""

import dataclasses

import bitsandbytes
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from tiny import random_batch, random_params, tiny_config

from longlora_jax.config import AttentionConfig, Config, LoraConfig, MeshConfig, OptimConfig
from longlora_jax.model.codes import Layout, Quantization, dequantize, quantize
from longlora_jax.model.decoder import Llama
from longlora_jax.model.quantized import Quantized
from longlora_jax.model.trainable import combine
from longlora_jax.parallel.sharding import batch_sharding, make_mesh
from longlora_jax.training import run
from longlora_jax.training.step import compile_train_step, jit_eval_step, jit_train_step
from longlora_jax.weights.hf import save_hf

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
# Rows of whole blocks; rows that share blocks; a matrix that blocks do not divide; one with a half-filled byte.
SHAPES = ((6, 128), (48, 80), (10, 100), (7, 9))
KINDS = ("nf4", "nf4_double", "fp4", "fp4_double", "int8")


def matrix(shape, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(kind)


def as_torch(array: np.ndarray) -> torch.Tensor:
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(array.dtype), torch.float32)
    return torch.from_numpy(array.astype(np.float32)).to(kind)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ("nf4", "fp4"))
def test_codes_and_scales_are_bitsandbytes(kind, shape):
    """Catches: halves of a byte that are swapped, a boundary on the other side, a short block that is not scaled."""
    for dtype in ("float32", "bfloat16", "float16"):
        array = matrix(shape, dtype)
        codes, state = functional.quantize_4bit(as_torch(array), quant_type=kind)
        found = quantize(array, Quantization(kind))
        np.testing.assert_array_equal(found["codes"], codes.numpy().reshape(-1))
        np.testing.assert_array_equal(found["absmax"], state.absmax.numpy())
        # In one row: bitsandbytes 0.50 on CPUs with AVX-512 scales the end of a row that is not whole blocks wrongly.
        state.dtype, state.shape = torch.float32, torch.Size([array.size])
        back = functional.dequantize_4bit(codes, state).numpy().reshape(shape)
        np.testing.assert_array_equal(dequantize(found, shape, Quantization(kind)), back)


def test_scales_in_eight_bits_are_bitsandbytes():
    """Catches: another map, a mean that is not subtracted. Against bitsandbytes given our mean: its own is torch's sum,
    whose order depends on threads; ours is within its last place."""
    array, q = matrix((300, 320)), Quantization("nf4", nested=True)
    found, plain = quantize(array, q), quantize(array, Quantization("nf4"))["absmax"]
    codes, state = functional.quantize_blockwise(torch.from_numpy(plain - found["offset"]), blocksize=256)
    np.testing.assert_array_equal(found["absmax"], codes.numpy())
    np.testing.assert_array_equal(found["nested_absmax"], state.absmax.numpy())
    np.testing.assert_array_equal(found["nested_map"], state.code.numpy())
    packed, whole = functional.quantize_4bit(torch.from_numpy(array), quant_type="nf4", compress_statistics=True)
    np.testing.assert_allclose(found["offset"], whole.offset.item(), rtol=2e-7)
    # What bitsandbytes made of it is dequantized to the bit.
    parts = {"codes": packed.numpy().reshape(-1), "absmax": whole.absmax.numpy(), "offset": whole.offset.numpy()}
    parts |= {"nested_absmax": whole.state2.absmax.numpy(), "nested_map": whole.state2.code.numpy()}
    back = functional.dequantize_4bit(packed, whole).numpy()
    np.testing.assert_array_equal(dequantize(parts, array.shape, q), back)


def test_rows_in_int8_are_bitsandbytes():
    """Catches: a matrix that is not rounded to float16 first, rounding away from even, another 1 / 127."""
    array, q = matrix((40, 72)), Quantization("int8")
    array[3] = 0
    theirs = bitsandbytes.nn.Int8Params(torch.from_numpy(array), requires_grad=False).to("cpu")
    found = quantize(array, q)
    np.testing.assert_array_equal(found["codes"], theirs.data.numpy().reshape(-1))
    np.testing.assert_array_equal(found["absmax"], theirs.SCB.numpy())
    back = functional.int8_vectorwise_dequant(theirs.data, theirs.SCB).numpy()
    np.testing.assert_array_equal(dequantize(found, array.shape, q), back)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_unpacks_what_was_packed(shape, kind):
    """Catches: inputs and outputs exchanged, groups of rows in another order, a code that belongs to the next block."""
    q, array = Quantization.of(kind), matrix(shape)
    flat = quantize(array, q)
    layout = Layout.of(shape, q)
    parts = {name: jnp.asarray(x) for name, x in layout.to_ours(flat, q).items()}
    assert {name: (x.shape, x.dtype) for name, x in parts.items()} == layout.shapes(q)
    kernel = Quantized(parts, (shape[1], 1, shape[0]), 1, q).kernel(jnp.float32)
    expected = dequantize(flat, shape, q).T[:, None]
    # Products of three numbers are rounded in an order that the compiler chooses.
    np.testing.assert_allclose(kernel, expected, rtol=3e-7, atol=1e-9)


def folder_and_config(tmp_path, kind: str, **sizes):
    """A random model on the disk and the run that trains on it."""
    shape = tiny_config(vocab_size=40, **sizes)
    params = random_params(Llama(shape))
    save_hf(str(tmp_path / "base"), shape, params)
    config = Config(
        seq_len=32,
        steps=5,
        batch_size=8,
        init_from=str(tmp_path / "base"),
        model=shape,
        base_quantization=kind,
        dtype="float32",
        attention=AttentionConfig(group_size=8),
        lora=LoraConfig(rank=2, targets=("q_proj", "o_proj", "down_proj")),
        optim=OptimConfig(warmup_steps=0, learning_rate=1e-2),
    )
    return config, params


ALIGNED = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def steps(config: Config, devices: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of two steps."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    state, frozen = run.initial_state(config, run.build_model(config, mesh), mesh)
    batch, step, found = random_batch(8, 32, vocab_size=40), jit_train_step(state), []
    for _ in range(2):
        state, values = step(state, frozen, batch)
        found.append((float(values["loss"]), float(values["grad_norm"])))
    return found


MESHES = {  # (mesh, devices, chunks)
    "all axes": (MeshConfig(fsdp=2, context=2, tensor=2), 8, 1),
    "chunks": (MeshConfig(fsdp=1, context=4), 4, 2),
}


@needs_8
def test_eight_devices_read_what_one_does(tmp_path):
    """Catches: shares of codes that are not those of their scales; a width that 64 does not divide. The forward pass
    alone: what trains is compared in the slow tests."""
    config, _ = folder_and_config(tmp_path, "nf4")
    batch, found = random_batch(8, 32, vocab_size=40), []
    for mesh, devices in ((config.mesh, 1), MESHES["all axes"][:2]):
        mesh = make_mesh(mesh, jax.devices()[:devices])
        state, frozen = run.initial_state(config, run.build_model(config, mesh), mesh)
        total, _ = jit_eval_step(state.model)(combine(state.trainable, frozen), batch)
        found.append(float(total))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-6)


@pytest.mark.slow
@needs_8
@pytest.mark.parametrize(
    "kind, sizes, where",
    [
        pytest.param(kind, sizes, where, id=f"{name}, {where}")
        for name, kind, sizes in (("odd", "nf4", {}), ("nf4_double", "nf4_double", ALIGNED), ("int8", "int8", ALIGNED))
        for where in MESHES
    ],
)
def test_eight_devices_compute_what_one_does(tmp_path, kind, sizes, where):
    """Catches: shares of codes that are not those of their scales; chunks that unpack another kernel; a width that 64
    does not divide."""
    config, _ = folder_and_config(tmp_path, kind, **sizes)
    alone = steps(config, 1)
    mesh, devices, chunks = MESHES[where]
    found = steps(dataclasses.replace(config, mesh=mesh, chunks=chunks), devices)
    np.testing.assert_allclose(found, alone, rtol=2e-5)


def temporaries(config: Config, layers: int) -> int:
    """Bytes of a compiled step's temporaries with so many layers."""
    shape = dataclasses.replace(config.model, num_hidden_layers=layers)
    config = dataclasses.replace(config, model=shape)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, frozen = run.abstract_state(config, run.build_model(config, mesh), mesh)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), "int32", sharding=batch_sharding(mesh, 1))
    return compile_train_step(state, frozen, rows).memory_analysis().temp_size_in_bytes


@pytest.mark.slow  # each compiles two models
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("remat", ["none", "block"])
def test_no_second_layer_is_ever_unpacked(kind, remat):
    """Catches: kernels that are unpacked before the loop over layers, or kept for the backward pass of each."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape = tiny_config(head_dim=64, **sizes)
    config = Config(seq_len=8, steps=1, init_from="x", model=shape, base_quantization=kind, remat=remat)
    config = dataclasses.replace(
        config, attention=AttentionConfig(pattern="full"), mode="lora", lora=LoraConfig(rank=1)
    )
    kernels = 2 * (4 * 256 * 256 + 3 * 256 * 512)  # bytes of one layer in bfloat16
    few, many = temporaries(config, 8), temporaries(config, 24)
    growth = (many - few) / 16
    assert growth < 0.3 * kernels
    assert kernels / 2 < few - 8 * growth  # one is unpacked: memory that is looked at would show it
