"""Adapters: what they add, that they start at nothing, and that merging them changes nothing."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlora_jax.config import ATTENTION_TARGETS, MLP_TARGETS, LoraConfig, ModelConfig
from longlora_jax.model.decoder import Llama, Projection, abstract_params, init_params
from longlora_jax.model.lora import apply_lora, merge_lora

# Three heads of 4 in a width of 10: no two axes of a kernel can be mistaken for each other.
TINY = ModelConfig(
    vocab_size=19,
    hidden_size=10,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    attention_bias=True,
    initializer_range=0.3,
)
ALL = LoraConfig(rank=2, alpha=6, targets=(*ATTENTION_TARGETS, *MLP_TARGETS))
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 9))
# Two layers of sums of at most 42 products in another order; logits are about 1.
F32 = {"rtol": 1e-5, "atol": 1e-5}
# The same program without the optimizations that take most of the time of so small a model.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def params_of(lora):
    """Random parameters of TINY with adapters and biases that are at work."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), abstract_params(Llama(TINY, lora))
    )


@functools.cache
def fresh_params(lora):
    return jax.jit(lambda: init_params(Llama(TINY, lora), jax.random.key(3, impl="rbg")), compiler_options=QUICK)()


@functools.cache
def forward(lora):
    def logits(params, rngs):
        return Llama(TINY, lora).apply({"params": params}, TOKENS, rngs=rngs)

    return jax.jit(logits, compiler_options=QUICK)


def logits(params, lora=None, **rngs):
    return np.asarray(forward(lora)(params, rngs))


@pytest.mark.parametrize(
    "lora",
    [
        ALL,
        pytest.param(dataclasses.replace(ALL, rslora=True), marks=pytest.mark.slow),
        LoraConfig(rank=3, alpha=1.5, targets=("v_proj", "o_proj")),
    ],
    ids=["all", "rslora", "two targets"],
)
def test_merged_equals_unmerged(lora):
    """A transposed, unscaled, forgotten or doubly merged adapter."""
    params = params_of(lora)
    before = jax.tree.map(np.array, params)
    merged = merge_lora(params, lora)
    ours = logits(params, lora)
    np.testing.assert_allclose(logits(merged), ours, **F32)
    assert np.abs(ours - logits(merge_lora(params, LoraConfig(alpha=0.0)))).max() > 0.01  # the adapters do something
    jax.tree.map(np.testing.assert_array_equal, before, params)  # the given tree is not changed
    shape = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(shape, merged) == jax.tree.map(shape, abstract_params(Llama(TINY)))


def test_merge_without_a_layer_axis():
    """A single layer's o_proj: its A has two input axes and is easily taken for a stack of layers."""
    params = params_of(ALL)
    one = jax.tree.map(lambda x: x[1], params["layers"])
    expected = jax.tree.map(lambda x: x[1], merge_lora(params, ALL)["layers"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, **F32), merge_lora(one, ALL), expected)


def test_merge_of_bfloat16_weights_rounds_once():
    """W + A B rounded twice, or A B summed in bfloat16: 2^-9 of a weight lost where nothing need be."""
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.standard_normal((6, 5)), jnp.bfloat16)
    a, b = rng.standard_normal((6, 4), np.float32), rng.standard_normal((4, 5), np.float32)
    merged = merge_lora({"up_proj": {"kernel": kernel, "lora_a": a, "lora_b": b}}, LoraConfig(rank=4, alpha=2))
    exact = np.asarray(kernel, np.float64) + 0.5 * (a.astype(np.float64) @ b)
    assert merged["up_proj"]["kernel"].dtype == jnp.bfloat16
    # Half a step of a number with 8 bits is at most 2^-8 of it; float32 adds a hair.
    assert (np.abs(np.asarray(merged["up_proj"]["kernel"], np.float64) - exact) <= 1.001 * 2**-8 * np.abs(exact)).all()


@pytest.mark.parametrize(("inputs", "outputs"), [((10,), (3, 4)), ((3, 4), (10,)), ((10,), (14,))])
def test_apply_lora_is_the_formula(inputs, outputs):
    """Axes contracted in the wrong order, a scale applied twice."""
    rng = np.random.default_rng(2)
    x, a, b = (rng.standard_normal(s, np.float32) for s in ((2, 7, *inputs), (*inputs, 5), (5, *outputs)))
    ours = apply_lora(x, a, b, input_axes=len(inputs), scale=0.75)
    flat = 0.75 * (x.reshape(14, -1) @ a.reshape(-1, 5) @ b.reshape(5, -1))
    np.testing.assert_allclose(ours, flat.reshape(2, 7, *outputs), **F32)


def test_scales():
    """alpha / rank of LoRA (arXiv:2106.09685), alpha / sqrt(rank) of rsLoRA (arXiv:2312.03732)."""
    assert LoraConfig().scale == 2
    assert LoraConfig(rank=4, alpha=3).scale == 0.75
    assert LoraConfig(rank=4, alpha=3, rslora=True).scale == 1.5
    assert LoraConfig(rank=8, alpha=16, rslora=True).scale == pytest.approx(16 / math.sqrt(8))


def test_adapters_start_at_nothing():
    """An adapter that moves the model before its first step; an A that is zero as well and never learns."""
    with_adapters = fresh_params(ALL)
    without = merge_lora(with_adapters, LoraConfig(alpha=0.0))
    np.testing.assert_array_equal(logits(with_adapters, ALL), logits(without))
    fan_in = {"o_proj": 12, "down_proj": 14}
    for part in ("self_attn", "mlp"):
        for name, leaves in with_adapters["layers"][part].items():
            assert not leaves["lora_b"].any()
            bound = 1 / math.sqrt(fan_in.get(name, 10))  # uniform, as PEFT draws it: also where it reads two axes
            assert 0.8 * bound < np.abs(leaves["lora_a"]).max() <= bound, name
            assert np.abs(leaves["lora_a"][0] - leaves["lora_a"][1]).max() > 0.1 * bound  # layers draw their own


def test_only_targets_get_adapters():
    """Shapes beside the kernel: lora_a [L, in, R] and lora_b [L, R, out], on the targets and nowhere else."""
    lora = LoraConfig(rank=5, targets=("q_proj", "k_proj", "o_proj", "down_proj"))
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params(Llama(TINY, lora)))[0]
    shapes = {(p[-2].key, p[-1].key): leaf.shape for p, leaf in leaves if p[-1].key.startswith("lora")}
    assert shapes == {
        ("q_proj", "lora_a"): (2, 10, 5),
        ("q_proj", "lora_b"): (2, 5, 3, 4),
        ("k_proj", "lora_a"): (2, 10, 5),
        ("k_proj", "lora_b"): (2, 5, 1, 4),
        ("o_proj", "lora_a"): (2, 3, 4, 5),
        ("o_proj", "lora_b"): (2, 5, 10),
        ("down_proj", "lora_a"): (2, 14, 5),
        ("down_proj", "lora_b"): (2, 5, 10),
    }


def test_dropout_only_with_a_key_and_only_in_the_adapter():
    """Dropout in evaluation; dropout of what the frozen weights read."""
    lora = LoraConfig(rank=2, dropout=0.5)
    params, key = params_of(lora), jax.random.key(4)
    plain = logits(params, dataclasses.replace(lora, dropout=0.0))
    np.testing.assert_array_equal(logits(params, lora), plain)
    assert np.abs(logits(params, lora, dropout=key) - plain).max() > 0.01
    for projection in params["layers"]["self_attn"].values():
        projection["lora_b"][...] = 0  # now the adapter's share is nothing, with dropout or without
    np.testing.assert_allclose(logits(params, lora, dropout=key), logits(params, lora), **F32)


def test_dropout_keeps_the_expectation():
    """What is kept is divided by 1 - p: seen with A and B that pass the input on, and a kernel of zeros."""
    width, rate = 8, 0.25
    lora = LoraConfig(rank=width, alpha=width, dropout=rate, targets=("up_proj",))
    layer = Projection((width,), ("embed", "mlp"), stddev=1.0, lora=lora, name="up_proj")
    params = {"kernel": np.zeros((width, width)), "lora_a": np.eye(width), "lora_b": np.eye(width)}
    x = np.ones((500, width), np.float32)
    linear: Any = layer.apply({"params": params}, width, rngs={"dropout": jax.random.key(5)})
    y = np.asarray(linear(x))
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    assert abs(y.mean() - 1) < 0.04  # 4 standard errors of 4,000 draws
