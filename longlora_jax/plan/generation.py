"""What reading a prompt and writing after it will need: memory on a device, FLOPs, and the longest prompt that fits.

The prompt is one row, on the mesh that generate.load_for_generation makes. The very chunk and decode step of a session
are compiled for TPUs, and for GPUs where their compiler is installed; without it memory is by formula.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from longlora_jax.config import Config, ModelConfig, validate_model
from longlora_jax.errors import UserError
from longlora_jax.generate.generation import best_mesh
from longlora_jax.generate.session import as_read, chunk_size, fitting_chunk, trace_step
from longlora_jax.model.cache import Cache, abstract_cache, cut_of
from longlora_jax.model.codes import Quantization
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.model.quantized import is_packed
from longlora_jax.parallel import sharding
from longlora_jax.plan.chips import GIB, GPUS, Topology, compiler_of, find_topology, traced_for
from longlora_jax.plan.planner import compiled_memory, exceeded
from longlora_jax.training.resolve import extend_model
from longlora_jax.weights.hf_config import load_config

STEP = 8192  # tokens: the longest prompt is a multiple


def plan_generation(
    config: Config, topology: str, *, chunk: int | None = None, longest: bool = False
) -> dict[str, Any]:
    """What a prompt of config.seq_len tokens needs on a topology (see planner.plan), as one JSON-like dict.

    The model, its RoPE scaling, dtype and base_quantization are the config's. chunk: tokens read at once
    (session.chunk_size); longest: of the longest prompt that fits instead, and where every layer has a sliding window,
    which a prompt of any length fits then, of config.seq_len tokens or more. Raises UserError, also where not even
    STEP tokens fit.
    """
    validate_model(config)
    found = find_topology(topology)
    chunk = chunk_size(chunk, "gpu" if found.kind in GPUS else "tpu")
    if not longest:
        return _plan(config, found, topology, chunk, config.seq_len)
    # What a step needs beside weights and cache does not depend on the prompt.
    least = _plan(config, found, topology, chunk, max(STEP, chunk))
    spare = least["hbm_limit_bytes"] - least["hbm_bytes_per_device"] + least["cache_bytes_per_device"]
    steps, beyond, held = 1, 1, 0
    while held < (grown := _cache_bytes(config, found, chunk, beyond * STEP)) <= spare:
        steps, beyond, held = beyond, 2 * beyond, grown
    if grown == held:  # the windows are full
        if (tried := _plan(config, found, topology, chunk, max(config.seq_len, steps * STEP)))["fits"]:
            return tried
        beyond = steps + 1
    while beyond - steps > 1:
        middle = (steps + beyond) // 2
        fits = _cache_bytes(config, found, chunk, middle * STEP) <= spare
        steps, beyond = (middle, beyond) if fits else (steps, middle)
    for tokens in range(steps * STEP, 0, -STEP):
        if (tried := _plan(config, found, topology, chunk, tokens))["fits"]:
            return tried
    raise UserError(f"{topology} holds no prompt of {STEP} tokens of this model: take more or larger chips")


def _mesh(config: Config, found: Topology):
    """(model config, mesh, shardings of the weights)."""
    c = extend_model(config.model or load_config(config.init_from), config)
    if found.devices is None:
        make: Any = functools.partial(sharding.abstract_mesh, count=found.count)
    else:
        make = functools.partial(sharding.make_mesh, devices=found.devices)
    return c, *best_mesh(c, Quantization.of(config.base_quantization), found.count, make)


def _cache(config: Config, found: Topology, c: ModelConfig, mesh, chunk: int, tokens: int) -> Cache:
    with traced_for(found):
        return abstract_cache(c, 1, tokens, dtype=jnp.dtype(config.dtype), chunk=chunk, mesh=mesh)


def _cache_bytes(config: Config, found: Topology, chunk: int, tokens: int) -> int:
    c, mesh, _ = _mesh(config, found)
    cache = _cache(config, found, c, mesh, chunk, tokens)
    return _held((cache.keys, cache.values))


def _plan(config: Config, found: Topology, topology: str, chunk: int, tokens: int) -> dict[str, Any]:
    c, mesh, shardings = _mesh(config, found)
    quantization = Quantization.of(config.base_quantization)
    model = Llama(c, dtype=jnp.dtype(config.dtype), mesh=mesh, quantization=quantization)
    model = as_read(model) if found.devices else model
    params = _params(model, shardings)
    chunk = fitting_chunk(chunk, tokens)
    last = (tokens - 1) % chunk + 1
    cache = _cache(config, found, c, mesh, chunk, tokens)
    with traced_for(found) as options:
        limit = int(found.chip.memory_gib * GIB)
        held = {"weights": _held(params), "cache": _held((cache.keys, cache.values))}
        if found.devices:
            needed = {
                name: _compiled(model, params, cache, t, options) for name, t in (("prefill", chunk), ("decode", 1))
            }
        else:
            working = _working_set(c, mesh, chunk, jnp.dtype(config.dtype).itemsize)
            needed = dict.fromkeys(("prefill", "decode"), sum(held.values()) + working)
    cut = cut_of(1, c.num_key_value_heads, mesh)
    return {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "tokens": tokens,
        "chunk": chunk,
        "base_quantization": config.base_quantization,
        "cache_grows": not all(c.windows),
        "cache_cut": {
            "heads": math.prod(mesh.shape[axis] for axis in cut.heads),
            "sequence": math.prod(mesh.shape[axis] for axis in cut.slots),
        },
        "memory_by": "compiler" if found.devices else "formula",
        "compiler": compiler_of(found),
        "fits": max(needed.values()) <= limit,
        "hbm_bytes_per_device": max(needed.values()),
        "hbm_limit_bytes": limit,
        "prefill_bytes_per_device": needed["prefill"],
        "decode_bytes_per_device": needed["decode"],
        "weights_bytes_per_device": held["weights"],
        "cache_bytes_per_device": held["cache"],
        "prompt_flops": reading_flops(c, 0, tokens),
        "chunk_flops": reading_flops(c, tokens - last, last),
        "decode_flops": reading_flops(c, tokens, 1),
    }


def reading_flops(c: ModelConfig, before: int, new: int) -> int:
    """FLOPs of reading new tokens after so many others: two for a multiplication and an addition, pairs that are seen.

    The output projection is counted once: a session asks for the logits of the last token alone.
    """
    heads, kv_heads = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    matrices = c.hidden_size * (2 * heads + 2 * kv_heads + (3 if c.gated_mlp else 2) * c.intermediate_size)

    def pairs(window: int) -> int:
        """Of tokens with those that they see."""

        def first(tokens: int) -> int:
            hidden = max(tokens - window, 0) if window else 0
            return tokens * (tokens + 1) // 2 - hidden * (hidden + 1) // 2

        return first(before + new) - first(before)

    attention = 4 * heads * sum(map(pairs, c.windows))
    return 2 * new * matrices * c.num_hidden_layers + attention + 2 * c.hidden_size * c.vocab_size


def _params(model: Llama, shardings):
    """The weights of a model as load_for_generation places them: jax.ShapeDtypeStruct."""

    def one(path, x, place):
        packed = is_packed([key.key for key in path])
        return jax.ShapeDtypeStruct(x.shape, x.dtype if packed else model.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(one, abstract_params(model), shardings)


def _held(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _compiled(model: Llama, params, cache: Cache, t: int, options: dict[str, Any] | None) -> int:
    """Bytes on a device of the compiled step that reads t tokens."""
    try:
        return compiled_memory(trace_step(model, params, cache, t).lower().compile(compiler_options=options))["total"]
    except jax.errors.JaxRuntimeError as error:
        return exceeded(error, (params, cache))


def _working_set(c: ModelConfig, mesh, chunk: int, size: int) -> int:
    """Bytes beside weights and cache, by formula: two layers' gathered weights, a chunk's activations, logits, and
    the scores of a block in float32, where no kernel spares them."""
    tensor, gathers = mesh.shape["tensor"], mesh.size > mesh.shape["tensor"]
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layer = c.hidden_size * (heads + (3 if c.gated_mlp else 2) * c.intermediate_size)
    gathered = (2 * layer + c.hidden_size * c.vocab_size) * size // tensor if gathers else 0
    activations = chunk * size * (4 * c.hidden_size + (2 * heads + 3 * c.intermediate_size) // tensor)
    scores = 3 * 4 * chunk * 512 * max(c.num_attention_heads // tensor, 1)
    return gathered + activations + scores + 3 * 4 * c.vocab_size


def table(found: dict[str, Any]) -> str:
    """The plan as lines to read."""
    cut = found["cache_cut"]
    rows = {name: found[f"{name}_bytes_per_device"] / GIB for name in ("weights", "cache", "prefill", "decode", "hbm")}
    limit = found["hbm_limit_bytes"] / GIB
    packed = f", base in {found['base_quantization']}" if found["base_quantization"] != "none" else ""
    endless = found["fits"] and not found["cache_grows"]
    return "\n".join(
        [
            f"prompt      {found['tokens']:,} tokens in chunks of {found['chunk']:,}{packed}",
            f"devices     {found['devices']} of {found['topology']}, mesh {found['mesh']}",
            f"cache       heads over {cut['heads']}, the sequence over {cut['sequence']} devices",
            f"memory      {rows['hbm']:.2f} of {limit:.2f} GiB a device by {found['compiler'] or 'formula'}: "
            + ("fits" if found["fits"] else "DOES NOT FIT"),
            f"            weights {rows['weights']:.2f}, cache {rows['cache']:.2f} GiB; "
            f"a chunk needs {rows['prefill']:.2f} in all, a decode step {rows['decode']:.2f}",
            f"forward     {found['prompt_flops'] / 1e15:,.2f} PFLOPs for the prompt, "
            f"{found['chunk_flops'] / 1e12:,.1f} TFLOPs for its last chunk, {found['decode_flops'] / 1e9:,.1f} GFLOPs "
            "for a token after it",
            *(["longer      all layers have a sliding window: memory does not bound the prompt"] if endless else []),
        ]
    )
