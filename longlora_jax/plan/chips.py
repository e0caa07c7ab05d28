"""Accelerators that a run can be planned for: memory, peak, and the devices of a topology that is not here."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from longlora_jax.attention.kernels import compiled_for
from longlora_jax.errors import UserError
from longlora_jax.plan.gpus import compiled_for_gpu, find_gpus
from longlora_jax.resilience.versions import installed_version

GIB = 2**30


class Chip(NamedTuple):
    """One kind of accelerator: libtpu's name of it, "" for a GPU, usable memory in GiB and peak bf16 TFLOP/s, both of a
    device."""

    accelerator: str
    memory_gib: float
    tflops: float


# Memory as the compiler counts it, without what the runtime keeps; FLOP/s from cloud.google.com/tpu/docs.
TPUS = {
    "v4": Chip("v4", 30.75, 275),
    "v5e": Chip("v5litepod", 15.75, 197),
    "v5p": Chip("v5p", 95.74, 459),
    "v6e": Chip("v6e", 31.25, 918),
    "tpu7x": Chip("tpu7x", 94.75, 1153),
}
SHARE, DEFAULT_SHARE = 0.95, 0.75  # of a GPU's memory: by XLA_PYTHON_CLIENT_MEM_FRACTION=.95, and without it
# Memory: that share of what CUDA has.
# FLOP/s: dense, bf16 summed in float32, from NVIDIA's data sheets (of the SXM modules) and papers on architectures.
GPUS = {
    "a100-40gb": Chip("", 37.4, 312),
    "a100-80gb": Chip("", 75.1, 312),
    "h100": Chip("", 75.1, 989),
    "h200": Chip("", 132.7, 989),
    "b200": Chip("", 169.4, 2250),
    "rtx3090": Chip("", 22.5, 71),
    "rtx4090": Chip("", 22.4, 165),
    "rtx5090": Chip("", 29.8, 209),
    "l4": Chip("", 20.9, 121),
    "l40s": Chip("", 42.2, 362),
    "a10g": Chip("", 20.9, 70),
    "a6000": Chip("", 45.1, 155),
}
_REFUSED = {
    "v100": "it has no bfloat16, in which runs compute: take a GPU of NVIDIA's Ampere generation or a later one"
}


class Topology(NamedTuple):
    """A chip and how many devices there are of it; devices: those that a program can be compiled for, None where the
    compiler for them is missing, and why."""

    kind: str
    chip: Chip
    count: int
    devices: list[Any] | None
    why: str = ""


def find_topology(name: str) -> Topology:
    """The topology of a name: "v5e:2x4" for TPUs by their shape, "h100:8" for GPUs by their number.

    Raises UserError for a name that is neither, or a shape that libtpu has not.
    """
    kind, _, shape = name.partition(":")
    if kind in GPUS and re.fullmatch(r"[1-9]\d*", shape):
        memory = int(GPUS[kind].memory_gib / SHARE * GIB)
        return Topology(kind, GPUS[kind], int(shape), *find_gpus(kind, memory, int(shape)))
    if kind in _REFUSED:
        raise UserError(f"topology {name!r}: {_REFUSED[kind]}, {', '.join(GPUS)}")
    if kind not in TPUS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise UserError(
            f"topology {name!r} is not known: give one such as v5e:2x4 or v5p:2x2x1, of {', '.join(TPUS)}, "
            f"or h100:8, of {', '.join(GPUS)}"
        )
    devices = _tpus(name, kind, math.prod(int(n) for n in shape.split("x")))
    return Topology(kind, TPUS[kind], len(devices), devices)


def compiler_of(found: Topology) -> str:
    """The compiler of a topology, as "libtpu 0.0.52": what it counts differs by version. "" where it is missing."""
    if found.devices is None:
        return ""
    package = "jaxlib" if found.kind in GPUS else "libtpu"  # JAX's CUDA plugin has jaxlib's version
    return f"{package} {installed_version(package)}".rstrip()


@contextlib.contextmanager
def traced_for(found: Topology) -> Iterator[dict[str, Any] | None]:
    """Within it what is traced is for these devices; gives the options of their compiler, None for its own."""
    if found.kind in GPUS and found.devices is not None:
        with compiled_for_gpu(found.kind) as options:
            yield options
    else:
        with compiled_for("gpu" if found.kind in GPUS else "tpu"):
            yield None


def _tpus(name: str, kind: str, chips: int) -> list[Any]:
    count = chips * 2 if kind in ("v4", "v5p") else chips  # these are sold by the core
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{TPUS[kind].accelerator}-{count}",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    for variable, value in environment.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # libtpu takes a host to have four chips or more.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name} cannot be compiled for ({reason}): pip install libtpu, or another shape") from error
