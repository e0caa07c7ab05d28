"""The optimizer: schedules by number, and AdamW with the paper's betas against one written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longlora_jax.config import OptimConfig
from longlora_jax.optim import make_optimizer, make_schedule


def rates(config, steps):
    schedule = make_schedule(config, steps)
    return np.array([schedule(step) for step in range(steps + 1)])


def test_paper_schedule_is_constant_after_20_steps():
    """A first step at rate 0, a warm-up one step too long or too short, a decay that nobody asked for."""
    lr = rates(OptimConfig(), 1000)
    np.testing.assert_allclose(lr[:20], 2e-5 * np.arange(1, 21) / 20, rtol=1e-6)
    np.testing.assert_allclose(lr[19:], 2e-5, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("end_ratio", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decays_reach_their_end_with_the_last_step(name, end_ratio, warmup):
    """A decay over the wrong number of steps (warm-up counted twice or not), or to the wrong end."""
    steps = 110
    lr = rates(OptimConfig(schedule=name, learning_rate=0.5, warmup_steps=warmup, end_ratio=end_ratio), steps)
    share = np.arange(steps - warmup + 1) / (steps - warmup)
    left = (1 + np.cos(np.pi * share)) / 2 if name == "cosine" else 1 - share
    np.testing.assert_allclose(lr[warmup:], 0.5 * (end_ratio + (1 - end_ratio) * left), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(lr[:warmup], 0.5 * np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)


def test_a_run_shorter_than_its_warm_up():
    """A division by zero, or a negative number of steps, in a trial of two steps."""
    np.testing.assert_allclose(
        rates(OptimConfig(schedule="cosine", learning_rate=1.0), 2), [0.05, 0.1, 0.15], rtol=1e-6
    )


def by_hand(params, gradients, rates, *, beta1, beta2, eps, decay, clip):
    """AdamW in float64 (arXiv:1711.05101, algorithm 2, decay times the rate) after a clip of the whole norm."""
    params = [np.asarray(p, np.float64) for p in params]
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for step, (grads, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads))
        grads = [g * min(1, clip / norm) if clip else g for g in grads]
        for i, g in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            adam = m[i] / (1 - beta1**step) / (np.sqrt(v[i] / (1 - beta2**step)) + eps)
            params[i] = params[i] - rate * (adam + decay * params[i])
    return params


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(learning_rate=0.1, warmup_steps=2),
        OptimConfig(learning_rate=0.1, warmup_steps=0, clip_norm=0.0, weight_decay=0.1),
        OptimConfig(learning_rate=0.1, warmup_steps=0, beta1=0.8, beta2=0.7, eps=0.1, schedule="linear"),
    ],
    ids=["paper", "decay without clip", "other constants"],
)
def test_update_is_adamw(config):
    """The reference's beta2 of 0.999; decay that is on by default; a setting that nothing reads; a clip by leaf."""
    rng = np.random.default_rng(0)
    shapes, steps = [(3, 4), (5,)], 6
    params = [rng.standard_normal(s, np.float32) for s in shapes]
    gradients = [[rng.standard_normal(s, np.float32) * (1 + step) for s in shapes] for step in range(steps)]
    optimizer = make_optimizer(config, steps)
    update = jax.jit(optimizer.update)
    ours, state = params, optimizer.init(params)
    for grads in gradients:
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    constants = {"beta1": config.beta1, "eps": config.eps, "decay": config.weight_decay, "clip": config.clip_norm}
    oracle = by_hand(params, gradients, rates(config, steps)[:-1], beta2=config.beta2, **constants)
    for x, y in zip(ours, oracle, strict=True):  # six float32 steps of 0.1 at values of 1
        np.testing.assert_allclose(x, y, atol=3e-6)
    torch_default = by_hand(params, gradients, rates(config, steps)[:-1], beta2=0.999, **constants)
    assert max(np.abs(x - y).max() for x, y in zip(ours, torch_default, strict=True)) > 1e-3  # the difference shows


def test_defaults_are_the_papers():
    """Betas (0.9, 0.95), no weight decay, clip 1.0, 2e-5, constant after 20: method and reference differ here."""
    c = OptimConfig()
    assert (c.beta1, c.beta2, c.weight_decay, c.clip_norm) == (0.9, 0.95, 0.0, 1.0)
    assert (c.learning_rate, c.schedule, c.warmup_steps) == (2e-5, "constant", 20)


def test_small_gradients_are_not_clipped():
    """A clip that scales every gradient to norm 1: Adam would hide it, the moments do not."""
    optimizer = make_optimizer(OptimConfig(), 10)
    gradient = {"x": jnp.full((4,), 1e-3)}
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    first_moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,))
    np.testing.assert_allclose(first_moment, 1e-4, rtol=1e-6)
