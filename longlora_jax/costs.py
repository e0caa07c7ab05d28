"""What a training step costs by formula: FLOPs as the paper counts them, memory on a device."""

import math

import jax

from longlora_jax import run
from longlora_jax.config import Config


def forward_flops(config: Config) -> dict[str, int]:
    """FLOPs of one forward pass of one row of seq_len tokens: {ffn, proj, attention, others, total}.

    Counted as the paper does (arXiv:2309.12307, appendix): two for a multiplication and an addition; attention as if it
    were not causal, 4 T^2 N H L under full attention and a group in place of the second T under groups; others is the
    output projection.
    """
    c, t = config.model, config.seq_len
    assert c is not None
    heads, kv_heads = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    seen = config.attention.group_tokens(t) or t
    flops = {
        "ffn": 6 * t * c.hidden_size * c.intermediate_size * c.num_hidden_layers,
        "proj": 2 * t * c.hidden_size * (2 * heads + 2 * kv_heads) * c.num_hidden_layers,
        "attention": 4 * t * seen * heads * c.num_hidden_layers,
        "others": 2 * t * c.hidden_size * c.vocab_size,
    }
    return flops | {"total": sum(flops.values())}


def step_flops(config: Config, forward: dict[str, int]) -> int:
    """FLOPs of one row's training step: useful ones, not what remat computes again.

    Adapters leave the kernels frozen: a frozen matrix costs its forward and the gradient of its input, once each.
    """
    matrices = forward["ffn"] + forward["proj"]
    return (2 if config.mode != "full" else 3) * matrices + 3 * forward["attention"] + 2 * forward["others"]


def estimate(config: Config, mesh) -> dict[str, int]:
    """Bytes on a device by hand: {weights, trainables, optimizer, block_inputs, working_set, gathered, total}.

    What is held between steps is exact. block_inputs are what the backward pass keeps of every layer; working_set, what
    one block needs at its worst, in bytes a token; gathered, the weights of two layers, lm_head and the gradient of the
    embedding. The constants 8, 11 and 8 are fitted to the compiler's counts in benchmarks/tpu_plans.json, which this
    meets within a tenth; remat `none` and `attention` were not fitted.
    """
    c = config.model
    assert c is not None
    model = run.build_model(config, mesh)
    state, frozen = run.abstract_state(config, model, mesh)

    def held(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    tokens = config.batch_size // config.accumulation * config.seq_len // ways
    tensor, layers, d = mesh.shape["tensor"], c.num_hidden_layers, c.hidden_size
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    kept = {
        "block": layers * d,
        "offload": 8 * d,  # those on their way to the host and back
        "attention": layers * (d + (heads + d) // tensor),
        "none": layers * (8 * d + (2 * heads + 4 * c.intermediate_size) // tensor),
    }
    matrices = d * (heads + c.num_attention_heads * c.head_dim + 3 * c.intermediate_size)
    found = {
        "weights": held(frozen),
        "trainables": held(state.trainable),
        "optimizer": held(state.opt_state),
        "block_inputs": 2 * tokens * kept[config.remat],
        "working_set": tokens * (8 * c.intermediate_size // tensor + 11 * d),
        "gathered": 2 * 2 * matrices // tensor + (2 + 4) * c.vocab_size * d // tensor,
    }
    return found | {"total": sum(found.values())}
