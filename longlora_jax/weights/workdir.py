"""A workdir of train.py as a model's folder: its config, its checkpoints by step, its base, what it trains under.

A run saves what it changed (trainables, optimizer, step, data position). Its frozen base is named, not copied: by path
and by a fingerprint of the files there, which is checked when the run is resumed or exported.
"""

import hashlib
import os
from dataclasses import asdict
from pathlib import Path

from longlora_jax.config import Config
from longlora_jax.config_file import read_run_config
from longlora_jax.data.chat import ChatFormat, run_format, save_format, saved_format
from longlora_jax.errors import UserError
from longlora_jax.files import read_json, write_json
from longlora_jax.weights.checksums import CHECKSUMS, has_checksums
from longlora_jax.weights.converted import DIGESTS


def fingerprint(path: str, *, windows: int = 3, size_of_each: int = 1 << 20) -> str:
    """A digest of a model folder's weights: of every file its size, and its digests if it has them, else some windows
    of so many bytes, evenly from head to tail: by default 1 MiB of it at head, middle and tail.
    """
    digest = hashlib.sha256()
    digests = Path(path) / DIGESTS
    if digests.is_file():
        digest.update(digests.read_bytes())
    for file in sorted(p for p in Path(path).rglob("*") if _is_weights(p, Path(path))):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}".encode())
        if digests.is_file():
            continue
        with open(file, "rb") as stream:
            for start in sorted({max(size - size_of_each, 0) * i // (windows - 1) for i in range(windows)}):
                stream.seek(start)
                digest.update(stream.read(size_of_each))
    return digest.hexdigest()


def checkpoint_fingerprint(workdir: str, step: int) -> str:
    """A digest of all that decides the weights of a run at a step: its checkpoint, its base and its adapters' scale."""
    folder, config = Path(workdir, "checkpoints", str(step)), read_run_config(workdir)
    digest = hashlib.sha256(f"{config.mode}, {config.lora.scale}, {_base_fingerprint(workdir)}".encode())
    if has_checksums(folder):
        digest.update((folder / CHECKSUMS).read_bytes())
    else:  # of an earlier version: orbax names the files with its arrays anew each time, and the time is in one
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder)}:{file.stat().st_size}".encode())
        for name in ("_CHECKPOINT_METADATA", "data/metadata"):
            digest.update((folder / name).read_bytes() if (folder / name).is_file() else b"")
    return digest.hexdigest()


def _base_fingerprint(workdir: str) -> str:
    return read_json(os.path.join(workdir, "config.json")).get("base_fingerprint", "")


def _is_weights(file: Path, folder: Path) -> bool:
    return file.is_file() and (file.suffix in (".safetensors", ".bin") or "params" in file.relative_to(folder).parts)


def write_run_config(workdir: str, config: Config) -> None:
    """Writes config.json: every field as the run uses it, and the fingerprint of the base weights; beside it what the
    run trains under (see ChatFormat).
    """
    save_format(workdir, run_format((config.data, *config.mixture), config.init_from))
    base = fingerprint(config.init_from) if config.init_from else ""
    write_json(os.path.join(workdir, "config.json"), {**asdict(config), "base_fingerprint": base})


def check_base(workdir: str, config: Config) -> None:
    """Raises UserError if config.init_from does not hold the base weights that a run was started from.

    Wherever they lie: a base is known by its weights. config: the run's own, or one that names another place.
    """
    if not config.init_from:
        return
    if not Path(config.init_from).is_dir():
        raise UserError(
            f"{workdir} was started from {config.init_from}, which is gone: put the base back, or say where it is "
            "now (train.py --config.init_from=DIR, --base DIR of convert_weights.py to-hf and to-peft)"
        )
    if fingerprint(config.init_from) != _base_fingerprint(workdir):
        raise UserError(
            f"the weights in {config.init_from} are not those that {workdir} was started from: restore them, or start "
            "again with a new workdir"
        )


def is_workdir(path: str) -> bool:
    """Whether a folder is the workdir of a training run."""
    return (Path(path) / "checkpoints").is_dir() and (Path(path) / "config.json").is_file()


def checkpoint_steps(workdir: str) -> list[int]:
    """The steps of a run's complete checkpoints, the newest last; of a folder that is no workdir none."""
    folder = Path(workdir, "checkpoints")
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def split_step(path: str) -> tuple[str, int | None]:
    """(WORKDIR, STEP) of WORKDIR/checkpoints/STEP, a checkpoint of a run; (path, None) of every other path."""
    folder = Path(path)
    if folder.name.isdigit() and folder.parent.name == "checkpoints" and is_workdir(str(folder.parent.parent)):
        return str(folder.parent.parent), int(folder.name)
    return path, None


def at_step(workdir: str, step: str | None) -> str:
    """The path of a run's checkpoint as open_model takes it; step: a number, "best" (of eval/loss) or None, the newest.

    Raises UserError if the run has no such checkpoint any more.
    """
    if step is None:
        return workdir
    if not is_workdir(workdir):
        raise UserError(f"--step {step} is of a run, and {workdir} is no workdir of train.py: leave it out")
    kept = checkpoint_steps(workdir)
    found = step
    if step == "best":
        beside = [p for p in (Path(workdir, "checkpoints", str(s), "data", "metadata") for s in kept) if p.is_file()]
        found = str(read_json(str(beside[-1])).get("best", {}).get("step", "")) if beside else ""
        if not found:
            raise UserError(f"{workdir} has no evaluation by which a step is best: set eval.every, or give --step N")
    if not found.isdigit() or int(found) not in kept:
        best = f", not {found}" if step == "best" else ""
        raise UserError(
            f"--step {step}: {workdir} keeps {', '.join(map(str, kept)) or 'no checkpoint'}{best}: take one of them "
            "(keep_checkpoints and keep_best say which stay)"
        )
    return str(Path(workdir, "checkpoints", found))


def workdir_format(workdir: str) -> ChatFormat:
    """What a run trains under: as it has saved it, or in an old workdir as its config says; workdir: also one of its
    checkpoints.
    """
    workdir, _ = split_step(workdir)
    if (saved := saved_format(workdir)) is not None:
        return saved
    config = read_run_config(workdir)
    return run_format((config.data, *config.mixture), config.init_from)
