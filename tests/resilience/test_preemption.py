"""SIGTERM saves and ends with code 75, on all hosts at one step; what hangs is ended, and says where."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
from launched import Launched, s2_run
from readers import children, packed
from runs import longlora, read_metrics, start, write_config

from longlora_jax import data
from longlora_jax.config import EvalConfig
from longlora_jax.parallel import distributed
from longlora_jax.resilience import watchdog
from longlora_jax.resilience.watchdog import AGAIN, Watchdog

ROOT = Path(__file__).parents[2]


def wait_for_lines(workdir: Path, lines: int, process: subprocess.Popen) -> None:
    """Until a run has logged so many steps."""
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        time.sleep(0.01)


def test_sigterm_saves_the_step_and_says_again(home, environment, tmp_path):
    """Catches: a preempted run that goes back to its last save, an exit code that no scheduler starts again, a step
    that is reported twice."""
    changes = {"mode": "lora", "accumulation": 1, "batch_size": 2, "eval": EvalConfig()}
    config = write_config(tmp_path, longlora(home, steps=5000, save_every=5000, log_every=1, **changes))
    steps = []
    for before in (0, 1):
        process = start(environment, config, tmp_path / "work", f"--config.workers={before}")
        wait_for_lines(tmp_path / "work", len(steps) + 3, process)
        for pid in (*Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split(), process.pid):
            os.kill(int(pid), signal.SIGTERM)  # as SLURM does: to all processes, those that read the data as well
        out, err = process.communicate(timeout=60)
        assert process.returncode == AGAIN == 75, err
        assert "error" not in err and "SIGTERM: saving after this step" in out
        steps = [line["step"] for line in read_metrics(tmp_path / "work")]
        saved = sorted(int(path.name) for path in (tmp_path / "work" / "checkpoints").iterdir())
        assert steps == list(range(1, steps[-1] + 1)) and saved[-1] == steps[-1] and len(saved) == 1 + before
        assert f"ended early, to be started again: {steps[-1]} steps" in out
        assert (f"resumed at step {saved[0]}\n" in out) == bool(before)


@pytest.mark.slow
def test_one_host_is_told_and_all_save_the_same_step(home, environment, tmp_path):
    """Catches: hosts that end at different steps, wait for each other for good, or of which one is "lost"."""
    changes = {"batch_size": 4, "accumulation": 1, "eval": EvalConfig(), "steps": 5000, "save_every": 5000}
    config = s2_run(home)
    write_config(tmp_path, config.__class__(**{**config.__dict__, **changes}))
    launched = Launched(environment, tmp_path, 2, 1)
    wait_for_lines(launched.workdir, 3, launched.process)
    os.kill(int(re.search(r"process 1: pid (\d+)", launched.output())[1]), signal.SIGTERM)
    assert launched.process.wait(timeout=90) == AGAIN, launched.output()
    last = read_metrics(launched.workdir)[-1]["step"]
    assert [path.name for path in (launched.workdir / "checkpoints").iterdir()] == [str(last)]
    assert "error" not in launched.output()


def watched(
    how: str, signals: int = 0, *, stall: float = 60, grace: float = 60, number=signal.SIGTERM
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of tests/helpers/watched.py after so many signals."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "watched.py"), how, str(stall), str(grace)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    while process.stdout.readline().strip() != ("loading" if how == "loading" else "begun"):
        assert process.poll() is None, process.communicate()
    for n in range(signals):
        time.sleep(2 if n else 0.7)  # sooner, the second would be taken for the first
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "how, signals, limits, said",
    [
        ("ending", 1, {}, ""),
        ("loading", 1, {}, "error: SIGTERM before the first step: nothing to save"),
        ("hanging", 2, {}, "error: a second SIGTERM: ended without waiting for the save"),
        (
            "hanging",
            1,
            {"grace": 0.5},
            "error: step 2 is done, and nothing has moved for 0.5 seconds after it was asked to end",
        ),
        pytest.param("ending", 1, {"number": signal.SIGINT}, "", marks=pytest.mark.slow),
        ("loading", 1, {"number": signal.SIGINT}, "error: Ctrl-C before the first step: nothing to save"),
        pytest.param(
            *("hanging", 2, {"number": signal.SIGINT}, "error: a second Ctrl-C: ended without waiting for the save"),
            marks=pytest.mark.slow,
        ),
        ("hanging", 0, {"stall": 1}, "error: step 2 is done, and nothing has moved for 1 seconds"),
    ],
    ids=[
        "ends",
        "at the start",
        "twice",
        "a save that hangs",
        "Ctrl-C",
        "Ctrl-C at the start",
        "Ctrl-C twice",
        "a standstill",
    ],
)
def test_nothing_hangs_for_good(how, signals, limits, said):
    """Catches: SIGTERM that waits for a line of Python which never comes; a standstill that nobody ends or explains."""
    code, out, err = watched(how, signals, **limits)
    assert code == AGAIN and err.startswith(said) and err.count("\n") == (1 if said else 0)
    assert ("saved " in out) == (not said)
    assert "moved" not in said or "(watched.py, line" in err and "time.sleep(60))" in err  # where it stands


def test_readers_leave_sigterm_to_the_run():
    """Catches: "a worker process was ended from outside" instead of a save, where a scheduler sends SIGTERM to all
    processes."""
    batches = data.batches(packed(), batch_size=2, seed=0, workers=1)
    next(batches)
    for pid in children():
        os.kill(pid, signal.SIGTERM)
    assert len(list(islice(batches, 50))) == 50
    batches.close()


def test_a_signal_that_comes_twice_is_one_and_that_of_another_host_is_none(monkeypatch):
    """Catches: a run ended without its save, since its second host was told a second later, or Ctrl-C came twice."""
    ended, clock = [], [100.0]
    monkeypatch.setattr(distributed, "end_all", lambda line, code: ended.append(line))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    watch = Watchdog(60)
    watch.begin(3)
    watch._decide()  # another host was told
    for later in (1.3, 0.5, 0.9):
        clock[0] += later
        watch._terminate("SIGTERM")
    assert not ended and watch.due(4)
    clock[0] += 2
    watch._terminate("SIGTERM")
    assert len(ended) == 1 and ended[0].startswith("a second SIGTERM")


class Told:
    """In place of distributed: hosts that are threads."""

    def __init__(self, count: int):
        self._count, self._numbers, self._asked, self._lock = count, [], False, threading.Lock()

    def ask_to_stop(self):
        self._asked = True

    def is_stop_asked(self):
        return self._asked

    def highest(self, number):
        with self._lock:
            self._numbers.append(number)
        while len(self._numbers) < self._count:
            time.sleep(0.001)
        return max(self._numbers)


@pytest.mark.parametrize("seed", range(20))
def test_hosts_that_are_apart_end_at_one_step(seed, monkeypatch):
    """Catches: a host that has passed the step which the others agree on; one that waits for an answer for good."""
    count, rng, ends = 4, random.Random(seed), {}
    told = Told(count)
    for name in ("ask_to_stop", "is_stop_asked", "highest"):
        monkeypatch.setattr(distributed, name, getattr(told, name))
    pauses = [[rng.random() * 0.002 for _ in range(200)] for _ in range(count)]
    asked, noticed = rng.randrange(40), [rng.random() * 0.01 for _ in range(count)]

    def steps(i: int, watch: Watchdog) -> None:
        watch.begin(0)
        for done in range(1, 200):
            time.sleep(pauses[i][done])
            if i == 0 and done == asked:
                told.ask_to_stop()
            if watch.due(done):
                ends[i] = done
                return

    def notice(i: int, watch: Watchdog) -> None:
        while not told.is_stop_asked():
            time.sleep(noticed[i])
        watch._decide()

    watches = [Watchdog(60) for _ in range(count)]
    told._asked = asked == 0
    threads = [threading.Thread(target=f, args=(i, w)) for i, w in enumerate(watches) for f in (steps, notice)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(ends) == count and len(set(ends.values())) == 1, ends
