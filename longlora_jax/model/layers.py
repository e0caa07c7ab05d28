"""What differs from layer to layer of a model: its window and its rotary embedding, as numbers that a scan hands out.

All layers have the same weights, so one scanned block is compiled whatever the depth; a layer's numbers choose between
the patterns and the rotary embeddings that its model has.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlora_jax.attention.patterns import Pattern
from longlora_jax.attention.rope import rope_frequencies, rope_tables
from longlora_jax.model_config import GLOBAL, LOCAL, ModelConfig


class Kinds(NamedTuple):
    """Of every layer [L] int32: which of windows_of and which of ropes_of it has."""

    window: jax.Array
    rope: jax.Array


def windows_of(config: ModelConfig) -> tuple[int, ...]:
    """The different windows of a model's layers in tokens, 0 for full attention."""
    return tuple(dict.fromkeys(config.windows))


def ropes_of(config: ModelConfig) -> tuple[str, ...]:
    """The different rotary embeddings of a model's layers."""
    return tuple(dict.fromkeys(config.ropes))


def kinds_of(config: ModelConfig) -> Kinds | None:
    """None where all layers are alike."""
    windows, ropes = windows_of(config), ropes_of(config)
    if len(windows) == len(ropes) == 1:
        return None
    return Kinds(
        jnp.asarray([windows.index(window) for window in config.windows], jnp.int32),
        jnp.asarray([ropes.index(rope) for rope in config.ropes], jnp.int32),
    )


def patterns_of(config: ModelConfig, pattern: Pattern) -> tuple[Pattern, ...]:
    """How each of windows_of attends in a model whose full layers are given a pattern."""
    softcap = config.attn_logit_softcapping or 0.0
    full = Pattern(pattern.name, pattern.group_size, pattern.full_below, softcap)
    return tuple(Pattern("window", window, softcap=softcap) if window else full for window in windows_of(config))


def frequencies_of(config: ModelConfig, seq_len: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """The frequencies [ropes_of, R/2] f32 for a forward pass of seq_len tokens, and each one's factor on cos and sin.

    A layer without rotary embedding has frequencies of 0: nothing turns.
    """
    rows, factors = [], []
    for kind in ropes_of(config):
        theta = config.rope_local_base_freq if kind == LOCAL else config.rope_theta
        inv_freq, factor = rope_frequencies(
            head_dim=config.rotary_dim,
            theta=theta or config.rope_theta,
            scaling=config.rope_scaling if kind == GLOBAL else None,
            seq_len=seq_len,
        )
        rows.append(inv_freq if kind in (GLOBAL, LOCAL) else np.zeros_like(inv_freq))
        factors.append(factor)
    return np.stack(rows), tuple(factors)


def tables_of(frequencies, factors, positions) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, R/2] f32 of positions [B, T]; [ropes, B, T, R/2] where there are more rotary embeddings.

    frequencies: [ropes, R/2], or [ropes, B, R/2] where rows have their own; factors: [ropes].
    """
    frequencies = jnp.asarray(frequencies)
    rows = frequencies if frequencies.ndim == 2 else frequencies[:, :, None]
    tables = [rope_tables(positions, row, factor) for row, factor in zip(rows, factors, strict=True)]
    cos, sin = zip(*tables, strict=True)
    return (cos[0], sin[0]) if len(tables) == 1 else (jnp.stack(cos), jnp.stack(sin))
