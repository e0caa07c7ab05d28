"""Layers of several kinds in one model: windows and groups side by side, rotations by layer, everything on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_batch, random_params, tiny_config

import longlora_jax.model.decoder as decoder
from longlora_jax.attention.attend import _by_predicate
from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import LoraConfig, MeshConfig
from longlora_jax.errors import UserError
from longlora_jax.model.cache import new_cache
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.model.layers import frequencies_of, kinds_of, patterns_of
from longlora_jax.model.trainable import group_of, trainable_mask
from longlora_jax.parallel.sharding import make_mesh
from longlora_jax.training.step import loss_sums

S2 = Pattern("s2", 8)
GEMMA = {
    **{"norm": "rms_unit_offset", "norm_placement": "both", "qk_norm": "head", "sliding_window": 5},
    "layer_types": ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention"),
    **{"num_hidden_layers": 4, "rope_local_base_freq": 100.0, "embedding_multiplier": 4.0},
    **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "hidden_act": "gelu_pytorch_tanh"},
}
NO_ROPE = {"num_hidden_layers": 3, "no_rope_layers": (1, 0, 1), "qkv_bias": True}
OLMO = {"norm_placement": "post", "qk_norm": "projection"}
NEOX = {
    **{"norm": "layer", "gated_mlp": False, "mlp_bias": True, "attention_bias": True, "use_parallel_residual": True},
    **{"partial_rotary_factor": 0.67, "hidden_act": "gelu"},
}
MODELS = {"windows": GEMMA, "no rope": NO_ROPE, "post norms": OLMO, "parallel residual": NEOX}


def model_of(name: str, **options) -> Llama:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, "vocab_size": 40}
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    return Llama(tiny_config(**sizes | MODELS[name]), LoraConfig(rank=2, targets=targets), **options)


def weights_of(model: Llama):
    """random_params with norms that scale by about 1 in every kind of model."""
    offset = float(model.config.norm == "rms_unit_offset")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x - offset if path[-1].key == "scale" else x, random_params(model)
    )


@pytest.mark.parametrize(
    ("pattern", "segments"),
    [
        pytest.param(FULL, False, id="full-joined"),
        pytest.param(S2, True, id="s2-packed"),
        pytest.param(FULL, True, id="full-packed", marks=pytest.mark.slow),
        pytest.param(S2, False, id="s2-joined", marks=pytest.mark.slow),
    ],
)
def test_every_layer_attends_by_its_predicate(pattern, segments, monkeypatch):
    """Catches: groups in a layer that has a window, a window in one that has none, the numbers of a layer too far."""
    model = model_of("windows", pattern=pattern)
    params, batch = weights_of(model), random_batch(2, 32)
    ids = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], [10, 9, 13], axis=1)) if segments else None
    got = jax.jit(model.apply)({"params": params}, batch["tokens"], batch["positions"], ids)
    asked = []

    def by_predicate(q, k, v, pattern, mesh, segment_ids):
        asked.append(pattern)
        return _by_predicate(q, k, v, pattern, segment_ids)

    monkeypatch.setattr(decoder, "attend_on_mesh", by_predicate)
    again = model.clone(pattern=dataclasses.replace(pattern)).clone(remat="block")  # traced anew
    expected = jax.jit(again.apply)({"params": params}, batch["tokens"], batch["positions"], ids)
    assert {p.name for p in asked} == {"window", pattern.name} and {p.softcap for p in asked} == {3.0}
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_no_output_before_a_changed_token_changes(name):
    """Catches: a layer that looks ahead."""
    model = model_of(name, pattern=S2)
    params, tokens = weights_of(model), random_batch(1, 32)["tokens"]
    apply = jax.jit(functools.partial(model.apply, {"params": params}))
    before, after = apply(tokens), apply(tokens.at[0, 19].set((tokens[0, 19] + 1) % 37))
    changed = np.abs(np.asarray(before - after)).max(-1)[0] > 0
    assert not changed[:19].any() and changed[19]


@functools.cache
def alone(name: str):
    model = model_of(name, pattern=S2, remat="block")
    params, batch = weights_of(model), random_batch(2, 32)
    return model, params, batch, loss_and_gradients(model, params, batch)


def loss_and_gradients(model: Llama, params, batch):
    def loss(params):
        total, tokens = loss_sums(params, batch, model=model, loss_chunk=16)
        return total / tokens

    return jax.jit(jax.value_and_grad(loss))(params)


WAYS = {  # (mesh, chunks, remat)
    "context": ({"context": 4, "fsdp": 2}, 1, "block"),
    "tensor": ({"tensor": 4, "fsdp": 2}, 1, "attention"),
    "chunks": ({}, 2, "block"),
}


# Where what a model has meets what cuts it; the other pairs are slow, as all are compiled anew (windows over context
# are in tests/attention/test_window.py).
MEET = {("post norms", "tensor")}


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, way, marks=() if (name, way) in MEET else pytest.mark.slow) for name in MODELS for way in WAYS],
)
def test_a_mesh_and_chunks_change_nothing(name, way):
    """Catches: a window that ends at a device's edge, a norm over heads of which a device has some, a residual that is
    scaled once a chunk."""
    model, params, batch, (loss, gradients) = alone(name)
    axes, chunks, remat = WAYS[way]
    mesh = make_mesh(MeshConfig(**{"fsdp": 1} | axes)) if axes else None
    ours, found = loss_and_gradients(model.clone(mesh=mesh, chunks=chunks, remat=remat), params, batch)
    np.testing.assert_allclose(ours, loss, rtol=2e-6)
    for (path, wanted), got in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=str(path))


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_trains(name):
    """Catches: norms of q and k, or the biases of a LayerNorm, that stay frozen in LongLoRA."""
    shapes = abstract_params(model_of(name))
    mask = trainable_mask(shapes, "longlora")
    leaves = {tuple(k.key for k in path): trains for path, trains in jax.tree_util.tree_leaves_with_path(mask)}
    norms = {path for path in leaves if any("norm" in part for part in path)}
    assert norms and all(leaves[path] and group_of(path) == "norm" for path in norms)
    kinds = {"windows": 6 + 1, "no rope": 2 + 1, "post norms": 4 + 1, "parallel residual": 2 * (2 + 1)}
    assert len(norms) == kinds[name]
    others = {path for path in leaves if path not in norms}
    assert {path[-1] for path in others if leaves[path]} == {"lora_a", "lora_b", "embedding"}


def test_alike_layers_are_a_plain_scan():
    """Catches: a LLaMA that pays for what it does not have."""
    config = tiny_config(qk_norm="head")
    assert kinds_of(config) is None and patterns_of(config, S2) == (S2,)
    frequencies, factors = frequencies_of(config, 64)
    assert frequencies.shape == (1, 3) and factors == (1.0,)
    run = functools.partial(Llama(config).apply, {"params": random_params(Llama(config))})
    text = str(jax.make_jaxpr(run)(jnp.zeros((1, 8), jnp.int32)))
    assert " cond[" not in text


def test_depth_costs_no_compile_time():
    """Catches: a loop over layers of several kinds that is unrolled."""

    def lines(periods: int) -> int:
        kinds = GEMMA["layer_types"] * periods
        model = Llama(tiny_config(**GEMMA | {"layer_types": kinds, "num_hidden_layers": len(kinds)}), pattern=S2)
        lowered = jax.jit(model.apply).lower({"params": abstract_params(model)}, jax.ShapeDtypeStruct((1, 32), "int32"))
        return len(lowered.as_text().splitlines())

    assert lines(1) == lines(5)


@pytest.mark.parametrize("name", ["windows", "no rope"])
def test_layers_of_several_kinds_have_no_sink_cache(name):
    """Catches: a sink cache that forgets what a full layer sees, or turns what is not turned."""
    with pytest.raises(UserError, match="has no sink cache"):
        new_cache(model_of(name).config, 1, 64, dtype=jnp.float32, chunk=8, sinks=2, window=8)
