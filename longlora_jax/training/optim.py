"""The optimizer of a run: schedule, clipping and AdamW over the trainable tree alone."""

import functools

import jax
import optax

from longlora_jax.config import OptimConfig
from longlora_jax.model.trainable import group_of


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
    """Clip by global norm, then AdamW. Give it the trainable partition: it keeps two float32 moments a leaf.

    Leaves with a rate of their own follow the same schedule, weight decay included, at that rate's share of it.
    """
    steps_of_adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        # optax.adamw, whose own mask would change the tree of a checkpoint.
        optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
            optax.stateless(functools.partial(_decayed, config)),
            optax.scale_by_learning_rate(make_schedule(config, steps)),
        ),
    )
    rates = own_rates(config)
    if not rates:  # a checkpoint holds no place for what does nothing
        return steps_of_adamw

    def at_own_rate(path, update):
        group = group_of(tuple(key.key for key in path))
        return update * (rates.get(group, config.learning_rate) / config.learning_rate)

    scale = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(at_own_rate, updates))
    return optax.chain(steps_of_adamw, scale)


def _decayed(config: OptimConfig, updates, params):
    """The updates with weight decay of matrices: a norm's scale belongs near 1, a bias where it is."""

    def leaf(path, update, weight):
        names = tuple(getattr(key, "key", key) for key in path)  # any tree will do, as optax takes any
        spared = not config.decay_norms and (group_of(names) == "norm" or names[-1] == "bias")
        return update if spared or not config.weight_decay else update + config.weight_decay * weight

    return jax.tree_util.tree_map_with_path(leaf, updates, params)


def own_rates(config: OptimConfig) -> dict[str, float]:
    """The groups of trainable.group_of whose learning rate is not the general one."""
    rates = {
        "embedding": config.embedding_learning_rate,
        "lm_head": config.embedding_learning_rate,
        "norm": config.norm_learning_rate,
    }
    return {group: rate for group, rate in rates.items() if rate}
