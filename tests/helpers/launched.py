"""Runs of several processes, started by launch/local.sh."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from runs import ROOT, longlora

from longlora_jax.config import AttentionConfig

STEPS = 10


def s2_run(home):
    """A run with accumulation, dropout, and an evaluation whose windows its batches do not divide."""
    config = longlora(home, steps=STEPS, save_every=3, attention=AttentionConfig(pattern="s2", group_size=8))
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=5, max_windows=13))


class Launched:
    """launch/local.sh at work."""

    def __init__(self, environment, folder: Path, processes: int, devices: int, *flags: str):
        self.workdir, self._out = folder / "work", folder / f"{processes}.log"
        command = ["bash", str(ROOT / "launch" / "local.sh"), str(processes), str(devices), "--heartbeat_seconds=15"]
        command += ["--config", str(folder / "run.py"), "--workdir", str(self.workdir), *flags]
        with open(self._out, "w") as out:
            environment = environment | {"PYTHON": sys.executable}
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def kill(self, victim: int) -> list[str]:
        """Kills one process, as a host that goes away, once there is a checkpoint. What the others say of it."""
        while self.process.poll() is None and not list(self.workdir.glob("checkpoints/[0-9]")):
            time.sleep(0.01)
        os.kill(int(re.search(rf"process {victim}: pid (\d+)", self.output())[1]), signal.SIGKILL)
        assert self.process.wait(timeout=60) != 0
        said = re.findall(r"error: .*", self.output())
        return [line for line in said if not line.startswith(f"error: process {victim} of ")]

    def output(self) -> str:
        return self._out.read_text()
