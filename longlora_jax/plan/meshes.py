"""mesh.auto: the mesh that a run takes on the devices that there are."""

import dataclasses
import logging
from collections.abc import Iterator

import jax

from longlora_jax.attention.patterns import ABLATIONS
from longlora_jax.config import Config, MeshConfig
from longlora_jax.errors import UserError
from longlora_jax.parallel.sharding import abstract_mesh
from longlora_jax.plan.costs import SPARE, choose_remat, estimate

log = logging.getLogger(__name__)


def choose_mesh(config: Config, count: int, limit: float | None) -> tuple[Config, str]:
    """The config with the mesh of so many devices that exchanges least among those that fit, and why in a few words.

    Rows go over all devices if they divide and the estimate is within SPARE of limit bytes a device; else the sequence
    is cut as well, over as few devices as will do, and a step computed in more parts (accumulation), which sums the
    same. limit None: memory is not known, and the first mesh that divides is taken. A mesh that the config names, and a
    config that no mesh fits, stay as they are.
    """
    if not config.mesh.auto or config.mesh != MeshConfig():
        return config, ""
    reasons: list[str] = []
    for offload in (False, True):
        for tried in _candidates(config, count):
            if limit is None:
                return tried, reasons[0] if reasons else ""
            try:
                mesh = abstract_mesh(tried.mesh, count)
                chosen = choose_remat(tried, mesh, limit) if tried.remat == "auto" else tried
                needed = estimate(chosen, mesh)["total"]
            except UserError as error:  # a weight, a group or a row that this mesh cannot cut
                reasons.append(str(error))
                continue
            if needed <= SPARE * limit and (offload or config.remat != "auto" or chosen.remat != "offload"):
                return tried, reasons[0] if reasons else ""
            reasons.append(f"{_shape(tried)} would need {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB a device")
        if config.remat != "auto":
            break
    return config, ""


def _candidates(config: Config, count: int) -> Iterator[Config]:
    """The config on meshes of so many devices, that with the least exchange first."""
    rows = config.batch_size // config.accumulation
    for context in (c for c in range(1, count + 1) if count % c == 0 and config.seq_len % c == 0):
        if context > 1 and config.attention.pattern in ABLATIONS:
            return
        if config.attention.full_below > config.seq_len // context:
            return
        fsdp = count // context
        mesh = MeshConfig(data=1, fsdp=fsdp, context=context, tensor=1, auto=False)
        for parts in (parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts % fsdp == 0):
            if context == parts == 1:  # what the config says without this
                yield config
            else:
                yield dataclasses.replace(config, mesh=mesh, accumulation=config.accumulation * parts)


def _shape(config: Config) -> str:
    return f"fsdp={config.mesh.fsdp}, context={config.mesh.context}, accumulation={config.accumulation}"


def resolve_mesh(config: Config) -> Config:
    """The config with mesh.auto made a mesh, by the devices of this run and the memory that they tell."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    chosen, why = choose_mesh(config, jax.device_count(), min(limits) if all(limits) else None)
    if chosen.mesh != config.mesh and (chosen.mesh.context > 1 or chosen.accumulation != config.accumulation):
        log.info("mesh auto: %s%s", _shape(chosen), f", as {why}" if why else "")
    return chosen
