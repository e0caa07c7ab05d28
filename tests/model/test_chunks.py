"""A block in chunks is the block: same loss, same gradients, whatever is cut and wherever it runs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, random_params, tiny_config

from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import LoraConfig, MeshConfig
from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.model.linear import head_chunks
from longlora_jax.parallel.sharding import make_mesh, weight_shardings
from longlora_jax.training.step import loss_sums

LORA = LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
CASES = {  # name: (pattern, kv heads, chunks, mesh)
    "s2": (Pattern("s2", 8), 8, 2, {}),
    "s2, four heads a chunk": (Pattern("s2", 8), 4, 2, {}),
    "full": (FULL, 4, 4, {}),
    "heads that do not divide": (Pattern("s2", 8), 1, 4, {}),
    "an ablation": (Pattern("dilated", 4), 8, 2, {}),
    "groups over context": (Pattern("s2", 8), 8, 2, {"context": 4}),
    "half a group over context": (Pattern("s2", 8), 8, 4, {"context": 4, "fsdp": 2}),
    "full over context": (FULL, 8, 2, {"context": 4}),
    "tensor": (Pattern("s2", 8), 8, 2, {"tensor": 2, "context": 2}),
}


@functools.cache
def whole(pattern: Pattern, kv_heads: int, packed: bool):
    """(model, params, batch, its loss and gradients) of a block at once: several cases are held against one."""
    config = tiny_config(
        vocab_size=38,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        hidden_size=32,
        attention_bias=True,
        mlp_bias=True,
    )
    alone = Llama(config, LORA, pattern, remat="block")
    params = random_params(alone)
    batch = random_batch(2, 32)
    if packed:
        batch["segment_ids"] = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], [10, 9, 13], axis=1))
    return alone, params, batch, loss_and_gradients(alone, params, batch)


def loss_and_gradients(model: Llama, params, batch):
    def loss(params):
        total, tokens = loss_sums(params, batch, model=model, loss_chunk=16)
        return total / tokens

    return jax.jit(jax.value_and_grad(loss))(params)


# Each case once; the other half is slow, as all are compiled anew.
PACKED = ("s2", "heads that do not divide", "groups over context", "full over context", "tensor")
SLOW = (
    "s2",
    "s2, four heads a chunk",
    "an ablation",
    "groups over context",
    "half a group over context",
    "full over context",
    "heads that do not divide",
    "tensor",
)  # a mesh and chunks, in little, are in test_layers.py


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        pytest.param(
            *(name, packed),
            id=f"{name}-{kind}",
            marks=() if packed == (name in PACKED) and name not in SLOW else pytest.mark.slow,
        )
        for name in CASES
        for packed, kind in ((False, "joined"), (True, "packed"))
    ],
)
def test_chunks_change_nothing(name, packed):
    """Catches: heads of a chunk in another order than their weights, a shard's tokens in another order, a lost bias,
    an adapter counted once a chunk, a norm's gradient of the last chunk alone."""
    pattern, kv_heads, chunks, axes = CASES[name]
    if axes.get("context") == 4 and axes.get("fsdp"):
        pattern = Pattern("s2", 16)
    alone, params, batch, (loss, gradients) = whole(pattern, kv_heads, packed)
    mesh = make_mesh(MeshConfig(**{"fsdp": 1} | axes), jax.devices()[: int(np.prod(list(axes.values()) or [1]))])
    ours, our_gradients = loss_and_gradients(alone.clone(chunks=chunks, mesh=mesh if axes else None), params, batch)
    # float32, sums in another order: a few units of the last place of the largest gradient of a leaf.
    np.testing.assert_allclose(ours, loss, rtol=2e-6)
    for path, wanted in jax.tree_util.tree_leaves_with_path(gradients):
        found = our_gradients
        for key in path:
            found = found[key.key]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max(), err_msg=str(path))


@pytest.mark.slow
def test_chunks_hold_less():
    """Catches: chunks whose activations are all kept for the backward pass."""
    config = tiny_config(num_attention_heads=8, num_key_value_heads=8, hidden_size=64, intermediate_size=256)
    batch = random_batch(1, 512)

    def temporaries(chunks: int) -> int:
        model = Llama(config, LORA, Pattern("s2", 128), remat="block", chunks=chunks)
        step = jax.jit(jax.grad(lambda p: loss_sums(p, batch, model=model, loss_chunk=64)[0]))
        return step.lower(random_params(model)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.6 * temporaries(1)


@pytest.mark.slow
def test_features_stay_cut_over_a_tensor_axis():
    """Catches: every device of a tensor axis computing the whole MLP of a chunk."""
    config = tiny_config(vocab_size=40, num_attention_heads=8, num_key_value_heads=8, intermediate_size=232)
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=4), jax.devices()[:4])
    model = Llama(config, LORA, Pattern("s2", 8), remat="block", chunks=2, mesh=mesh)
    shapes = abstract_params(model)
    where = weight_shardings(mesh, logical_axes(model), shapes)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    batch = random_batch(2, 32)
    compiled = jax.jit(jax.grad(lambda p: loss_sums(p, batch, model=model, loss_chunk=16)[0])).lower(params).compile()
    dots = [line for line in compiled.as_text().splitlines() if " dot(" in line]
    assert any(re.search(r"[\[,]58[,\]]", line) for line in dots)
    assert not [line for line in dots if re.search(r"[\[,]232[,\]]", line)]


def test_dropout_of_every_chunk_is_its_own():
    """Catches: one mask for all chunks of the sequence."""
    config = tiny_config(num_hidden_layers=1)
    lora = dataclasses.replace(LORA, dropout=0.5, targets=("down_proj",))
    model = Llama(config, lora, FULL, chunks=2)
    params = random_params(model)
    tokens = jnp.ones((1, 2), jnp.int32)  # equal tokens: without dropout and position, equal results
    params["layers"]["self_attn"]["v_proj"]["kernel"] *= 0
    rngs = {"dropout": jax.random.key(0)}
    apply = jax.jit(functools.partial(model.apply, method="hidden"))
    hidden = apply({"params": params}, tokens, rngs=rngs)
    assert not np.allclose(hidden[0, 0], hidden[0, 1])
    plain = apply({"params": params}, tokens)
    np.testing.assert_allclose(plain[0, 0], plain[0, 1], rtol=1e-5)


def test_a_sequence_that_does_not_divide_is_refused():
    """Catches: a reshape error that names no field."""
    model = Llama(tiny_config(), None, FULL, chunks=5)
    with pytest.raises(UserError, match="32 tokens a device are not a multiple of chunks=5"):
        loss_sums(random_params(model), random_batch(1, 32), model=model, loss_chunk=16)


@pytest.mark.parametrize(
    "wanted, heads, kv_heads, parts, shares, found",
    [(8, 32, 32, 2, 1, 8), (8, 32, 8, 2, 1, 4), (16, 32, 32, 1, 8, 4), (8, 9, 3, 2, 1, 1), (7, 32, 32, 2, 1, 4)],
)
def test_the_most_chunks_that_cut_heads_evenly(wanted, heads, kv_heads, parts, shares, found):
    """Catches: a kv head in two chunks, a chunk that a context axis cannot share out."""
    assert head_chunks(wanted, heads, kv_heads, parts, shares) == found
