"""What a run reports: metrics.jsonl, TensorBoard events, a progress bar, and the census at the start."""

import json
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from longlora_jax import distributed, progress


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
    """Writes each logged step to metrics.jsonl and to TensorBoard, in the first process of a run.

    start_step: the step that a run resumes from; later lines of an earlier attempt, and a line that a crash
    cut off, are removed first, so no step is reported twice.
    """

    def __init__(self, workdir: str, *, start_step: int):
        self._on = distributed.is_first()
        if not self._on:
            return
        from tensorboardX import SummaryWriter

        path = Path(workdir) / "metrics.jsonl"
        _keep_until(path, start_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        # Events of steps that a crash undid stay in their file: TensorBoard drops them at purge_step.
        self._events = SummaryWriter(workdir, purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one object: {"step": step, **values}."""
        if not self._on:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._on:
            self._file.close()
            self._events.close()


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    aside = path.with_suffix(".incomplete")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


def census_lines(groups: dict[str, dict[str, int]]) -> list[str]:
    """The census of trainable.census as aligned lines, totals last."""
    rows = [(name, g["trainable"], g["frozen"]) for name, g in groups.items()]
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    lines = [f"{'group':<10} {'trainable':>16} {'frozen':>16}"]
    return lines + [f"{name:<10} {trainable:>16,} {frozen:>16,}" for name, trainable, frozen in rows]
