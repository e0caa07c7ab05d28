"""Which code a run was computed by: the versions of this package and of those under it, kept in versions.json."""

import importlib.metadata
import logging
import platform
import subprocess
from pathlib import Path

import jax

from longlora_jax.files import read_json, write_json
from longlora_jax.parallel import distributed

log = logging.getLogger("longlora_jax")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")


def installed_version(package: str) -> str:
    """The version of an installed package, "" where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """{"python": "3.12.3", "jax": ...}: also of this package, with its commit where it is a git checkout."""
    found = {"longlora_jax": _ours(), "python": platform.python_version()}
    found |= {name: installed_version(name) or "unknown" for name in _PACKAGES}
    return found | {"device": jax.devices()[0].device_kind}


def record(workdir: str, step: int) -> None:
    """Logs the versions and adds them to versions.json if the steps before `step` had others, which it warns of."""
    if not distributed.is_first():
        return
    path, now = Path(workdir) / "versions.json", versions()
    starts = read_json(str(path))["starts"] if path.exists() else []
    before = {name: value for name, value in starts[-1].items() if name != "from_step"} if starts else now
    log.info("versions   %s", ", ".join(f"{name} {value}" for name, value in now.items()))
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        words = ", ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in changed)
        log.warning("the steps before %d were computed by other versions: %s", step, words)
    if changed or not starts:
        write_json(str(path), {"starts": [*starts, {"from_step": step, **now}]})


def _ours() -> str:
    version = installed_version("longlora_jax") or "not installed"  # run from its folder
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=, changed", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return version
    return f"{version}, commit {found.stdout.strip()}" if found.returncode == 0 else version
