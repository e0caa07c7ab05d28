"""What a run will cost, before it is paid for: parameters, FLOPs, memory, what is sent, hours.

The numbers come from compiling the very train step for the accelerator, which needs none of them: for TPUs the package
`libtpu`, for GPUs JAX's CUDA plugin. Without that plugin GPUs are planned by formulas (costs.py).
"""

import dataclasses
import itertools
import math
import os
import re
import time
from typing import Any

import jax

from longlora_jax.attention.context_parallel import exchange
from longlora_jax.attention.kernels import compiled_for
from longlora_jax.config import Config, MeshConfig, ModelConfig, validate
from longlora_jax.errors import UserError
from longlora_jax.model import trainable
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.model.layers import windows_of
from longlora_jax.parallel import sharding
from longlora_jax.plan.chips import GIB, GPUS, Topology, compiler_of, find_topology, traced_for
from longlora_jax.plan.collectives import collectives, totals
from longlora_jax.plan.costs import choose_remat, estimate, forward_flops, host_bytes, sent, step_flops
from longlora_jax.plan.meshes import choose_mesh
from longlora_jax.training import run
from longlora_jax.training.resolve import extend_model
from longlora_jax.training.step import compile_train_step
from longlora_jax.weights.base import kept_as
from longlora_jax.weights.hf_config import load_config

MFU = 0.4  # of the chips' peak, where nothing else is assumed


def plan(config: Config, topology: str, *, mfu: float = MFU) -> dict[str, Any]:
    """The plan of a run on a topology such as "v5e:2x4" (8 TPU chips of v5e) or "h100:8", as one JSON-like dict.

    TPUs are compiled for, and GPUs where JAX's CUDA plugin is installed, else planned by formula: "memory_by" and
    "collectives_by" say "compiler" or "formula", "compiler" which one, and "not_compiled" why there is none.
    mfu: the share of the chips' peak that the step is taken to reach, for tokens a second and hours: a guess, not a
    measurement. Raises UserError for a topology or a mesh that cannot be.
    """
    validate(config)
    config = with_base(config)
    config = dataclasses.replace(config, model=_extended(config))
    found = find_topology(topology)
    with compiled_for("gpu" if found.kind in GPUS else "tpu"):
        return _plan(config, topology, found, mfu)


def _plan(config: Config, topology: str, found: Topology, mfu: float) -> dict[str, Any]:
    limit = int(found.chip.memory_gib * GIB)
    config, _ = choose_mesh(config, found.count, limit)
    chip, mesh = found.chip, _mesh(config, found)
    if config.remat == "auto":
        config = choose_remat(config, mesh, limit)
    model = run.build_model(config, mesh)
    started = time.perf_counter()
    by_hand = estimate(config, mesh)
    if by_compiler := found.devices is not None:
        compiled, needed = _compile(config, model, mesh, found)
        memory = compiled_memory(compiled)
        needed = memory["total"] if compiled else needed
        fits = _fits(compiled, found)
    else:
        compiled, memory, needed, fits = None, {}, by_hand["total"], by_hand["total"] <= limit
    text = _text(compiled) if compiled else ""
    windows = model.config.windows
    shares = [windows.count(window) / len(windows) for window in windows_of(model.config)]
    shapes = abstract_params(model.clone(quantization=None))
    mask = trainable.trainable_mask(shapes, config.mode)
    flops = forward_flops(config)
    tokens = config.batch_size * config.seq_len
    # Forward, backward (twice a forward, less the gradients of frozen weights) and what is computed again.
    useful = config.batch_size * step_flops(config, flops)
    seconds = useful / (mesh.size * chip.tflops * 1e12 * mfu)
    return {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "seq_len": config.seq_len,
        "attention": str(model.pattern),
        "base_quantization": config.base_quantization,
        "remat": config.remat,
        "chunks": config.chunks,
        "exchange": exchange(
            model.pattern,
            config.seq_len,
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
            mesh.shape["context"],
            mesh.shape["tensor"],
        ),
        "fits": fits,
        "memory_by": "compiler" if by_compiler else "formula",
        "compiler": compiler_of(found),
        "not_compiled": found.why,
        "hbm_bytes_per_device": needed,
        "hbm_limit_bytes": limit,
        "host_bytes_per_device": memory["host"] if compiled else host_bytes(config, mesh),
        "memory": memory,
        "estimate": by_hand,
        "parameters": trainable.count(abstract_params(Llama(model.config))),
        "trainable_parameters": trainable.count(trainable.partition(shapes, mask)[0]),
        "forward_flops": flops,
        "step_flops": useful,
        "collectives_by": "compiler" if text else "formula",
        "collectives": totals(collectives(text, mesh, shares)) if text else sent(config, mesh),
        "tokens_per_step": tokens,
        "assumed_mfu": mfu,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "hours": seconds * config.steps / 3600,
        "chip_hours": seconds * config.steps / 3600 * mesh.size,
        "compile_seconds": time.perf_counter() - started if by_compiler else 0.0,
    }


def with_base(config: Config) -> Config:
    """The config with its model and, where init_from is a folder that is here, its matrices as a run would keep them.

    Raises UserError for a quantized folder that the config asks something else of.
    """
    config = dataclasses.replace(config, model=config.model or load_config(config.init_from))
    if not os.path.isdir(config.init_from):
        return config
    return dataclasses.replace(config, base_quantization=kept_as(config))


def _extended(config: Config) -> ModelConfig:
    assert config.model is not None  # with_base filled it
    return extend_model(config.model, config)


def _mesh(config: Config, topology: Topology) -> Any:
    """The mesh of a config on a topology. Raises UserError if it cannot cut the rows or the sequence."""
    if topology.devices is None:
        mesh: Any = sharding.abstract_mesh(config.mesh, topology.count)
    else:
        mesh = sharding.make_mesh(config.mesh, topology.devices)
    sharding.batch_sharding(mesh, config.batch_size // config.accumulation)
    if config.seq_len % (context := mesh.shape["context"]):
        raise UserError(
            f"seq_len={config.seq_len} is not a multiple of mesh.context={context}: choose another of the two"
        )
    return mesh


def search(config: Config, topology: str) -> Config:
    """The config changed to the longest window, in doublings of its own, that fits a topology: mesh, rows and remat.

    Every mesh of fsdp and context over all devices is tried by estimate(), the one with the most rows first; where
    there is a compiler, the longest is confirmed by compiling, and shortened until it fits. Raises UserError if nothing
    down to an eighth of the window does.
    """
    config = with_base(config)
    found = find_topology(topology)
    with compiled_for("gpu" if found.kind in GPUS else "tpu"):
        return _search(config, topology, found)


def _search(config: Config, topology: str, found: Topology) -> Config:
    limit, ways = found.chip.memory_gib * GIB, found.count
    fitting = []
    hold_less = ({"remat": "block", "chunks": 1}, {"remat": "offload", "chunks": 1}, {"remat": "offload", "chunks": 16})
    for doubling, less in itertools.product(range(-3, 9), hold_less):
        seq_len = int(config.seq_len * 2**doubling)
        for context in (2**k for k in range(int(math.log2(ways)) + 1)):
            mesh_config = MeshConfig(data=1, fsdp=ways // context, context=context, tensor=1)
            tried = dataclasses.replace(
                config, seq_len=seq_len, mesh=mesh_config, accumulation=1, batch_size=ways // context, **less
            )
            try:
                validate(tried)
                tried = dataclasses.replace(tried, model=_extended(tried))
                needed = estimate(tried, _mesh(tried, found))["total"]
            except UserError:  # groups, weights or a sequence that such a mesh cannot cut
                continue
            if needed < limit and seq_len % (context * tried.chunks) == 0:
                fitting.append((seq_len, -hold_less.index(less), ways // context, tried))
    for _, _, _, tried in sorted(fitting, key=lambda found: found[:3], reverse=True):
        if found.devices is None:
            return tried
        mesh = _mesh(tried, found)
        how = f"remat {tried.remat}, chunks {tried.chunks}"
        print(f"compiling   {tried.seq_len:,} tokens, mesh {dict(mesh.shape)}, {how}", flush=True)
        if _fits(_compile(tried, run.build_model(tried, mesh), mesh, found)[0], found):
            return tried
    raise UserError(f"{topology} holds no window of {config.seq_len // 8} tokens or more: take more or larger chips")


def _fits(compiled, found: Topology) -> bool:
    """Whether a step that _compile gave fits: TPUs' compiler refuses one that does not, GPUs' compiles it.

    The sum of compiled_memory can be more than a TPU has, of a step that offloads, although its compiler took it.
    """
    if compiled is None or found.kind not in GPUS:
        return compiled is not None
    return compiled_memory(compiled)["total"] <= found.chip.memory_gib * GIB


def _compile(config: Config, model: Llama, mesh, found: Topology):
    """(the step compiled for these devices, 0), or (None, bytes that it would need on a device of a TPU)."""
    rows = jax.ShapeDtypeStruct(
        (config.batch_size, config.seq_len),
        "int32",
        sharding=sharding.batch_sharding(mesh, config.batch_size // config.accumulation),
    )
    state, frozen = run.abstract_state(config, model, mesh)
    segmented = any(part.packing == "best_fit" for part in (config.data, *config.mixture))
    with traced_for(found) as options:
        try:
            return compile_train_step(state, frozen, rows, segmented=segmented, options=options), 0
        except jax.errors.JaxRuntimeError as error:
            return None, exceeded(error, (state, frozen))


def exceeded(error: Exception, held) -> int:
    """Bytes on a device of a program that does not fit and of what it is given (a tree); other errors are raised."""
    if total := re.search(r"of ([\d.]+)G hbm. Exceeded hbm capacity by ([\d.]+)([KMG])", str(error)):
        return int(float(total[1]) * GIB + float(total[2]) * {"K": 2**10, "M": 2**20, "G": GIB}[total[3]])
    if not (found := re.search(r"([\d.]+)G\w*\) exceeds available HBM", str(error))):
        raise error
    given = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(held))
    return int(float(found[1]) * GIB) + given


def compiled_memory(compiled) -> dict[str, int]:
    """Bytes on a device as the compiler counts them: arguments (weights, optimizer, batch), temporaries, total."""
    if compiled is None:
        return {}
    found = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "total": arguments + temporaries + new,
        "host": found.host_temp_size_in_bytes,
    }


def _text(compiled) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu cannot read back some of what it made for a v5p
        return ""
