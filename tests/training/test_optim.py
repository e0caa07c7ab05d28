"""The optimizer: schedules by number, and AdamW with the paper's betas against one written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from longlora_jax.config import Config, DataConfig, MeshConfig, OptimConfig, validate
from longlora_jax.errors import UserError
from longlora_jax.parallel.sharding import make_mesh
from longlora_jax.training import run
from longlora_jax.training.optim import make_optimizer, make_schedule, own_rates


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


@pytest.mark.parametrize(
    "name, value",
    [
        *(("learning_rate", x) for x in (-1e-3, float("nan"), float("inf"))),
        *(("clip_norm", -1.0), ("warmup_steps", -3), ("end_ratio", -2.0), ("weight_decay", -0.1), ("eps", -1.0)),
        *(("beta1", 1.0), ("beta2", -0.1)),
    ],
)
def test_numbers_that_no_optimizer_has_are_refused(name, value):
    """Catches: a run that climbs, or whose weights are NaN from its second step, and that ends "done"."""
    config = Config(init_from="base", seq_len=16, steps=1, data=DataConfig(path="a.txt"))
    validate(config)
    setattr(config.optim, name, value)
    with pytest.raises(UserError, match=f"optim.{name}={value} must be"):
        validate(config)


def test_a_field_of_another_type_says_which_it_must_be():
    """Catches: a message whose type is the end of Python's name for it."""
    config = Config(init_from="base", seq_len=16, steps=1, data=DataConfig(path="a.txt", hold_out="run.py"))  # pyright: ignore
    with pytest.raises(
        UserError, match=r"data.hold_out='run.py' is of type str, it must be a tuple of str, as in \('a',\)"
    ):
        validate(config)


def test_a_run_shorter_than_its_warm_up():
    """A division by zero, or a negative number of steps, in a trial of two steps."""
    np.testing.assert_allclose(
        rates(OptimConfig(schedule="cosine", learning_rate=1.0), 2), [0.05, 0.1, 0.15], rtol=1e-6
    )


def by_hand(params, gradients, rates, *, beta1, beta2, eps, decay, clip):
    """AdamW in float64 (arXiv:1711.05101, algorithm 2, decay times the rate) after a clip of the whole norm.

    rates: one a step, or one a step and leaf.
    """
    rates = np.broadcast_to(np.asarray(rates).reshape(len(gradients), -1), (len(gradients), len(params)))
    params = [np.asarray(p, np.float64) for p in params]
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for step, (grads, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads))
        grads = [g * min(1, clip / norm) if clip else g for g in grads]
        for i, g in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            adam = m[i] / (1 - beta1**step) / (np.sqrt(v[i] / (1 - beta2**step)) + eps)
            params[i] = params[i] - rate[i] * (adam + decay * params[i])
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


# A leaf of every group that a run can train, and its rate.
GROUPS = {
    "embed_tokens": {"embedding": 0.3},
    "layers": {
        "input_layernorm": {"scale": 0.05},
        "self_attn": {"q_proj": {"lora_a": 0.1, "lora_b": 0.1, "kernel": 0.1}},
        "mlp": {"up_proj": {"kernel": 0.1}},
    },
    "lm_head": {"kernel": 0.3},
    "norm": {"scale": 0.05},
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_groups_have_their_own_rates(decay):
    """Catches: a rate that reaches another group, the moments, the clip, or the step but not the decay; no warm-up."""
    config = OptimConfig(
        learning_rate=0.1,
        embedding_learning_rate=0.3,
        norm_learning_rate=0.05,
        schedule="linear",
        warmup_steps=2,
        weight_decay=decay,
        decay_norms=True,
    )
    rng, steps = np.random.default_rng(0), 6
    draw = lambda: jax.tree.map(lambda _: rng.standard_normal((3, 4), np.float32), GROUPS)  # noqa: E731
    params, gradients = draw(), [draw() for _ in range(steps)]
    optimizer = make_optimizer(config, steps)
    update = jax.jit(optimizer.update)
    ours, state = params, optimizer.init(params)
    for grads in gradients:
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    schedule = rates(config, steps)[:-1] / config.learning_rate
    oracle = by_hand(
        jax.tree.leaves(params),
        [jax.tree.leaves(g) for g in gradients],
        schedule[:, None] * np.array(jax.tree.leaves(GROUPS)),
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        decay=decay,
        clip=config.clip_norm,
    )
    for x, y in zip(jax.tree.leaves(ours), oracle, strict=True):  # six float32 steps of 0.3 at values of 1
        np.testing.assert_allclose(x, y, atol=5e-6)


def test_one_rate_for_all_keeps_the_checkpoints_form():
    """Catches: runs that cannot resume after an update, for the place of a transformation that does nothing."""
    params = jax.tree.map(lambda _: jnp.zeros(3), GROUPS)
    state = make_optimizer(OptimConfig(), 10).init(params)
    before = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1.0))).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    assert own_rates(OptimConfig()) == {}
    assert own_rates(OptimConfig(norm_learning_rate=0.1)) == {"norm": 0.1}


def test_moments_find_their_places_on_a_mesh():
    """Catches: an optimizer whose state the plan and the restore cannot place, when groups have rates."""
    config = Config(seq_len=16, steps=1, mode="full", model=tiny_config(), optim=OptimConfig(norm_learning_rate=1e-4))
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    state, _ = run.abstract_state(config, run.build_model(config, mesh), mesh)
    placed = [leaf.sharding for leaf in jax.tree.leaves(state.opt_state)]
    assert len(placed) > 2 * len(jax.tree.leaves(state.trainable)) and None not in placed


@pytest.mark.parametrize(
    ("mode", "options", "fault"),
    [
        ("lora", {"embedding_learning_rate": 1e-4}, "mode='lora' does not train"),
        ("lora_norm", {"embedding_learning_rate": 1e-4}, "mode='lora_norm' does not train"),
        ("lora_embedding", {"norm_learning_rate": 1e-4}, "mode='lora_embedding' does not train"),
        ("longlora", {"norm_learning_rate": -1.0}, "must be 0"),
        ("longlora", {"norm_learning_rate": float("nan")}, "must be 0"),
        ("longlora", {"norm_learning_rate": 1e-4, "learning_rate": 0.0}, "set that above 0"),
    ],
)
def test_rates_without_effect_are_refused(mode, options, fault):
    """Catches: a rate of what does not train, and a division by zero."""
    config = Config(seq_len=16, steps=1, init_from="x", mode=mode, optim=OptimConfig(**options))
    with pytest.raises(UserError, match=fault):
        validate(config)
