"""NEFTune: noise of the paper's size on the embeddings, in training alone, the same on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import random_batch, random_params, tiny_config

from longlora_jax.config import Config, LoraConfig, MeshConfig, validate
from longlora_jax.errors import UserError
from longlora_jax.model import decoder as model_room
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes, neftune_noise
from longlora_jax.model.trainable import partition, trainable_mask
from longlora_jax.parallel.sharding import batch_sharding, make_mesh, weight_shardings
from longlora_jax.training import run
from longlora_jax.training.step import TrainState, jit_train_step, loss_sums, train_step

KEY = jax.random.PRNGKey(3)
ALPHA = 5.0


@pytest.mark.parametrize("packed", [False, True])
def test_noise_is_uniform_within_the_papers_bound(packed):
    """Catches: a normal distribution, noise in 0 to 1, a bound by the window where rows are packed."""
    b, t, d = 2, 64, 48
    segments = np.array([[1] * 48 + [2] * 12 + [0] * 4, [1] * 64])
    lengths = np.array([[48] * 48 + [12] * 12 + [4] * 4, [64] * 64]) if packed else np.full((b, t), t)
    noise = neftune_noise(KEY, jnp.zeros((b, t, d)), ALPHA, jnp.asarray(segments) if packed else None)
    share = np.asarray(noise) / (ALPHA / np.sqrt(lengths * d))[..., None]
    for length in np.unique(lengths):
        here = share[lengths == length].ravel()
        n = here.size  # 192 or more
        assert np.abs(here).max() <= 1 + 1e-6
        assert 1 - np.abs(here).max() < 10 / n  # the largest of n is within 10/n but once in e^10
        assert abs(here.mean()) < 5 / np.sqrt(3 * n)  # five deviations of a mean, of deviation 1/sqrt(3)
        np.testing.assert_allclose((here**2).mean(), 1 / 3, atol=5 * np.sqrt(4 / 45 / n))  # likewise
    assert len(np.unique(noise)) > 0.99 * noise.size  # nothing is repeated over rows, tokens or features


def test_noise_has_the_type_of_the_embeddings():
    """Catches: activations that become float32 behind the embedding, and twice the memory."""
    assert neftune_noise(KEY, jnp.zeros((1, 8, 4), jnp.bfloat16), ALPHA).dtype == jnp.bfloat16


LORA = LoraConfig(rank=2, targets=("q_proj",))  # one of them compiles faster than four
MODELS = {alpha: Llama(tiny_config(), lora=LORA, neftune_alpha=alpha) for alpha in (0.0, ALPHA)}
PARAMS = random_params(MODELS[0.0])
BATCH = random_batch(1, 16)


def test_it_is_added_to_the_embeddings_and_nowhere_else(monkeypatch):
    """Catches: noise on the output projection, on every block, or on the weights themselves."""
    shift = jnp.linspace(-0.3, 0.5, 16)  # one and the same for every token: an embedding table moved by it
    monkeypatch.setattr(model_room, "neftune_noise", lambda key, x, alpha, segments: jnp.broadcast_to(shift, x.shape))
    table = PARAMS["embed_tokens"]["embedding"]
    moved = PARAMS | {"embed_tokens": {"embedding": table + jnp.broadcast_to(shift, table.shape)}}

    def logits(alpha, params):
        return jax.jit(MODELS[alpha].apply)({"params": params}, BATCH["tokens"], rngs={"dropout": KEY})

    np.testing.assert_array_equal(logits(ALPHA, PARAMS), logits(0.0, moved))


def test_evaluation_is_without_noise_and_training_has_it():
    """Catches: a perplexity measured under noise; an alpha that nothing reads; random numbers drawn for nothing."""
    sums = functools.partial(loss_sums, PARAMS, BATCH, loss_chunk=16)
    traced = {
        (a, k is None): jax.make_jaxpr(lambda a=a, k=k: sums(model=MODELS[a], dropout_key=k))()
        for a in MODELS
        for k in (None, KEY)
    }
    draws = {case: "random_bits" in str(jaxpr) or "threefry" in str(jaxpr) for case, jaxpr in traced.items()}
    assert draws == {(0.0, True): False, (0.0, False): False, (ALPHA, True): False, (ALPHA, False): True}
    assert str(traced[ALPHA, True]) == str(traced[0.0, True])


def start(model, params, optimizer, **options):
    trains, frozen = partition(params, trainable_mask(params, "longlora"))
    return TrainState.create(model=model, optimizer=optimizer, trainable=trains, loss_chunk=16, **options), frozen


def test_every_step_and_every_part_draws_its_own_noise():
    """Catches: the same noise at every step or in every part of a batch."""
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), BATCH)
    state, frozen = start(MODELS[ALPHA], PARAMS, optax.set_to_zero(), accumulation=2)
    one = jax.jit(lambda key: loss_sums(PARAMS, BATCH, model=MODELS[ALPHA], loss_chunk=16, dropout_key=key))
    step, seen = jax.jit(train_step), set()
    for number in range(2):
        parts = [one(key) for key in jax.random.split(jax.random.fold_in(state.dropout_key, number))]
        seen |= {float(total) for total, _ in parts}
        state, values = step(state, frozen, twice)
        np.testing.assert_allclose(values["loss"], sum(p[0] for p in parts) / sum(p[1] for p in parts), rtol=1e-6)
    assert len(seen) == 4


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
def test_embeddings_on_a_mesh_get_the_noise_of_one_device():
    """Catches: every device with the same noise for its own part."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2), jax.devices())
    x = jnp.zeros((4, 16, 48))
    placed = jax.device_put(x, jax.NamedSharding(mesh, P("data", "context")))
    noise = jax.jit(lambda x: neftune_noise(KEY, x, ALPHA))
    np.testing.assert_array_equal(noise(placed), noise(x))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
def test_a_mesh_draws_the_noise_of_one_device():
    """Catches: the same in a whole step, and a run that changes with its mesh."""

    def step_on(mesh):
        sizes = tiny_config(num_key_value_heads=4, vocab_size=40, num_hidden_layers=1)
        model = Llama(sizes, lora=LORA, mesh=mesh, neftune_alpha=50.0)
        params = jax.device_put(
            random_params(model), weight_shardings(mesh, logical_axes(model), abstract_params(model))
        )
        state, frozen = start(model, params, optax.sgd(0.5))
        state = jax.tree.map(lambda x: x if x.committed else jax.device_put(x, jax.NamedSharding(mesh, P())), state)
        batch = random_batch(4, 16, vocab_size=40)
        batch["segment_ids"] = jnp.asarray(np.where(np.arange(16) < 10, 1, 2) * np.ones((4, 1)), jnp.int32)
        after, values = jit_train_step(state)(state, frozen, jax.device_put(batch, batch_sharding(mesh, 4)))
        return float(values["loss"]), float(values["grad_norm"])

    alone = step_on(make_mesh(MeshConfig(), jax.devices()[:1]))
    together = step_on(make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2), jax.devices()))
    np.testing.assert_allclose(together, alone, rtol=1e-5)  # float32 sums in another order


def test_the_config_reaches_the_model():
    """Catches: a field of the config that nothing reads, or a negative alpha taken as given."""
    config = Config(seq_len=16, steps=1, mode="full", model=tiny_config(), neftune_alpha=ALPHA)
    config.data.tokenizer = config.data.path = "."
    validate(config)
    assert run.build_model(config).neftune_alpha == ALPHA
    for wrong in (-1.0, float("nan"), float("inf")):
        config.neftune_alpha = wrong
        with pytest.raises(UserError, match="neftune_alpha"):
            validate(config)
