"""NVIDIA's GPUs on a machine that has none: their description for XLA, and devices that a program can be compiled for.

The compiler is in JAX's CUDA plugin (the packages jax-cuda13-plugin and jax-cuda13-pjrt), which needs no GPU for that,
and of CUDA no more than ptxas and libdevice (nvidia-cuda-nvcc and nvidia-nvvm). Products and attention become calls of
cuBLAS and cuDNN, whose workspace is chosen on the GPU: the compiler's count of memory is without it.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from longlora_jax.attention.kernels import compiled_for
from longlora_jax.resilience.versions import installed_version

INSTALL = 'pip install -e ".[gpu-plan]"'
OPTIONS: Any = {"xla_gpu_autotune_level": 0}  # kernels are chosen by rules: trying them would take a GPU
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_TRIED = ("0.10.", "0.11.")  # versions of JAX whose checks of cuDNN are known here
_CUDNN = 91900  # the version that is taken to be there: 9.19, which benchmarks/gpu was measured with


class Card(NamedTuple):
    """One kind of GPU: CUDA's name of it, compute capability, multiprocessors, clock in GHz, L2 cache in MiB and
    memory bandwidth in GB/s."""

    name: str
    capability: str
    cores: int
    clock_ghz: float
    l2_mib: int
    bandwidth: float


# From NVIDIA's data sheets and papers on architectures; of data center cards, the SXM modules.
CARDS = {
    "a100-40gb": Card("NVIDIA A100-SXM4-40GB", "8.0", 108, 1.41, 40, 1555),
    "a100-80gb": Card("NVIDIA A100-SXM4-80GB", "8.0", 108, 1.41, 40, 2039),
    "h100": Card("NVIDIA H100 80GB HBM3", "9.0", 132, 1.98, 50, 3352),
    "h200": Card("NVIDIA H200", "9.0", 132, 1.98, 50, 4800),
    "b200": Card("NVIDIA B200", "10.0", 148, 1.965, 126, 7672),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", "8.6", 82, 1.695, 6, 936),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", "8.9", 128, 2.52, 72, 1008),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", "12.0", 170, 2.407, 96, 1792),
    "l4": Card("NVIDIA L4", "8.9", 58, 2.04, 48, 300),
    "l40s": Card("NVIDIA L40S", "8.9", 142, 2.52, 96, 864),
    "a10g": Card("NVIDIA A10G", "8.6", 80, 1.71, 6, 600),
    "a6000": Card("NVIDIA RTX A6000", "8.6", 84, 1.8, 6, 768),
}
# Of a compute capability: threads, KiB of shared memory and float32 units of a multiprocessor, and whether it has
# instructions that later ones do not run (CUDA C++ Programming Guide, technical specifications).
_GENERATIONS = {
    "8.0": (2048, 164, 64, False),
    "8.6": (1536, 100, 128, False),
    "8.9": (1536, 100, 128, False),
    "9.0": (2048, 228, 128, True),
    "10.0": (2048, 228, 128, True),
    "12.0": (1536, 100, 128, False),
}


def target_config(card: Card, memory: int) -> str:
    """The card, with so many bytes of memory, as XLA's GpuTargetConfigProto in text."""
    major, minor = card.capability.split(".")
    threads, shared_kib, fpus, accelerated = _GENERATIONS[card.capability]
    cudnn_major, cudnn_minor = _CUDNN // 10_000, _CUDNN % 10_000 // 100
    feature = "ACCELERATED_FEATURES" if accelerated else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_kib * 1024}
  shared_memory_per_block_optin: {(shared_kib - 1) * 1024}
  threads_per_core_limit: {threads}
  core_count: {card.cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {card.clock_ghz}
  l2_cache_size: {card.l2_mib * 2**20}
  memory_bandwidth: {int(card.bandwidth * 1e9)}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn_major} minor: {cudnn_minor} }}
runtime_version {{ major: 13 }}
device_description_str: "{card.name}"
"""


def find_gpus(kind: str, memory: int, count: int) -> tuple[list[Any] | None, str]:
    """(so many devices of a kind, ""), each with so many bytes of memory; (None, why) where JAX cannot compile for
    them."""
    version = next(filter(None, map(installed_version, _PLUGINS)), "")
    if not version:
        return None, f"JAX's compiler for GPUs is not installed: {INSTALL}"
    if version != jax.__version__ or not version.startswith(_TRIED):
        fitting = " or ".join(f"{tried}x" for tried in _TRIED)
        return None, f"jax {jax.__version__} with its CUDA plugin {version} was not tried, but one {fitting} for both"
    hosts = f"{count // 8}x8" if count % 8 == 0 else f"1x{count}"
    try:
        with _without_nvidias_libraries(), _checks(CARDS[kind].capability):
            target = {"target_config": target_config(CARDS[kind], memory), "topology": f"1x{hosts}"}
            found = list(topologies.get_topology_desc(kind, "cuda", **target).devices)
            number = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(found[0]))
            jax.jit(jnp.sin).lower(number).compile(compiler_options=OPTIONS)  # with ptxas and libdevice
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        return None, f"JAX cannot compile for {kind} here ({' '.join(str(error).split())[:120]}): {INSTALL}"
    return found, ""


@contextlib.contextmanager
def _without_nvidias_libraries() -> Iterator[None]:
    """Within it JAX's CUDA plugin is registered, which otherwise refuses where CUDA's libraries are missing.

    Only registered: devices of it that are not here are not looked for, and JAX's default stays what it was.
    """
    from jax._src import xla_bridge

    with mock.patch.dict(os.environ, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
        xla_bridge._discover_and_register_pjrt_plugins()
        if "cuda" not in xla_bridge._topology_factories:  # refused before, when somebody asked JAX for its devices
            plugin = next(name for name in ("xla_cuda13", "xla_cuda12") if installed_version(f"jax_{name[4:]}_plugin"))
            importlib.import_module(f"jax_plugins.{plugin}").initialize()
        yield


@contextlib.contextmanager
def _checks(capability: str) -> Iterator[None]:
    """Within it JAX takes cuDNN to be there, on a GPU of that compute capability."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    has = tuple(map(int, capability.split(".")))
    with mock.patch.multiple(
        cudnn,
        check_cudnn_version=lambda: _CUDNN,
        check_compute_capability=lambda least: has >= tuple(map(int, least.split("."))),
        is_cuda_compute_capability_equal=lambda other: other == capability,
    ):
        yield


@contextlib.contextmanager
def compiled_for_gpu(kind: str) -> Iterator[dict[str, Any]]:
    """Within it what is traced and lowered is for such a card; gives the options to compile without one."""
    capability = CARDS[kind].capability
    with compiled_for("gpu", capability), _checks(capability):
        yield OPTIONS
