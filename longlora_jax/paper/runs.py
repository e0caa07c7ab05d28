"""One row of the tables: trained by train.py, scored under full attention, kept in the workdir."""

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlora_jax.attention.patterns import FULL
from longlora_jax.config_file import read_run_config
from longlora_jax.data import HELD_OUT, load_tokenizer, read_documents
from longlora_jax.errors import UserError
from longlora_jax.evals.perplexity import evaluate, on_device, stretch_rope
from longlora_jax.files import read_json, write_json
from longlora_jax.paper.tables import Run
from longlora_jax.training.run import build_model
from longlora_jax.weights.load import OpenModel, open_model

CONFIG = "configs/paper.py"
BASE = "models/tiny-python-llama"
DTYPE = "float32"  # of training and scoring, unless a run changes it
SEQ_LEN = 1008
SCORED = 4 * SEQ_LEN  # tokens of each held-out file, in windows of SEQ_LEN: the same for every row
# What the tables and the hours of the listing are made of, in a file of results.
FIELDS = {
    "seed": int,
    "steps": int,
    "changes": dict,
    "perplexity": int | float,
    "pattern_perplexity": int | float | None,
    "seconds": int | float,
    "step_seconds": int | float | None,
}
DATA, RESULTS, RUNS, COMPILED = "data", "results", "runs", "compiled"  # in the workdir


def result_path(workdir: Path, run: Run, seed: int) -> Path:
    """Where the numbers of a run with a seed are when it is finished; what was not trained has one for all seeds."""
    return workdir / RESULTS / (f"{run.name}_seed{seed}.json" if run.steps else f"{run.name}.json")


def finished(workdir: Path, run: Run, seed: int) -> dict[str, Any] | None:
    """The numbers of a run with a seed; None if it is still to be made. Raises UserError for a damaged file."""
    path = result_path(workdir, run, seed)
    return read_result(path) if path.exists() else None


def read_result(path: Path) -> dict[str, Any]:
    """The numbers of one file of results. Raises UserError if it is damaged, or lacks what the tables need."""
    found = read_json(str(path))
    if wrong := [name for name, kinds in FIELDS.items() if not isinstance(found.get(name, ...), kinds)]:
        raise UserError(
            f"{path} has no {' and no '.join(wrong)} (it is damaged, or of an earlier version): remove it, and give "
            "the command without --show and --list to make this row again"
        )
    return found


def make(workdir: Path, run: Run, seed: int, *, twice: bool) -> dict[str, Any]:
    """Trains a run as far as that is still to be done, scores it, and writes what it returns: see `score`."""
    path, began = result_path(workdir, run, seed), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = workdir / RUNS / f"{run.name}_seed{seed}"
    if run.steps:
        prepare(workdir)
        train(folder, run, seed, data=workdir / DATA)
    result = {"run": run.name, "seed": seed, "steps": run.steps, "changes": dict(run.changes)}
    result |= score(folder, run, twice=twice)
    result |= {"seconds": time.perf_counter() - began, **_trained(folder)}
    write_json(str(path), result)
    return result


def prepare(workdir: Path) -> None:
    """Tokenizes the training text once for all runs; a second call finds it."""
    if not (workdir / DATA).is_dir():
        what = ["--source", "python", "--tokenizer", BASE, "--out", str(workdir / DATA), "--hold_out", *HELD_OUT]
        _call(workdir, "-m", "longlora_jax.data.prepare", *what)


def train(folder: Path, run: Run, seed: int, *, data: Path) -> None:
    """train.py on one run; it goes on where an earlier call was broken off."""
    flags = [f"--config.steps={run.steps}", f"--config.optim.warmup_steps={min(20, max(run.steps // 5, 1))}"]
    flags += [f"--config.seed={seed}", "--config.data.source=arrayrecord", f"--config.data.path={data}"]
    flags += ["--config.data.hold_out=()"]  # prepare has left them out
    _call(data.parent, "train.py", "--config", CONFIG, "--workdir", str(folder), *run.flags(), *flags)


def _call(workdir: Path, *command: str) -> None:
    print(f"$ {shlex.join(['python', *command])}", flush=True)
    # Runs that differ in their seed alone compile the same step.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.absolute() / COMPILED)}
    if code := subprocess.run([sys.executable, *command], env=cache | os.environ).returncode:
        raise UserError(
            f"the command above ended with exit code {code}: mend what it says and give the same command again; rows "
            "that are finished are kept"
        )


def score(folder: Path, run: Run, *, twice: bool) -> dict[str, Any]:
    """Perplexity under full attention of held-out files; twice: under the pattern of training as well.

    {"nll", "perplexity", "stderr" (of nll, over the text), "tokens", "pattern", "pattern_perplexity" (or None)}.
    """
    dtype = dict(run.changes).get("dtype", DTYPE)
    opened = open_model(str(folder) if run.steps else BASE, dtype)
    model, documents = on_device(opened, dtype), held_out(opened)
    if not run.steps:
        kind = dict(run.changes).get("rope.type", "linear")
        model = dataclasses.replace(model, config=stretch_rope(model.config, SEQ_LEN, kind))
    found = evaluate(model, documents, SEQ_LEN, label=f"{run.name}, full attention")
    result = {name: found[name] for name in ("nll", "perplexity", "stderr", "tokens")}
    pattern = build_model(read_run_config(str(folder))).pattern if run.steps else None
    own = None
    if twice and pattern:
        same = pattern == FULL
        own = found if same else evaluate(model, documents, SEQ_LEN, pattern=pattern, label=f"{run.name}, {pattern}")
    return result | {"pattern": pattern and str(pattern), "pattern_perplexity": own and own["perplexity"]}


def held_out(opened: OpenModel) -> list[np.ndarray]:
    """The first SCORED tokens of every file that no run is trained on."""
    tokenizer = load_tokenizer(opened.tokenizer_dir)
    return [tokenizer.encode(d.text)[:SCORED] for d in read_documents("python", "", only=HELD_OUT)]


def _trained(folder: Path) -> dict[str, Any]:
    """The median of a run's measured seconds a step, and its first three losses, by which it is known again."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seconds = statistics.median(line["perf/step_seconds"] for line in lines) if lines else None
    return {"step_seconds": seconds, "first_losses": [line["train/loss"] for line in lines[:3]]}


def gather(workdir: Path, runs: Sequence[Run], *, steps: int, common: Mapping[str, object]) -> dict[str, Any]:
    """All that is finished of some runs, whatever the seed: what the command writes as paper.json."""
    found = {}
    for run in runs:
        paths = sorted((workdir / RESULTS).glob(f"{run.name}_seed*.json" if run.steps else f"{run.name}.json"))
        if results := sorted((read_result(path) for path in paths), key=lambda r: r["seed"]):
            found[run.name] = results
    setting = {
        "base": BASE,
        "seq_len": SEQ_LEN,
        "steps": steps,
        "common": dict(common),
        "scored_tokens_a_file": SCORED,
        "files": list(HELD_OUT),
    }
    where = {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "cores": os.cpu_count()}
    return setting | where | {"jax": jax.__version__, "runs": found}
