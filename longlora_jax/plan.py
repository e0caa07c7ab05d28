"""What a run will cost, before it is paid for: parameters, FLOPs, memory, what is sent, hours.

The numbers of a TPU come from compiling the very train step for it, which needs no TPU but the package `libtpu`.
`python -m longlora_jax.plan --config configs/7b_32k.py --topology v5e:2x4` (see --help).
"""

import dataclasses
import itertools
import math
import operator
import os
import re
import sys
import time
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from longlora_jax import errors, run, sharding, trainable
from longlora_jax.collectives import collectives, totals
from longlora_jax.config import Config, MeshConfig, ModelConfig, validate
from longlora_jax.context_parallel import exchange
from longlora_jax.costs import estimate, forward_flops, step_flops
from longlora_jax.errors import UserError
from longlora_jax.files import write_json
from longlora_jax.hf_config import load_config
from longlora_jax.kernels import compiled_for
from longlora_jax.model import Llama, abstract_params
from longlora_jax.trainer import compile_train_step

GIB = 2**30


class Chip(NamedTuple):
    """One kind of accelerator: libtpu's name of it, usable memory in GiB and peak bf16 TFLOP/s, both of a device."""

    accelerator: str
    memory_gib: float
    tflops: float


# Memory as the compiler counts it, without what the runtime keeps; FLOP/s from cloud.google.com/tpu/docs.
CHIPS = {
    "v4": Chip("v4", 30.75, 275),
    "v5e": Chip("v5litepod", 15.75, 197),
    "v5p": Chip("v5p", 95.74, 459),
    "v6e": Chip("v6e", 31.25, 918),
    "tpu7x": Chip("tpu7x", 94.75, 1153),
}


def plan(config: Config, topology: str, *, mfu: float = 0.4) -> dict[str, Any]:
    """The plan of a run on a TPU topology such as "v5e:2x4" (8 chips of v5e), as one JSON-like dict.

    mfu: the share of the chips' peak that the step is taken to reach, for tokens a second and hours: a guess, not a
    measurement. Raises UserError for a topology or a mesh that cannot be.
    """
    validate(config)
    config = dataclasses.replace(config, model=_extended(config))
    kind, devices = _devices(topology)
    chip = CHIPS[kind]
    mesh = sharding.make_mesh(config.mesh, devices)
    model = run.build_model(config, mesh)
    started = time.perf_counter()
    compiled, needed = _compile(config, model, mesh)
    memory = _memory(compiled)
    shapes = abstract_params(model)
    mask = trainable.trainable_mask(shapes, config.mode)
    sent = collectives(_text(compiled), mesh) if compiled else []
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
        "exchange": exchange(
            model.pattern,
            config.seq_len,
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
            mesh.shape["context"],
        ),
        "fits": compiled is not None,
        "hbm_bytes_per_device": memory["total"] if compiled else needed,
        "hbm_limit_bytes": int(chip.memory_gib * GIB),
        "host_bytes_per_device": memory["host"] if compiled else 0,
        "memory": memory,
        "estimate": estimate(config, mesh),
        "parameters": trainable.count(abstract_params(Llama(model.config))),
        "trainable_parameters": trainable.count(trainable.partition(shapes, mask)[0]),
        "forward_flops": flops,
        "step_flops": useful,
        "collectives": totals(sent),
        "tokens_per_step": tokens,
        "assumed_mfu": mfu,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "hours": seconds * config.steps / 3600,
        "chip_hours": seconds * config.steps / 3600 * mesh.size,
        "compile_seconds": time.perf_counter() - started,
    }


class _Callable(types.ModuleType):
    """The library's name `longlora_jax.plan` is this module as well as its function: it can be called."""

    def __call__(self, *args, **kwargs) -> dict[str, Any]:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


def _extended(config: Config) -> ModelConfig:
    model = config.model or load_config(config.init_from)
    return run.extend_model(model, config)


def search(config: Config, topology: str) -> Config:
    """The config changed to the longest window, in doublings of its own, that fits a topology: mesh, rows and remat.

    Every mesh of fsdp and context over all devices is tried by estimate(), the one with the most rows first; the
    longest is confirmed by compiling, and shortened until it fits. Raises UserError if not even one doubling less does.
    """
    config = dataclasses.replace(config, model=config.model or load_config(config.init_from))
    kind, devices = _devices(topology)
    limit, ways = CHIPS[kind].memory_gib * GIB, len(devices)
    fitting = []
    for doubling, remat in itertools.product(range(-3, 9), ("block", "offload")):
        seq_len = int(config.seq_len * 2**doubling)
        for context in (2**k for k in range(int(math.log2(ways)) + 1)):
            mesh_config = MeshConfig(data=1, fsdp=ways // context, context=context, tensor=1)
            tried = dataclasses.replace(
                config, seq_len=seq_len, remat=remat, mesh=mesh_config, accumulation=1, batch_size=ways // context
            )
            try:
                validate(tried)
                tried = dataclasses.replace(tried, model=_extended(tried))
                needed = estimate(tried, sharding.make_mesh(mesh_config, devices))["total"]
            except UserError:  # groups or weights that such a mesh cannot cut
                continue
            if seq_len % context == 0 and needed < limit:
                fitting.append((seq_len, remat == "block", ways // context, tried))
    for _, _, _, tried in sorted(fitting, key=lambda found: found[:3], reverse=True):
        mesh = sharding.make_mesh(tried.mesh, devices)
        print(f"compiling   {tried.seq_len:,} tokens, mesh {dict(mesh.shape)}, remat {tried.remat}", flush=True)
        if _compile(tried, run.build_model(tried, mesh), mesh)[0]:
            return tried
    raise UserError(f"{topology} holds no window of {config.seq_len // 8} tokens or more: take more or larger chips")


def _devices(topology: str) -> tuple[str, list]:
    """(kind of chip, the devices of a topology that need not be here)."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        known = ", ".join(CHIPS)
        raise UserError(f"topology {topology!r} is not known: give one such as v5e:2x4 or v5p:2x2x1, of {known}")
    chips = math.prod(int(n) for n in shape.split("x"))
    count = chips * 2 if kind in ("v4", "v5p") else chips  # these are sold by the core
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{CHIPS[kind].accelerator}-{count}",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return kind, list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{topology} cannot be compiled for ({reason}): pip install libtpu, or another shape"
        ) from error


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
            return compile_train_step(state, frozen, rows), 0
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
    except jax.errors.JaxRuntimeError:  # the compilers of some newer chips give none
        return ""


def table(found: dict[str, Any]) -> str:
    """The plan as lines to read."""
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    total, limit = found["hbm_bytes_per_device"] / GIB, found["hbm_limit_bytes"] / GIB
    flops = found["forward_flops"]
    lines = [
        f"run         {found['seq_len']:,} tokens, {found['attention']}, remat {found['remat']}",
        f"devices     {found['devices']} of {found['topology']}, mesh {found['mesh']}",
        f"attention   over context: {found['exchange']}",
        f"parameters  {found['parameters']:,}, of which {found['trainable_parameters']:,} train",
        f"memory      {total:.2f} of {limit:.2f} GiB a device: {fits}",
    ]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in found["estimate"].items())
    lines.append(f"by hand     {parts} GiB")
    if memory := found["memory"]:
        lines.append(
            f"            {memory['arguments'] / GIB:.2f} weights, optimizer and batch, "
            f"{memory['temporaries'] / GIB:.2f} activations and gradients, {memory['host'] / GIB:.2f} on the host"
        )
    parts = ", ".join(f"{name} {flops[name] / 1e12:.1f}" for name in ("ffn", "proj", "attention", "others"))
    lines.append(f"forward     {flops['total'] / 1e12:.1f} TFLOPs a row: {parts}")
    for row in found["collectives"]:
        lines.append(f"sent        {row['bytes'] / 1e9:10.2f} GB a step and device: {row['op']} over {row['axis']}")
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
    return "try more devices, or a shorter --config.seq_len"


def _flags(config: Config) -> str:
    """The flags that make a searched config out of its file."""
    fields = ("seq_len", "batch_size", "accumulation", "remat", "mesh.fsdp", "mesh.context")
    return " ".join(f"--config.{name}={operator.attrgetter(name)(config)}" for name in fields)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; argv without the program's name, None for the process's own."""
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.plan",
        description="What a run will need and cost on a TPU, by compiling its train step for it. Fields of the config "
        "can be changed as in train.py: --config.mesh.context=8",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run: a Python file with get_config()")
    parser.add_argument("--topology", required=True, help="such as v5e:2x4, v5p:2x2x1, v6e:4x4, v4:2x2x2, tpu7x:2x2x1")
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
