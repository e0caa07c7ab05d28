"""What a run reports: metrics.jsonl, TensorBoard events, Weights & Biases if asked, and the census at the start."""

import contextlib
import json
import logging
import math
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from longlora_jax import progress
from longlora_jax.errors import UserError
from longlora_jax.files import read_json, write_json, write_text
from longlora_jax.parallel import distributed

log = logging.getLogger(__name__)


class _Console(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)


def log_to_console() -> None:
    """Log lines go to standard output, above the progress bar: ours from INFO on, those of others from WARNING on.

    Standard error is left to the progress bar and to the one line that says what the user got wrong.
    """
    logging.captureWarnings(True)
    logging.getLogger().handlers[:] = [_Console()]
    for name, level in {None: logging.WARNING, "absl": logging.WARNING, "longlora_jax": logging.INFO}.items():
        logging.getLogger(name).setLevel(level)


def leave_talking() -> None:
    """From here on this process logs errors alone and draws no bars: another one of the run does."""
    progress.silence()
    logging.getLogger("longlora_jax").setLevel(logging.ERROR)


class MetricsLog:
    """Writes each logged step to metrics.jsonl, to TensorBoard and to Weights & Biases, in a run's first process.

    start_step: the step that a run resumes from; later lines of an earlier attempt, and a line that a crash
    cut off, are removed first, so no step is reported twice. wandb: a project of Weights & Biases, "" for none;
    config: what is kept there as the run's config. Raises UserError if Weights & Biases does not let the run in.
    """

    def __init__(self, workdir: str, *, start_step: int, wandb: str = "", config: dict[str, Any] | None = None):
        self._on = distributed.is_first()
        if not self._on:
            return
        self._wandb = _start_wandb(wandb, workdir, config) if wandb else None
        path = Path(workdir) / "metrics.jsonl"
        _keep_until(path, start_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        # Events of steps that a crash undid stay in their file: TensorBoard drops them at purge_step.
        self._events = _Events(workdir, purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one object: {"step": step, **values}; null, which JSON has, for a number that is not finite."""
        if not self._on:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        self._events.write(step, values)
        if self._wandb:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flushes and closes all of them."""
        if self._on:
            self._file.close()
            self._events.close()
            if self._wandb:
                self._wandb.finish()


class _Events:
    """TensorBoard's file of a run, written as steps are logged: the thread of tensorboardX's SummaryWriter ends at the
    first fault of a disk, and the run would wait for it without a word."""

    def __init__(self, workdir: str, purge_step: int | None):
        with _without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        proto: Any = event_pb2  # its names are made at run time
        self._event, self._scalar = proto.Event, summary.scalar
        self._file = event_file_writer.EventsWriter(str(Path(workdir) / "events"))
        if purge_step is not None:
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._file.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """An event for each value. Raises OSError."""
        for name, value in values.items():
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Within it torch cannot be imported, which tensorboardX does wherever it is installed: seconds of every start."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]: an import of it fails now
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def check_wandb(project: str) -> None:
    """Raises UserError if a run that reports to a project of Weights & Biases ("" for none) could not."""
    if project and distributed.is_first():
        _import_wandb(project)


def _import_wandb(project: str):
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"wandb={project!r} needs a package: pip install wandb, or leave wandb empty") from None
    return wandb


def _start_wandb(project: str, workdir: str, config: dict[str, Any] | None):
    """The run of a workdir at Weights & Biases: a resumed one goes on in the one that its wandb.json names."""
    wandb = _import_wandb(project)
    path = Path(workdir) / "wandb.json"
    saved = read_json(str(path)) if path.exists() else {}
    if saved.get("project") != project:
        saved = {"project": project, "id": secrets.token_hex(4)}
        write_json(str(path), saved)
    name = Path(workdir).absolute().name
    try:
        return wandb.init(project=project, id=saved["id"], resume="allow", name=name, dir=workdir, config=config)
    except wandb.Error as error:
        fault = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"Weights & Biases: {fault}; or set WANDB_MODE=offline, or leave wandb empty") from error


def peak_memory() -> dict[str, float]:
    """{"perf/peak_memory_gib": the most that a device of this process held so far}; {} where devices do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"perf/peak_memory_gib": max(peaks) / 2**30} if peaks else {}


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept, bad = [], 0
    for line in path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, TypeError, KeyError):  # a machine that died while it wrote may leave anything
            bad += 1
    if bad:
        log.warning("%s: %d lines that are not metrics are removed", path, bad)
    write_text(str(path), "".join(kept))


def census_lines(groups: dict[str, dict[str, int]]) -> list[str]:
    """The census of trainable.census as aligned lines, totals last."""
    rows = [(name, g["trainable"], g["frozen"]) for name, g in groups.items()]
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    lines = [f"{'group':<10} {'trainable':>16} {'frozen':>16}"]
    return lines + [f"{name:<10} {trainable:>16,} {frozen:>16,}" for name, trainable, frozen in rows]
