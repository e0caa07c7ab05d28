"""Kills at random moments of everything that a run is made of: what is there in the end is what an undisturbed one has.

A corpus is prepared, a model converted, a run trained on both, all by their commands. Each is killed at a seeded
moment: at one of the things that it does to files, from any of its threads, and up to 60 ms later, so in the middle of
steps, saves, evaluations and writes of other languages' code as well. A second process that dies: test_multi_process.
"""

import dataclasses
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import longlora, read_metrics, write_config

from longlora_jax.config import DataConfig, EvalConfig
from longlora_jax.weights.load import load_model

ROOT = Path(__file__).parents[2]
NEVER = 10**9
TIMES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # they say when


class Chain:
    """The commands of one run in a folder of its own, each begun again until it is done."""

    def __init__(self, environment, home: Path, folder: Path):
        self._environment = environment | {"PYTHONPATH": str(ROOT)}
        self.out = folder / "out"
        self.out.mkdir(parents=True)
        tokens, base, work = (self.out / name for name in ("tokens", "base", "work"))
        data = DataConfig(source="arrayrecord", path=str(tokens), tokenizer=str(home / "base"))
        evaluation = EvalConfig(every=4, max_windows=4, data=DataConfig(path=str(home / "text.txt")))
        config = longlora(home, steps=24, batch_size=4, init_from=str(base), data=data, eval=evaluation)
        config = write_config(folder, dataclasses.replace(config, save_every=2))
        prepare = ["-m", "longlora_jax.data.prepare", "--source", "text", "--path", str(home / "text.txt")]
        convert = [str(ROOT / "convert_weights.py"), "from-hf", str(home / "base"), str(base)]
        self.commands = {
            "prepare": [*prepare, "--tokenizer", str(home / "base"), "--out", str(tokens), "--workers", "1"],
            "convert": convert,
            "train": [str(ROOT / "train.py"), "--config", config, "--workdir", str(work)],
        }
        self._made = {"prepare": tokens, "convert": base}

    def run(self, name: str, event: int = NEVER, delay: float = 0) -> bool:
        """Runs a command up to an event; whether it was killed there."""
        if name in self._made and self._made[name].exists():
            return False  # killed after its last word
        command = [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py"), str(self.out), str(event), str(delay)]
        ended = subprocess.run([*command, *self.commands[name]], env=self._environment, capture_output=True, text=True)
        assert ended.returncode in (0, -signal.SIGKILL), (name, event, delay, ended.stdout, ended.stderr)
        return ended.returncode != 0

    def events(self) -> int:
        """How often the last undisturbed command has touched a file."""
        return int((self.out.parent / "events").read_text())

    def result(self) -> tuple:
        """(metrics, weights, files of the prepared corpus and of the converted model)."""
        made = {
            str(path.relative_to(self.out)): path.read_bytes()
            for folder in self._made.values()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in TIMES
        }
        return read_metrics(self.out / "work"), load_model(str(self.out / "work")).params, made


@pytest.fixture(scope="module")
def undisturbed(environment, home, tmp_path_factory):
    """(its result, events of each command)."""
    chain = Chain(environment, home, tmp_path_factory.mktemp("undisturbed"))
    events = {}
    for name in chain.commands:
        assert not chain.run(name)
        events[name] = chain.events()
    return chain.result(), events


def assert_same(one: tuple, other: tuple) -> None:
    """The same lines of metrics, weights of the same bits, the same files."""
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    assert one[2] == other[2]


def disturbed(chain: Chain, events: dict[str, int], kills: dict[str, int], rng: random.Random, least: int = 1):
    """Runs the chain to its end, with up to so many kills of each command; {command: how many there were}.

    least: the first event of training at which it may be killed.
    """
    done = dict.fromkeys(kills, 0)
    for name, wanted in kills.items():
        while done[name] < wanted:
            # A training run that is far has little left to do: early moments let every attempt be killed.
            most = events[name] if name != "train" else events[name] // 3
            if not chain.run(
                name,
                rng.randint(least if name == "train" else 1, most),
                rng.random() * (0.06 if name == "train" else 0.005),
            ):
                break
            done[name] += 1
        chain.run(name)
    return done


@pytest.mark.slow
def test_a_few_kills_change_nothing(undisturbed, environment, home, tmp_path):
    """Catches: weights or metrics of a run that was killed which are not those of one that was not; a line that is lost
    or there twice; half a corpus, model or checkpoint that is taken for a whole one."""
    expected, events = undisturbed
    chain = Chain(environment, home, tmp_path / "chain")
    kills = disturbed(chain, events, {"prepare": 1, "convert": 1, "train": 2}, random.Random(7), events["train"] // 4)
    assert kills["train"] == 2 and sum(kills.values()) >= 3
    assert [line["step"] for line in expected[0]] == list(range(1, 25))
    assert_same(expected, chain.result())


@pytest.mark.slow
def test_many_kills_change_nothing(undisturbed, environment, home, tmp_path):
    """The same at 25 moments, in as many runs as it takes."""
    expected, events = undisturbed
    rng, total, runs = random.Random(25), 0, 0
    while total < 25:
        chain = Chain(environment, home, tmp_path / str(runs))
        kills = disturbed(chain, events, {"prepare": 1, "convert": 1, "train": min(8, 25 - total)}, rng)
        total, runs = total + sum(kills.values()), runs + 1
        print(f"run {runs}: {kills}, events {events}", flush=True)
        assert_same(expected, chain.result())
