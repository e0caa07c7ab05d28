"""What a run reports, and where to."""

import json
import sys
import types
from pathlib import Path

import jax
import pytest

from longlora_jax.errors import UserError
from longlora_jax.parallel import distributed
from longlora_jax.training import metrics


class FakeWandb(types.ModuleType):
    """Weights & Biases as far as a run sees it: what was started, logged and finished."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished, self.fault = [], [], 0, None

    def init(self, **options):
        if self.fault:
            raise self.Error(self.fault)
        self.started.append(options)
        return self

    def log(self, values, *, step):
        self.logged.append((step, dict(values)))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def report(workdir, steps, *, start_step=0, **options):
    writer = metrics.MetricsLog(str(workdir), start_step=start_step, **options)
    for step in steps:
        writer.write(step, {"train/loss": 1 / step})
    writer.close()


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_all_three_hear_the_same(wandb, tmp_path):
    """Catches: a logger that is left out, or that gets another step."""
    report(tmp_path, [2, 4], wandb="books", config={"steps": 4})
    assert lines(tmp_path) == [{"step": 2, "train/loss": 0.5}, {"step": 4, "train/loss": 0.25}]
    assert wandb.logged == [(2, {"train/loss": 0.5}), (4, {"train/loss": 0.25})] and wandb.finished == 1
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert events.read_bytes().count(b"train/loss") == 2
    (started,) = wandb.started
    assert (started["project"], started["config"]) == ("books", {"steps": 4})
    assert (started["name"], started["dir"]) == (tmp_path.name, str(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full, as Linux has it")
def test_a_full_disk_is_a_fault_at_once(tmp_path):
    """Catches: a thread that ends in silence, for which the run then waits until its watchdog ends it."""
    writer = metrics.MetricsLog(str(tmp_path), start_step=0)
    writer._events._file._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        writer.write(1, {"train/loss": 1.0})


def test_a_resumed_run_is_the_same_run(wandb, tmp_path):
    """Catches: two half curves under two ids; a new attempt in an emptied folder that goes on in the old curve."""
    for name in "ab":
        (tmp_path / name).mkdir()
    report(tmp_path / "a", [1, 2, 3], wandb="books")
    report(tmp_path / "a", [3, 4], start_step=2, wandb="books")
    report(tmp_path / "b", [1], wandb="books")
    first, again, other = (started["id"] for started in wandb.started)
    assert first == again != other and all(started["resume"] == "allow" for started in wandb.started)
    assert [line["step"] for line in lines(tmp_path / "a")] == [1, 2, 3, 4]
    (tmp_path / "b" / "wandb.json").unlink()
    report(tmp_path / "b", [1], wandb="books")
    report(tmp_path / "b", [1], wandb="films")  # a run of another project has another id
    assert len({started["id"] for started in wandb.started[2:]}) == 3


def test_off_unless_asked_and_in_the_first_process_alone(wandb, tmp_path, monkeypatch):
    """Catches: a run that reports to the world by default; eight runs for eight processes."""
    report(tmp_path, [1])
    metrics.check_wandb("")
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    report(tmp_path / "other", [1], wandb="books")
    assert wandb.started == [] and not (tmp_path / "other").exists()


def test_without_the_package(monkeypatch, tmp_path):
    """Catches: a traceback, or one after an hour of reading weights."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb='books' needs a package: pip install wandb"):
        metrics.check_wandb("books")
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    metrics.check_wandb("books")  # only the first process reports


def test_a_run_that_is_not_let_in(wandb, tmp_path):
    """Catches: wandb's page of advice as a traceback."""
    wandb.fault = "No API key configured.\n  Use `wandb login` to log in."
    with pytest.raises(UserError, match="^Weights & Biases: No API key configured. Use .* WANDB_MODE=offline[^\n]*$"):
        report(tmp_path, [1], wandb="books")


def test_peak_memory_where_devices_know_it(monkeypatch):
    """Catches: bytes for GiB, the first device for the fullest, a crash where a CPU says nothing."""
    assert metrics.peak_memory() == {}
    fakes = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n << 29}) for n in (1, 5, 2)]
    monkeypatch.setattr(jax, "local_devices", lambda: [*fakes, types.SimpleNamespace(memory_stats=lambda: None)])
    assert metrics.peak_memory() == {"perf/peak_memory_gib": 2.5}


def test_a_file_that_a_crash_filled_with_nuls_is_gone_on_with(tmp_path, caplog):
    """Catches: a run that cannot be resumed because the machine died while the metrics were written."""
    report(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    bad = [b"\0" * 40 + b"\n", b"\xff\n", b"3\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"[]\n"]
    path.write_bytes(first + b"".join(bad) + second + third)
    caplog.set_level("WARNING")
    report(tmp_path, [3], start_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert "6 lines" in caplog.text and str(path) in caplog.text
