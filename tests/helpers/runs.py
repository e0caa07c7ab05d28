"""Runs of train.py: a config that uses everything, processes that are started, killed and finished."""

import dataclasses
import functools
import importlib.util
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiny import tiny_config

from longlora_jax.attention.patterns import Pattern
from longlora_jax.config import AttentionConfig, Config, DataConfig, EvalConfig, LoraConfig, OptimConfig

ROOT = Path(__file__).parents[2]
STEPS = 40


def shape(**options):
    return tiny_config(vocab_size=257, max_position_embeddings=16, **options)


def longlora(home, **changes) -> Config:
    """A run that uses all that a resumed run could get wrong: dropout, accumulation, evaluation, two patterns."""
    config = Config(
        seq_len=32,
        steps=STEPS,
        batch_size=16,
        accumulation=2,
        init_from=str(home / "base"),
        mode="longlora",
        lora=LoraConfig(rank=2, dropout=0.1, targets=("q_proj",)),
        attention=AttentionConfig(pattern="short", group_size=8, full_last=0.5),
        data=DataConfig(source="text", path=str(home / "text.txt")),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=5, schedule="cosine"),
        eval=EvalConfig(every=10, max_windows=16, data=DataConfig(source="text", path=str(home / "text.txt"))),
        dtype="float32",
        remat="none",
        save_every=3,
    )
    return dataclasses.replace(config, **changes)


def full(home) -> Config:
    """A model from nothing."""
    attention = AttentionConfig(pattern="full")
    data = DataConfig(source="text", path=str(home / "text.txt"), tokenizer=str(home / "tokenizer"))
    model = shape(tie_word_embeddings=True)
    changes = {"init_from": "", "model": model, "mode": "full", "accumulation": 1, "eval": EvalConfig()}
    return longlora(home, **changes, attention=attention, data=data)


def write_config(folder: Path, config: Config) -> str:
    """A config file whose get_config() returns this config."""
    path = folder / "run.py"
    path.write_text(f"from longlora_jax.config import *\n\n\ndef get_config():\n    return {config!r}\n")
    return str(path)


def start(environment, config: str, workdir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "--config", config, "--workdir", str(workdir), *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """(stdout, stderr) of a process that must succeed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def kill_after(process: subprocess.Popen, metrics: Path, lines: int) -> None:
    """Kills a run, as a machine does that goes away, once it has logged so many steps."""
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < lines):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err


def read_metrics(workdir: Path) -> list[dict]:
    """Every line but what a clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.startswith("perf/")} for line in lines]


@functools.cache
def train_module():
    """train.py as a module, once: its flags cannot be defined again."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_here(config: Config, folder: Path, workdir: Path) -> None:
    """Runs train.py's main on a config in this process; the config's file is written to the folder."""
    script, root = train_module(), logging.getLogger()
    argv = ["train.py", "--config", write_config(folder, config), "--workdir", str(workdir)]
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        script.main(script.parse_flags(argv))
    root.handlers[:], _ = handlers, root.setLevel(level)
    logging.captureWarnings(False)


class FakeStep:
    """In place of a compiled step: counts, notes the attention patterns, computes nothing."""

    def __init__(self):
        self.compiled, self.patterns, self.batches = [], [], []

    def compile(self, state, frozen, rows, *, segmented):
        self.compiled.append(state.model.pattern)
        return _Compiled(self, state.model.pattern)

    def __call__(self, state, frozen, batch):
        self.patterns.append(state.model.pattern)
        self.batches.append(jax.device_get(batch))
        return state.replace(step=state.step + 1), {"loss": 1.0, "grad_norm": 0.5, "skipped": 0, "in_a_row": 0}


class NoisyStep(FakeStep):
    """Moves everything that trains, and computes nothing."""

    def __call__(self, state, frozen, batch):
        state, metrics = super().__call__(state, frozen, batch)
        keys = iter(jax.random.split(jax.random.key(1), 99))
        moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), state.trainable)
        return state.replace(trainable=moved), metrics


class FakeEvaluation:
    """In place of train.py's Evaluation: takes its losses from a list, of which the last one stays."""

    def __init__(self, losses: list[float], identity: str = "some data"):
        self._losses, self.identity = losses, identity

    def __call__(self, state, frozen):
        return {"eval/loss": self._losses.pop(0) if self._losses[1:] else self._losses[0]}


@dataclasses.dataclass
class _Compiled:
    """A FakeStep for the pattern that it was compiled for, and no other."""

    fake: FakeStep
    pattern: Pattern

    def memory_analysis(self):
        return SimpleNamespace(argument_size_in_bytes=2**30, temp_size_in_bytes=2**29)

    def __call__(self, state, frozen, batch):
        assert state.model.pattern == self.pattern
        return self.fake(state, frozen, batch)
