"""One step on a mesh of 8 fake devices is the step on one device; what cannot be cut is said by name."""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import random_batch, random_params, tiny_config

from longlora_jax.attention.patterns import Pattern
from longlora_jax.config import LoraConfig, MeshConfig
from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.model.trainable import partition, trainable_mask
from longlora_jax.parallel.sharding import batch_sharding, make_mesh, place_weights, weight_shardings
from longlora_jax.training.step import TrainState, jit_train_step
from longlora_jax.weights.hf import open_hf, save_hf

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")


def step_on(mesh, *, accumulation: int = 1):
    """(trainables before, state after one step, metrics, compiled step) of the same model and batch on a mesh."""
    # Every axis a multiple of 4, heads and kv heads too: what a tensor axis of 4 asks for.
    config = tiny_config(num_key_value_heads=4, vocab_size=40)
    model = Llama(config, lora=LoraConfig(rank=2), pattern=Pattern("s2", 8), remat="block", mesh=mesh)
    shardings = weight_shardings(mesh, logical_axes(model), abstract_params(model))
    params = jax.device_put(random_params(model), shardings)
    trains, frozen = partition(params, trainable_mask(params, "longlora"))
    # Linear in the gradient: Adam would divide rounding near zero by itself.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    state = TrainState.create(model=model, optimizer=optimizer, trainable=trains, accumulation=accumulation)
    state = jax.tree.map(lambda x: x if x.committed else jax.device_put(x, jax.NamedSharding(mesh, P())), state)
    before = jax.tree.map(np.array, state.trainable)
    places = jax.tree.map(lambda x: x.sharding, state)
    batch = random_batch(8, 16, vocab_size=40)
    batch["loss_mask"] *= jnp.asarray(np.arange(16) < np.arange(9, 17)[:, None])  # rows of unequal weight
    batch = jax.device_put(batch, batch_sharding(mesh, 8 // accumulation))
    compiled = jit_train_step(state).lower(state, frozen, batch).compile()
    after, values = compiled(state, frozen, batch)
    assert jax.tree.map(lambda x: x.sharding, after) == places  # else the next step would compile anew
    return before, after, values, compiled


@pytest.fixture(scope="module")
def alone():
    return step_on(make_mesh(MeshConfig(), jax.devices()[:1]))


@needs_8
@pytest.mark.parametrize(
    "axes, accumulation",
    [
        pytest.param((1, 2, 1, 4), 1, marks=pytest.mark.slow),
        pytest.param((2, 2, 1, 2), 2, marks=pytest.mark.slow),
        pytest.param((1, 1, 8, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 1, 2, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 2, 4, 1), 1, marks=pytest.mark.slow),
        ((2, 1, 2, 2), 2),
    ],
    ids=str,
)
def test_a_mesh_computes_what_one_device_computes(alone, axes, accumulation):
    """Catches: a sum that is taken per device, a mean of means over devices, a head that lands with another's keys."""
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    before, after, values, compiled = step_on(mesh, accumulation=accumulation)
    expected_before, expected, expected_values, compiled_alone = alone
    for name, value in expected_values.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)

    def compare(path, new, old, want, want_old):
        # Float32 sums over devices come in another order; updates are about 1e-2, so this is 1% of one at most.
        np.testing.assert_allclose(new - old, np.asarray(want) - want_old, rtol=1e-3, atol=1e-5, err_msg=str(path))
        assert np.abs(want - want_old).max() > 1e-3, path

    jax.tree_util.tree_map_with_path(
        compare, jax.tree.map(np.array, after.trainable), before, expected.trainable, expected_before
    )
    # The work is shared out and not repeated: some of it, such as norms, is done on every tensor device.
    flops = [c.cost_analysis()["flops"] for c in (compiled, compiled_alone)]
    share = max(1 / 3, 1.2 / mesh.size)
    assert flops[0] * accumulation < flops[1] * share  # a loop's body is counted once


@needs_8
def test_weights_and_moments_are_cut_over_the_mesh():
    """Catches: a rule that is never applied, so that every device holds everything; moments that are left whole."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    model = Llama(tiny_config(num_key_value_heads=4, vocab_size=40), lora=LoraConfig(rank=2))
    shapes = abstract_params(model)
    shardings = weight_shardings(mesh, logical_axes(model), shapes)
    pieces = jax.tree.map(lambda s, x: s.shard_shape(x.shape), shardings, shapes)
    attention = pieces["layers"]["self_attn"]
    assert attention["q_proj"] == {"kernel": (2, 8, 1, 6), "lora_a": (2, 8, 2), "lora_b": (2, 2, 1, 6)}
    assert attention["o_proj"] == {"kernel": (2, 1, 6, 8), "lora_a": (2, 1, 6, 2), "lora_b": (2, 2, 8)}
    assert pieces["layers"]["mlp"]["down_proj"] == {"kernel": (2, 7, 8)}
    assert pieces["embed_tokens"]["embedding"] == (10, 8) and pieces["lm_head"]["kernel"] == (8, 10)
    assert pieces["norm"]["scale"] == (16,)
    params = jax.tree.map(lambda s, x: jax.device_put(jnp.zeros(x.shape), s), shardings, shapes)
    moments = optax.adam(1.0).init(params)[0].mu
    jax.tree.map(
        lambda m, s: m.sharding.is_equivalent_to(s, m.ndim) or pytest.fail(str(m.sharding)), moments, shardings
    )


@needs_8
@pytest.mark.parametrize(
    "axes, o_proj, down_proj",
    [
        ({"fsdp": 2, "tensor": 2}, (2, 1, 6, 16), (2, 7, 16)),
        ({"fsdp": 2, "context": 2}, (2, 1, 6, 16), (2, 7, 16)),
        ({"fsdp": 8}, (2, 4, 6, 2), (2, 28, 2)),
        ({"fsdp": 2, "tensor": 4}, (2, 1, 6, 8), (2, 7, 8)),
    ],
    ids=str,
)
def test_kernels_that_write_the_hidden_size_are_cut_where_they_read(axes, o_proj, down_proj):
    """Catches: 4 heads, or 28 features, that are not cut though they could be, cut though they cannot be, cut twice."""
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1} | axes), jax.devices()[: math.prod(axes.values())])
    model = Llama(tiny_config(num_key_value_heads=4, vocab_size=40, attention_bias=True))
    shapes = abstract_params(model)
    pieces = jax.tree.map(
        lambda s, x: s.shard_shape(x.shape), weight_shardings(mesh, logical_axes(model), shapes), shapes
    )
    bias = (2, 16 // (axes["fsdp"] * axes.get("context", 1)))
    assert pieces["layers"]["self_attn"]["o_proj"] == {"kernel": o_proj, "bias": bias}
    assert pieces["layers"]["mlp"]["down_proj"]["kernel"] == down_proj


@needs_8
@pytest.mark.parametrize(
    "sizes, given", [((2, 2, 1, 3), "mesh.tensor=3"), ((-1, -1, 1, 2), "mesh.fsdp=-1"), ((3, -1, 1, 1), "mesh.data=3")]
)
def test_a_mesh_that_does_not_fit_the_devices(sizes, given):
    """Catches: devices that stay idle without a word, a traceback out of jax."""
    with pytest.raises(UserError, match="8 devices") as error:
        make_mesh(MeshConfig(*sizes))
    assert given in str(error.value) and "\n" not in str(error.value)


@needs_8
def test_the_rest_of_the_devices_goes_to_the_axis_that_asks():
    """Catches: -1 that is taken for a size."""
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "context": 1,
        "tensor": 2,
    }
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}


@needs_8
def test_what_cannot_be_cut_is_named_with_the_way_out():
    """Catches: the first fault alone, or jax's message about an array of unknown origin."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    model = Llama(tiny_config())  # 2 kv heads, vocabulary 37
    with pytest.raises(UserError) as error:
        weight_shardings(mesh, logical_axes(model), abstract_params(model))
    message = str(error.value)
    for part in (
        "embed_tokens/embedding: axis vocab of 37 by mesh.tensor=4",
        "layers/self_attn/k_proj/kernel: axis kv_heads of 2 by mesh.tensor=4",
        "choose a smaller mesh axis",
    ):
        assert part in message
    assert "q_proj" not in message and "\n" not in message
    with pytest.raises(UserError, match=r"3 rows a step .* data x fsdp = 2 .* batch_size / accumulation"):
        batch_sharding(mesh, 3)


@needs_8
@pytest.mark.parametrize("axes", [(1, 1, 1, 1), (1, 2, 1, 4), (2, 2, 2, 1), (1, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_lands_on_the_mesh_as_it_is(axes, tied, tmp_path):
    """Catches: rows of one device's share that end in another place, a cast that is forgotten, a layer put twice."""
    config = tiny_config(num_key_value_heads=4, vocab_size=40, tie_word_embeddings=tied, attention_bias=True)
    model = Llama(config)
    params = random_params(model)
    save_hf(str(tmp_path / "model"), config, params)
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    shardings = weight_shardings(mesh, logical_axes(model), abstract_params(model))
    dtypes = jax.tree.map(lambda x: jnp.dtype("float32" if x.ndim == 2 else "bfloat16"), params)
    placed = place_weights(config, open_hf(str(tmp_path / "model"))[1], shardings, dtypes)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    jax.tree.map(lambda x, y, d: np.testing.assert_array_equal(x, y.astype(d)), placed, params, dtypes)
    assert jax.tree.map(lambda x: jnp.dtype(x.dtype), placed) == dtypes


@pytest.mark.slow
def test_two_hosts_read_half_a_model_each(tmp_path):
    """Catches: every host reading everything, though its shards are columns of what lies in rows; wrong shards."""
    config = tiny_config(
        hidden_size=512, intermediate_size=4096, vocab_size=8192, num_attention_heads=8, num_key_value_heads=4
    )
    model = Llama(config)
    params = random_params(model)
    save_hf(str(tmp_path / "model"), config, params)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "tests/helpers/place_on_two_hosts.py", port]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": "."}
    hosts = [
        subprocess.Popen([*command, str(i), str(tmp_path / "model")], stdout=subprocess.PIPE, env=environment)
        for i in range(2)
    ]
    reports = [json.loads(host.communicate(timeout=300)[0].splitlines()[-1]) for host in hosts]
    # The operating system maps pages around the ones that are asked for: a half and some of it, in tensors this small.
    assert all(0.4 < report["read"] < 0.75 for report in reports), [r["read"] for r in reports]
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    seen = 0
    for report in reports:
        assert report["shards"].keys() == leaves.keys()
        for name, shards in report["shards"].items():
            for index, digest in shards.items():
                part = np.asarray(leaves[name])[eval(index)]
                assert hashlib.sha256(np.ascontiguousarray(part)).hexdigest() == digest, (name, index)
                seen += part.size < leaves[name].size
    assert seen > 20
