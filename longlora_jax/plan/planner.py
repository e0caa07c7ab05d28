"""What a run will cost, before it is paid for: parameters, FLOPs, memory, what is sent, hours.

The numbers of a TPU come from compiling the very train step for it, which needs no TPU but the package `libtpu`; those
of GPUs from formulas (costs.py), which were fitted to TPUs.
`python -m longlora_jax.plan --config configs/7b_32k.py --topology v5e:2x4` (see --help).
"""

import dataclasses
import itertools
import math
import operator
import re
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

import jax

from longlora_jax import errors
from longlora_jax.attention.context_parallel import exchange
from longlora_jax.attention.kernels import compiled_for
from longlora_jax.config import Config, MeshConfig, ModelConfig, validate
from longlora_jax.errors import UserError
from longlora_jax.files import write_json
from longlora_jax.model import trainable
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.parallel import sharding
from longlora_jax.plan.chips import GIB, GPUS, Topology, find_topology
from longlora_jax.plan.collectives import collectives, totals
from longlora_jax.plan.costs import choose_remat, estimate, forward_flops, host_bytes, sent, step_flops
from longlora_jax.training import run
from longlora_jax.training.step import compile_train_step
from longlora_jax.weights.hf_config import load_config


def plan(config: Config, topology: str, *, mfu: float = 0.4) -> dict[str, Any]:
    """The plan of a run on a topology such as "v5e:2x4" (8 TPU chips of v5e) or "h100:8", as one JSON-like dict.

    TPUs are compiled for; GPUs are planned by formula: "memory_by" and "collectives_by" say "compiler" or "formula".
    mfu: the share of the chips' peak that the step is taken to reach, for tokens a second and hours: a guess, not a
    measurement. Raises UserError for a topology or a mesh that cannot be.
    """
    validate(config)
    config = dataclasses.replace(config, model=_extended(config))
    found = find_topology(topology)
    chip, mesh = found.chip, _mesh(config, found)
    limit = int(chip.memory_gib * GIB)
    if config.remat == "auto":
        config = choose_remat(config, mesh, limit)
    model = run.build_model(config, mesh)
    started = time.perf_counter()
    by_hand = estimate(config, mesh)
    if by_compiler := found.devices is not None:
        compiled, needed = _compile(config, model, mesh)
        memory, fits = _memory(compiled), compiled is not None
        needed = memory["total"] if compiled else needed
    else:
        compiled, memory, needed, fits = None, {}, by_hand["total"], by_hand["total"] <= limit
    text = _text(compiled) if compiled else ""
    shapes = abstract_params(model)
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
        "remat": config.remat,
        "chunks": config.chunks,
        "exchange": exchange(
            model.pattern,
            config.seq_len,
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
            mesh.shape["context"],
        ),
        "fits": fits,
        "memory_by": "compiler" if by_compiler else "formula",
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
        "collectives": totals(collectives(text, mesh)) if text else sent(config, mesh),
        "tokens_per_step": tokens,
        "assumed_mfu": mfu,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "hours": seconds * config.steps / 3600,
        "chip_hours": seconds * config.steps / 3600 * mesh.size,
        "compile_seconds": time.perf_counter() - started if by_compiler else 0.0,
    }


class _Callable(types.ModuleType):
    """The library's name `longlora_jax.plan.planner` is this module as well as its function: it can be called."""

    def __call__(self, *args, **kwargs) -> dict[str, Any]:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


def _extended(config: Config) -> ModelConfig:
    model = config.model or load_config(config.init_from)
    return run.extend_model(model, config)


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

    Every mesh of fsdp and context over all devices is tried by estimate(), the one with the most rows first; on TPUs
    the longest is confirmed by compiling, and shortened until it fits. Raises UserError if nothing down to an eighth of
    the window does.
    """
    config = dataclasses.replace(config, model=config.model or load_config(config.init_from))
    found = find_topology(topology)
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
        if _compile(tried, run.build_model(tried, mesh), mesh)[0]:
            return tried
    raise UserError(f"{topology} holds no window of {config.seq_len // 8} tokens or more: take more or larger chips")


def _compile(config: Config, model: Llama, mesh):
    """(the compiled step, 0), or (None, bytes that it would need on a device)."""
    rows = jax.ShapeDtypeStruct(
        (config.batch_size, config.seq_len),
        "int32",
        sharding=sharding.batch_sharding(mesh, config.batch_size // config.accumulation),
    )
    state, frozen = run.abstract_state(config, model, mesh)
    with compiled_for("tpu"):
        try:
            segmented = any(part.packing == "best_fit" for part in (config.data, *config.mixture))
            return compile_train_step(state, frozen, rows, segmented=segmented), 0
        except jax.errors.JaxRuntimeError as error:
            if not (found := re.search(r"([\d.]+)G\w*\) exceeds available HBM", str(error))):
                raise
            held = sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves((state, frozen))
            )
            return None, int(float(found[1]) * GIB) + held


def _memory(compiled) -> dict[str, int]:
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


def table(found: dict[str, Any]) -> str:
    """The plan as lines to read."""
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    total, limit = found["hbm_bytes_per_device"] / GIB, found["hbm_limit_bytes"] / GIB
    flops, how = found["forward_flops"], f"remat {found['remat']}, chunks {found['chunks']}"
    lines = [
        f"run         {found['seq_len']:,} tokens, {found['attention']}, {how}",
        f"devices     {found['devices']} of {found['topology']}, mesh {found['mesh']}",
        f"attention   over context: {found['exchange']}",
        f"parameters  {found['parameters']:,}, of which {found['trainable_parameters']:,} train",
        f"memory      {total:.2f} of {limit:.2f} GiB a device by {found['memory_by']}: {fits}",
    ]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in found["estimate"].items())
    lines.append(f"by hand     {parts} GiB")
    if memory := found["memory"]:
        lines.append(
            f"            {memory['arguments'] / GIB:.2f} weights, optimizer and batch, "
            f"{memory['temporaries'] / GIB:.2f} activations and gradients"
        )
    if host := found["host_bytes_per_device"]:
        lines.append(f"            and {host / GIB:.2f} GiB a device of the host's memory")
    parts = ", ".join(f"{name} {flops[name] / 1e12:.1f}" for name in ("ffn", "proj", "attention", "others"))
    lines.append(f"forward     {flops['total'] / 1e12:.1f} TFLOPs a row: {parts}")
    for row in found["collectives"]:
        lines.append(f"sent        {row['bytes'] / 1e9:10.2f} GB a step and device: {row['op']} over {row['axis']}")
    if found["collectives"]:
        lines[-len(found["collectives"])] += f" (by {found['collectives_by']})"
    lines.append(
        f"time        {found['tokens_per_second']:,.0f} tokens a second and {found['hours']:,.1f} hours "
        f"({found['chip_hours']:,.0f} chip hours), if the step reaches {found['assumed_mfu']:.0%} of the chips' peak"
    )
    if not found["fits"]:
        lines.append(f"            {_advice(found)}")
    return "\n".join(lines)


def _advice(found: dict[str, Any]) -> str:
    """The nearest change that needs less memory."""
    if found["mesh"]["context"] < found["devices"]:
        return (
            f"try --config.mesh.context={found['devices']} --config.mesh.fsdp=1 with one row at a time "
            "(--config.accumulation = batch_size): the sequence is cut instead of the batch"
        )
    if found["remat"] != "offload":
        return "try --config.remat=offload: the blocks' inputs wait in the host's memory"
    if found["chunks"] == 1:
        return "try --config.chunks=16: heads and tokens of a block come in chunks"
    return "try more devices, or a shorter --config.seq_len"


def _flags(config: Config) -> str:
    """The flags that make a searched config out of its file."""
    fields = ("seq_len", "batch_size", "accumulation", "remat", "chunks", "mesh.fsdp", "mesh.context")
    return " ".join(f"--config.{name}={operator.attrgetter(name)(config)}" for name in fields)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; argv without the program's name, None for the process's own."""
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.plan",
        description="What a run will need and cost: on TPUs by compiling its train step for them, on GPUs by formula. "
        "Fields of the config can be changed as in train.py: --config.mesh.context=8",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run: a Python file with get_config()")
    parser.add_argument(
        "--topology",
        required=True,
        help="TPUs by shape: v5e:2x4, v5p:2x2x1, v6e:4x4, v4:2x2x2, tpu7x:2x2x1; GPUs by number: h100:8, of "
        + ", ".join(GPUS),
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak to assume (default: %(default)s)")
    parser.add_argument(
        "--search", action="store_true", help="find the longest window that fits, with its mesh, rows and remat"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the plan")
    args, overrides = parser.parse_known_args(argv)
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu} must be above 0 and at most 1")
    config = run.read_config(args.config, overrides)
    if args.search:
        config = search(config, args.topology)
        print(f"{_flags(config)}\n")
    found = plan(config, args.topology, mfu=args.mfu)
    print(table(found))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    errors.run(main)
