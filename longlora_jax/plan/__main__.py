"""The plan of a run: python -m longlora_jax.plan --config configs/7b_32k.py --topology v5e:2x4."""

import operator
from collections.abc import Sequence
from typing import Any

from longlora_jax import errors
from longlora_jax.config import Config
from longlora_jax.config_file import read_config
from longlora_jax.errors import UserError
from longlora_jax.files import check_writable, write_json
from longlora_jax.plan import generation
from longlora_jax.plan.chips import DEFAULT_SHARE, GIB, GPUS, SHARE
from longlora_jax.plan.gpus import INSTALL
from longlora_jax.plan.planner import MFU, plan, search


def table(found: dict[str, Any]) -> str:
    """The plan as lines to read."""
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    total, limit = found["hbm_bytes_per_device"] / GIB, found["hbm_limit_bytes"] / GIB
    flops, how = found["forward_flops"], f"remat {found['remat']}, chunks {found['chunks']}"
    how += f", base in {found['base_quantization']}" if found["base_quantization"] != "none" else ""
    lines = [
        f"run         {found['seq_len']:,} tokens, {found['attention']}, {how}",
        f"devices     {found['devices']} of {found['topology']}, mesh {found['mesh']}",
        f"attention   over context: {found['exchange']}",
        f"parameters  {found['parameters']:,}, of which {found['trainable_parameters']:,} train",
        f"memory      {total:.2f} of {limit:.2f} GiB a device by {found['compiler'] or 'formula'}: {fits}",
    ]
    if found["fits"] and total > limit:
        lines.append(
            "            the compiler took it, and refuses what does not fit: its sum counts more than it keeps"
        )
    if found["not_compiled"]:
        lines.append(f"            {found['not_compiled']}")
    if found["topology"].partition(":")[0] in GPUS and limit * DEFAULT_SHARE / SHARE < total <= limit:
        lines.append(f"            more than JAX takes by default: XLA_PYTHON_CLIENT_MEM_FRACTION={SHARE} makes it so")
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
        description="What a run will need and cost, by compiling its train step for TPUs (pip install libtpu) and GPUs "
        f"({INSTALL}; by formula without it). "
        "Fields of the config can be changed as in train.py: --config.mesh.context=8",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run: a Python file with get_config()")
    parser.add_argument(
        "--topology",
        required=True,
        help="TPUs by shape: v5e:2x4, v5p:2x2x1, v6e:4x4, v4:2x2x2, tpu7x:2x2x1; GPUs by number: h100:8, of "
        + ", ".join(GPUS),
    )
    parser.add_argument("--mfu", type=float, help=f"share of the peak to assume (default: {MFU})")
    parser.add_argument(
        "--search", action="store_true", help="find the longest window that fits, with its mesh, rows and remat"
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="not of training: what reading a prompt of seq_len tokens, and writing after it, needs; with --search, "
        "the longest prompt that fits",
    )
    parser.add_argument(
        "--chunk",
        type=errors.number(int, 1, 2**20),
        metavar="N",
        help=f"with --generate: tokens of the prompt computed at once: {errors.CHUNK_HELP}",
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the plan")
    args, overrides = parser.parse_known_args(argv)
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu} must be above 0 and at most 1")
    if args.mfu is not None and args.generate:
        raise UserError("--mfu is of the time of training, and --generate plans none: leave one of them out")
    if args.chunk and not args.generate:
        raise UserError("--chunk is of reading a prompt: give --generate as well")
    if args.json:
        check_writable(args.json)
    config = read_config(args.config, overrides)
    if args.generate:
        found = generation.plan_generation(config, args.topology, chunk=args.chunk, longest=args.search)
        print(generation.table(found))
        if args.json:
            write_json(args.json, found)
        return
    if args.search:
        config = search(config, args.topology)
        print(f"{_flags(config)}\n")
    found = plan(config, args.topology, mfu=MFU if args.mfu is None else args.mfu)
    print(table(found))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    errors.run(main)
