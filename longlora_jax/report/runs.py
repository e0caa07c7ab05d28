"""A run as its workdir tells it: config.json and metrics.jsonl, nothing of jax."""

import dataclasses
import datetime
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from longlora_jax.config import Config, LoraConfig, ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.fields import flat, from_dict, type_faults
from longlora_jax.files import load_json, one_line, read_json
from longlora_jax.model.trainable import TRAINED_GROUPS, group_of
from longlora_jax.weights.rules import weight_rules

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST = 2**53  # more than any number of a config is


@dataclasses.dataclass
class Run:
    """One workdir: its letter on the page, its name, its config as nested dicts, the lines of its metrics."""

    letter: str
    name: str
    path: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    written: str  # when metrics.jsonl was last written, "" if it is not there

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric where it was logged."""
        return [(line["step"], line[key]) for line in self.lines if key in line]

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    @property
    def step(self) -> int:
        """The newest step logged."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def is_done(self) -> bool:
        """Whether the last step of the config was logged."""
        return self.step >= self.config["steps"]

    @property
    def seconds(self) -> float:
        """Time spent in the steps, evaluations left out."""
        total, before = 0.0, 0
        for line in self.lines:
            total += line.get("perf/step_seconds", 0.0) * (line["step"] - before)
            before = line["step"]
        return total

    def not_finite(self) -> dict[str, list[int]]:
        """The steps at which a metric was logged as NaN or infinite: {metric: steps}."""
        found = defaultdict(list)
        for line in self.lines:
            for key, value in line.items():
                if not math.isfinite(value):
                    found[key].append(line["step"])
        return dict(found)


def read_runs(paths: list[str]) -> list[Run]:
    """The runs of some workdirs, named by their folders. Raises UserError if one is none."""
    if len(paths) > len(LETTERS):
        raise UserError(f"{len(paths)} runs do not fit one page: give at most {len(LETTERS)}")
    folders = [Path(path).absolute() for path in paths]
    if len(set(folders)) < len(folders):
        raise UserError("the same run is given twice: name each workdir once")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = list(paths)
    return [_read(path, letter, name) for path, letter, name in zip(paths, LETTERS, names, strict=False)]


def _read(path: str, letter: str, name: str) -> Run:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {path}: give the --workdir of a run of train.py")
    config = read_json(str(folder / "config.json")) if (folder / "config.json").is_file() else {}
    if not all(key in config for key in ("seq_len", "steps", "batch_size")):
        inside = sorted(p.parent.name for p in folder.glob("*/metrics.jsonl"))
        hint = f"it holds some: {', '.join(inside)}" if inside else "give the --workdir of a run of train.py"
        raise UserError(f"{path} is no workdir of a run: {one_line(hint, 200)}")
    _check(config, str(folder / "config.json"))
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return Run(letter, name, path, config, [], "")
    written = datetime.datetime.fromtimestamp(metrics.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    return Run(letter, name, path, config, read_metrics(str(metrics)), written)


def _check(config: dict[str, Any], path: str) -> None:
    """Raises UserError if a config as JSON gives it holds anything that this version's does not."""
    try:
        made = from_dict(Config, {key: value for key, value in config.items() if key != "base_fingerprint"})
        numbers = {k: v for k, v in flat(config).items() if isinstance(v, int | float)}
        faults = [*type_faults(made), *(f"{k}={v} is out of range" for k, v in numbers.items() if not abs(v) < MOST)]
    except (UserError, TypeError) as error:  # a field that is unknown or missing
        faults = [str(error)]
    except (AttributeError, StopIteration):
        faults = ["one of its parts is no object"]
    if faults:
        raise UserError(f"{path} is no config of a run: {one_line('; '.join(faults), 300)}")


def parse_numbers(text: str) -> Any:
    """JSON whose numbers can be reckoned with: those beyond 1e100 are infinite, those below 1e-100 are 0.

    Raises ValueError.
    """
    return load_json(text, parse_float=_number, parse_int=lambda d: int(d) if len(d) < 16 else _number(d))


def _number(digits: str) -> float:
    value = float(digits)
    return math.copysign(math.inf, value) if abs(value) > 1e100 else value if abs(value) > 1e-100 else 0.0


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that is still being written is left out.

    Raises UserError if a line is not an object of numbers with a step.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            texts = file.read().split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines = []
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = {name: math.nan if value is None else value for name, value in parse_numbers(text).items()}
            step = line["step"]
            if type(step) is not int or step < 0 or not all(isinstance(v, int | float) for v in line.values()):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{path}, line {number} is not an object of numbers with a step: {one_line(text, 60)!r}; remove it"
            ) from None
        lines.append(line)
    return lines


def defaults() -> dict[str, Any]:
    """The config's defaults, flat and as JSON gives them; fields without one are left out."""
    plain = json.loads(json.dumps(dataclasses.asdict(Config(seq_len=0, steps=0))))
    return {key: value for key, value in flat(plain).items() if key not in ("seq_len", "steps", "model")}


def model_of(run: Run) -> ModelConfig:
    """The model of a run. Raises UserError if its config names no model that this version knows."""
    try:
        return from_dict(ModelConfig, run.config["model"])
    except (UserError, TypeError, KeyError, AttributeError, StopIteration) as error:
        path = os.path.join(run.path, "config.json")
        raise UserError(f"the model in {path} cannot be read: {one_line(str(error), 200)}") from error


def census(run: Run) -> dict[str, dict[str, int]]:
    """Parameters by group, as trainable.census counts them: {group: {"trainable": n, "frozen": n}}."""
    model, mode = model_of(run), run.config.get("mode", "full")
    lora = from_dict(LoraConfig, run.config.get("lora", {})) if mode != "full" else None
    sizes: dict[str, int] = defaultdict(int)
    for rule in weight_rules(model):
        layers = model.num_hidden_layers if rule.layered else 1
        sizes[group_of(rule.path)] += layers * math.prod(rule.shape)
        if lora and rule.input_axes and rule.path[-2] in lora.targets:
            sizes["lora"] += layers * lora.rank * sum(rule.hf_shape)
    trained = set(sizes) if mode == "full" else TRAINED_GROUPS.get(mode, set())
    return {
        group: {"trainable": size if group in trained else 0, "frozen": 0 if group in trained else size}
        for group, size in sizes.items()
    }
