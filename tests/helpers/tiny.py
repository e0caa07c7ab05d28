"""Models that compile in seconds, with weights and batches in which no mistake can hide."""

import jax
import jax.numpy as jnp
import numpy as np

from longlora_jax.config import ModelConfig
from longlora_jax.model.decoder import Llama, abstract_params


def tiny_config(**options) -> ModelConfig:
    """Two layers, D 16, 4 heads of 6 over 2 kv heads, vocabulary 37: no two sizes are the same."""
    sizes = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**sizes | options)


def random_params(model: Llama, seed: int = 0):
    """Every leaf random: adapters that are zero, or norms that are all one, would hide a swap."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        x = rng.normal(size=shape.shape).astype(np.float32)
        return jnp.asarray(1 + 0.2 * x if path[-1].key == "scale" else 0.25 * x)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(model))


def random_batch(rows: int, length: int, *, vocab_size: int = 37, seed: int = 0) -> dict[str, jax.Array]:
    """A batch as data/ makes them, without segments: every token but the first is scored."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (rows, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "loss_mask": positions > 0}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
