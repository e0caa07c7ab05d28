"""The optimizer of a run: schedule, clipping and AdamW over the trainable tree alone."""

import optax

from longlora_jax.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then constant, or cosine or linear decay to end_ratio of it."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.end_ratio),
        "linear": optax.linear_schedule(peak, peak * config.end_ratio, rest),
    }[config.schedule]
    # The first step already learns: step 0 of n warm-up steps runs at 1/n of the peak.
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, decay], [warmup]) if warmup else decay


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW. Give it the trainable partition: it keeps two float32 moments a leaf."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
