"""What a training step costs by formula: FLOPs as the paper counts them, memory on a device, what is sent."""

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from longlora_jax.attention.context_parallel import HEADS, NEIGHBOUR, RING, TURNS, exchange, heads_passed
from longlora_jax.attention.kernels import platform
from longlora_jax.config import Config, remat_fault
from longlora_jax.model.codes import Quantization
from longlora_jax.model.layers import patterns_of, windows_of
from longlora_jax.model.losses import CHUNK
from longlora_jax.model_config import ModelConfig
from longlora_jax.training import run

log = logging.getLogger(__name__)

SPARE = 0.9  # of a device's memory that an estimate may fill: it is right within a tenth
# Measured on an H200: dots, attention, block in this order for a 7B. none is not among them: it needs the most room,
# and was slower than block for a model of 135M.
FASTEST_FIRST = ("dots", "attention", "block", "offload")


def forward_flops(config: Config) -> dict[str, int]:
    """FLOPs of one forward pass of one row of seq_len tokens: {ffn, proj, attention, others, total}.

    Counted as the paper does (arXiv:2309.12307, appendix): two for a multiplication and an addition; attention as if it
    were not causal, 4 T^2 N H L under full attention and a group, or a layer's own window, in place of the second T;
    others is the output projection.
    """
    c, t = config.model, config.seq_len
    assert c is not None
    heads, kv_heads = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    seen = config.attention.group_tokens(t) or t
    flops = {
        "ffn": 2 * _mlp_matrices(c) * t * c.hidden_size * c.intermediate_size * c.num_hidden_layers,
        "proj": 2 * t * c.hidden_size * (2 * heads + 2 * kv_heads) * c.num_hidden_layers,
        "attention": 4 * t * heads * sum(min(window, t) or seen for window in c.windows),
        "others": 2 * t * c.hidden_size * c.vocab_size,
    }
    return flops | {"total": sum(flops.values())}


def _mlp_matrices(c: ModelConfig) -> int:
    return 3 if c.gated_mlp else 2


def step_flops(config: Config, forward: dict[str, int]) -> int:
    """FLOPs of one row's training step: useful ones, not what remat computes again.

    Adapters leave the kernels frozen: a frozen matrix costs its forward and the gradient of its input, once each.
    """
    matrices = forward["ffn"] + forward["proj"]
    return (2 if config.mode != "full" else 3) * matrices + 3 * forward["attention"] + 2 * forward["others"]


def estimate(config: Config, mesh) -> dict[str, int]:
    """Bytes on a device by hand, the total and its parts.

    weights, trainables and optimizer, held between steps, are exact. gradients: float32, and twice where parts of an
    update are summed. block_inputs: what the backward pass keeps of every layer. working_set and gathered: what one
    block needs at its worst, in bytes a token, and the kernels of its layer, or the loss's logits with their softmax,
    and the output projection, whichever is more.
    Kernels that are cut are gathered: on TPUs those of three layers (what is computed with, its gradients', and the
    next), of a packed base as codes; on GPUs those of one, but XLA keeps all of o_proj or down_proj a second time,
    turned so that it can gather them, where they are cut along their last axis (parallel/sharding.py). A tied embedding
    that trains is gathered in float32, copied to the dtype of activations, and has a gradient of all of it; on TPUs
    the gradient alone counts. Of a packed base one kernel is unpacked.
    The constants 3, 8, 11 and 7 are fitted to what the compilers of TPUs and GPUs count (benchmarks/tpu_plans.json,
    tpu_plans_more.json and gpu_plans.json, which this meets within 7% but for a packed base on one v6e); of remat
    `none`, `dots` and `attention` one count each was taken. float32 takes twice the activations of bfloat16.
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
    attended = c.num_attention_heads * c.head_dim
    heads = attended + 2 * c.num_key_value_heads * c.head_dim
    size = jnp.dtype(config.dtype).itemsize
    kept = {
        "block": layers * d,
        "offload": 7 * d,  # those on their way to the host and back
        "attention": layers * (d + (heads + d) // tensor),
        "dots": layers * (2 * d + (heads + attended + (_mlp_matrices(c) - 1) * c.intermediate_size) // tensor),
        "none": layers * (12 * d + (2 * heads + 4 * c.intermediate_size) // tensor),
    }
    cut, gpu = mesh.shape["fsdp"] * mesh.shape["context"], platform() == "gpu"
    attention, mlp = d * (heads + attended), _mlp_matrices(c) * d * c.intermediate_size
    packed, projection = packed_bytes(config), c.vocab_size * d
    block = size // 2 * tokens * ((8 * c.intermediate_size // tensor + 5 * d) // config.chunks + 6 * d)
    logits = 2 * 4 * min(CHUNK, tokens) * c.vocab_size
    for_block = for_loss = 0.0
    if cut > 1:
        for_block = (1 if gpu else 3) * (size if packed is None else packed) * (attention + mlp)
        for_loss = size * projection
        if gpu and packed is None:
            read = (attended, c.num_attention_heads), (c.intermediate_size, c.intermediate_size)
            for_block += size * layers * d * sum(n for n, units in read if units % (tensor * cut)) / cut
    if packed is not None:
        for_block += size * d * c.intermediate_size
    if c.tie_word_embeddings and config.mode not in ("lora", "lora_norm"):
        for_block += (size if cut == 1 else size + 4 + 4 if gpu else 4) * projection
        for_loss = for_block
    working, gathered = max((block, for_block), (logits, for_loss), key=sum)
    found = {
        "weights": held(frozen),
        "trainables": held(state.trainable),
        "optimizer": held(state.opt_state),
        "gradients": held(state.trainable) * (2 if config.accumulation > 1 else 1),
        "block_inputs": size * tokens * kept[config.remat],
        "working_set": working,
        "gathered": int(gathered) // tensor,
    }
    return found | {"total": sum(found.values())}


def packed_bytes(config: Config) -> float | None:
    """Bytes of a number of the blocks' matrices in a packed base: its code, and its share of a scale; else None."""
    q = Quantization.of(config.base_quantization)
    if q is None:
        return None
    return 1.0 if q.kind == "int8" else 0.5 + (1 if q.nested else 4) / q.block


def host_bytes(config: Config, mesh) -> int:
    """Bytes of a device's share of the host's memory: the blocks' inputs of every layer, if they are offloaded."""
    if config.remat != "offload":
        return 0
    assert config.model is not None
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    tokens = config.batch_size // config.accumulation * config.seq_len // ways
    return tokens * config.model.num_hidden_layers * config.model.hidden_size * jnp.dtype(config.dtype).itemsize


def choose_remat(config: Config, mesh, limit: float) -> Config:
    """The config with the fastest remat that estimate() puts within SPARE of limit bytes a device, else offload."""
    for remat in FASTEST_FIRST:
        chosen = dataclasses.replace(config, remat=remat)
        if not remat_fault(chosen) and estimate(chosen, mesh)["total"] <= SPARE * limit:
            break
    return chosen


def resolve_remat(config: Config, mesh) -> Config:
    """The config with remat="auto" made a name: by the memory of this process's devices, block where they tell none.

    CPUs tell none, and computing a block again is faster there than keeping it (benchmarks/train_step.json).
    """
    if config.remat != "auto":
        return config
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    if not all(limits):
        log.info("remat auto: block, as these devices do not tell their memory")
        return dataclasses.replace(config, remat="block")
    config = choose_remat(config, mesh, min(limits))
    needed = estimate(config, mesh)["total"] / 2**30
    log.info("remat auto: %s, %.2f of %.2f GiB a device by estimate", config.remat, needed, min(limits) / 2**30)
    return config


def sent(config: Config, mesh) -> list[dict[str, Any]]:
    """What a step sends by formula, as collectives.totals has it of a compiled one: [{"op", "axis", "bytes"}].

    Bytes are those of the results on one device. For each part of an update: blocks' kernels, packed ones as they are,
    are gathered layer by layer, forward and again backward, lm_head once; looked-up embeddings go home and their
    gradients back; attention exchanges what context_parallel says, forward, again for the backward pass, and as
    gradients; the other trainables' gradients are summed. A tensor axis sums eight arrays of activations a layer (o,
    down; o again; the gradients of q, k, v, gate and up) and two of embeddings; heads that XLA moves about over it are
    not counted, nor tokens and norms. The gradients that go round a ring are float32. In chunks, neighbours are asked
    once more: a chunk's attention is computed again.
    """
    c = config.model
    assert c is not None
    size, shape = jnp.dtype(config.dtype).itemsize, mesh.shape
    rows = max(config.batch_size // (shape["data"] * shape["fsdp"]), config.accumulation)  # of a device, a step
    tokens = rows * config.seq_len // shape["context"]
    h, d, layers, tensor = c.head_dim, c.hidden_size, c.num_hidden_layers, shape["tensor"]
    heads, kv_heads = c.num_attention_heads * h // tensor, c.num_key_value_heads * h // tensor
    block = d * (2 * heads + 2 * kv_heads + _mlp_matrices(c) * c.intermediate_size // tensor)
    lm_head = d * c.vocab_size // tensor
    packed = packed_bytes(config)
    kernels = 2 * layers * block * (size if packed is None else packed)
    pattern = run.build_model(config).pattern
    rank = 0 if config.mode == "full" else config.lora.rank
    wide = {"q_proj": heads, "o_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    adapters = layers * rank * sum(d + wide.get(name, c.intermediate_size // tensor) for name in config.lora.targets)
    trained = layers * block + lm_head if config.mode == "full" else adapters
    # A tied embedding that trains is gathered twice, and its gradient as the output projection's is one of all of it.
    tied = lm_head if c.tie_word_embeddings and config.mode not in ("lora", "full") else 0

    def row(op: str, axes: tuple[str, ...], elements: float, bytes_each: int = size) -> dict[str, Any] | None:
        axes = tuple(axis for axis in axes if shape[axis] > 1)
        return {"op": op, "axis": "+".join(axes), "bytes": int(elements * bytes_each)} if axes and elements else None

    context = shape["context"]
    found = [
        row("all-gather", ("fsdp", "context"), config.accumulation * (kernels + size * (lm_head + tied)), 1),
        row("all-to-all", ("fsdp", "context"), 2 * tokens * d),
        row("all-reduce", ("data", "fsdp", "context"), config.accumulation * (trained + tied), 4),
        row("all-reduce", ("tensor",), (8 * layers + 2) * tokens * d),
    ]
    permuted = swapped = travelled = 0
    for one, count in zip(patterns_of(c, pattern), map(c.windows.count, windows_of(c)), strict=True):
        how = exchange(one, config.seq_len, c.num_attention_heads, c.num_key_value_heads, context, tensor)
        if how in (NEIGHBOUR, TURNS):  # keys and values; of groups, half a group of the shifted half of the heads
            tokens_sent = one.group_size - 1 if one.name == "window" else one.group_size / 4
            permuted += (6 if config.chunks == 1 else 8) * count * rows * tokens_sent * kv_heads
        if how == HEADS:
            swapped += 3 * count * tokens * 2 * h * sum(heads_passed(heads // h, kv_heads // h, context))
        if how == RING:  # tokens are dealt and gathered; keys and values go round, and their gradients come home
            passed = 2 * heads + 2 * kv_heads + (context - 1) * 2 * kv_heads
            permuted += (3 if config.chunks == 1 else 4) * count * tokens * passed
            travelled += count * tokens * 4 * context * 2 * kv_heads
    permutes = size * permuted + travelled
    found += [row("collective-permute", ("context",), permutes, 1), row("all-to-all", ("context",), swapped)]
    return sorted(filter(None, found), key=lambda row: -row["bytes"])
