"""Training states of a tiny model."""

import jax
from tiny import random_params, tiny_config

from longlora_jax.attention.patterns import FULL
from longlora_jax.config import LoraConfig, OptimConfig
from longlora_jax.model.decoder import Llama
from longlora_jax.model.trainable import partition, trainable_mask
from longlora_jax.training.optim import make_optimizer
from longlora_jax.training.step import TrainState

# Two of them: one is compiled faster than four, and o_proj is the one that reads two axes.
LORA = LoraConfig(rank=3, targets=("q_proj", "o_proj"))
ADAMW = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1), steps=10)


def start(mode="longlora", optimizer=ADAMW, *, pattern=FULL, lora=LORA, accumulation=1):
    """(TrainState, frozen) of a tiny model with random weights, on one device."""
    model = Llama(tiny_config(), lora=None if mode == "full" else lora, pattern=pattern)
    params = random_params(model)
    trains, frozen = partition(params, trainable_mask(params, mode))
    state = TrainState.create(
        model=model, optimizer=optimizer, trainable=trains, accumulation=accumulation, loss_chunk=13
    )
    return jax.device_put((state, frozen), jax.devices()[0])


def state_at(step: int, **options):
    """A state whose numbers say of which step they are."""
    state, _ = start("lora", **options)
    return state.replace(step=state.step + step, trainable=jax.tree.map(lambda x: x + step, state.trainable))
