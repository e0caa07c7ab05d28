"""Thousands of steps with saves and evaluations: memory, file descriptors and step time stay as they are."""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import pytest
from runs import longlora, start, write_config

STEPS = 3000


def held(pid: int) -> tuple[float, int]:
    """(resident memory in MiB, open file descriptors) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return kib / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
def test_nothing_grows(environment, home, tmp_path):
    """Catches: a list that every step adds to, a file that every save leaves open, a step that gets slower."""
    config = longlora(home, steps=STEPS, batch_size=2, save_every=25)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=100, max_windows=4))
    process, metrics = start(environment, write_config(tmp_path, config), tmp_path / "work"), tmp_path / "work"
    seen = []
    with open(tmp_path / "said", "w") as said:
        while process.poll() is None:
            time.sleep(0.5)
            path = metrics / "metrics.jsonl"
            step = path.read_bytes().count(b"\n") if path.exists() else 0
            try:
                seen.append((step, *held(process.pid)))
            except (OSError, StopIteration):
                break
        out, err = process.communicate()
        said.write(out + err)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in (metrics / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))

    def median(values) -> float:
        return statistics.median(list(values))

    # full_last compiles a second step in the middle: what is held after it is what may not grow.
    parts = [(int(STEPS * a), int(STEPS * b)) for a, b in ((0.1, 0.4), (0.6, 0.75), (0.85, 1))]
    memory = [median(mib for step, mib, _ in seen if a <= step < b) for a, b in parts]
    # The fewest: a save under way has some open.
    files = [min(count for step, _, count in seen if a <= step < b) for a, b in parts]
    # The fastest tenth: how busy the machine is with other things is not the question.
    times = [statistics.quantiles([line["perf/step_seconds"] for line in lines[a:b]], n=10)[0] for a, b in parts]
    said = [f"{1000 * seconds:.1f} ms" for seconds in times]
    print(f"memory {memory} MiB, files {files}, fastest tenth of steps {said}, {len(seen)} samples")
    assert memory[2] < 1.03 * memory[1] and files[2] <= files[1] + 2 and times[2] < 2 * times[1]
