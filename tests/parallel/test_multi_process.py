"""Runs of several processes on this machine: the same losses as one, and an end for all where one ends."""

import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from launched import STEPS, Launched, s2_run
from runs import read_metrics, train_here, write_config

from longlora_jax import data
from longlora_jax.config import MeshConfig
from longlora_jax.errors import UserError
from longlora_jax.parallel import distributed, rendezvous
from longlora_jax.parallel.sharding import batch_sharding, local_rows, make_mesh, place_batch

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch").iterdir())


def assert_same_lines(lines, expected):
    """The metrics of a run on another mesh."""
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, expected_line in zip(lines, expected, strict=True):
        assert line.keys() == expected_line.keys()
        # Float32 sums over devices come in another order: 1e-7 a sum, which Adam carries on.
        assert line == pytest.approx(expected_line, rel=2e-6)
    assert [line["eval/tokens"] for line in lines if "eval/tokens" in line] == [13 * 31] * 2


def test_two_processes_have_the_losses_of_one(home, environment, tmp_path):
    """Catches: a host that reads another's rows, or the same; a shard that lands elsewhere."""
    config = dataclasses.replace(s2_run(home), save_every=100)
    train_here(dataclasses.replace(config, mesh=MeshConfig(fsdp=1)), tmp_path, tmp_path / "alone")
    write_config(tmp_path, config)
    launched = Launched(environment, tmp_path, 2, 1)
    assert launched.process.wait(timeout=300) == 0, launched.output()
    assert_same_lines(read_metrics(launched.workdir), read_metrics(tmp_path / "alone"))


@pytest.mark.slow
def test_losses_do_not_depend_on_processes_or_mesh(home, environment, tmp_path):
    """Catches: a host that reads another's rows, or the same; a shard that lands elsewhere; a checkpoint bound to its
    mesh or its number of hosts; steps reported twice or never; survivors of a lost process that hang or do not say why.
    """
    config = write_config(tmp_path, s2_run(home))
    command = [sys.executable, str(ROOT / "train.py"), "--config", config, "--workdir"]
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment | four}
    alone = subprocess.Popen([*command, str(tmp_path / "alone")], **quiet)

    said = Launched(environment, tmp_path, 2, 2).kill(1)
    assert len(said) == 1 and re.match("error: (lost process 1 on|process 0 of 2 was killed, or has lost)", said[0])
    assert "start the same command again on all hosts, the run resumes" in said[0]

    mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2")
    resumed = Launched(environment, tmp_path, 4, 1, *mesh)
    assert resumed.process.wait(timeout=300) == 0, resumed.output()
    assert len(re.findall("resumed at step [36]\n", resumed.output())) == 1  # the first process alone speaks
    _, err = alone.communicate()
    assert alone.returncode == 0, err

    assert_same_lines(read_metrics(resumed.workdir), read_metrics(tmp_path / "alone"))
    written = [path.name for path in resumed.workdir.glob("events.out.tfevents.*")]
    assert len(written) == 2, written  # one a start: the first process alone


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("fault", ["a file", pytest.param("the config", marks=pytest.mark.slow)])
def test_a_fault_on_one_host_ends_all(fault, home, environment, tmp_path):
    """Catches: hosts that wait forever for one that has said what is wrong and left; a line from each of them; hosts
    that train with different configs without a word.
    """
    config = s2_run(home)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="text.txt"))
    (tmp_path / "host1").mkdir()  # here is no text.txt
    command = [sys.executable, str(ROOT / "train.py"), "--config", write_config(tmp_path, config)]
    command += ["--workdir", str(tmp_path / "work"), f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    hosts = []
    for i in range(2):
        folder = tmp_path / "host1" if i and fault == "a file" else home
        flags = [f"--process_id={i}", *(["--config.seed=1"] if i and fault == "the config" else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        hosts.append(subprocess.Popen([*command, *flags], env=environment, cwd=folder, **pipes))
    said = [host.communicate(timeout=60)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [2, 2], said
    reason = "'text.txt' does not exist" if fault == "a file" else "seed is not what process 0 has"
    assert said[1] == "" and said[0].startswith(f"error: process 1 on {socket.gethostname()}: {reason}")
    assert said[0].count("\n") == 1 and not (tmp_path / "work").exists()


def test_a_coordinator_that_is_not_there(home, environment, tmp_path):
    """Catches: jax's abort with a stack trace, and minutes of silence before it."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", write_config(tmp_path, s2_run(home))]
    command += ["--workdir", str(tmp_path / "work"), "--num_processes=2", "--process_id=1", "--start_seconds=1"]
    command += [f"--coordinator=localhost:{free_port()}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: process 0 was not reached at localhost:")


@pytest.mark.parametrize(
    "how",
    [
        "killed",
        pytest.param("the first killed", marks=pytest.mark.slow),
        pytest.param("stopped", marks=pytest.mark.slow),
        pytest.param("bug", marks=pytest.mark.slow),
    ],
)
def test_what_ends_one_process_ends_all(how, environment):
    """Catches: survivors that hang, or that stop without a word or with another code; a silent first process."""
    environment, port = environment | {"PYTHONPATH": str(ROOT)}, str(free_port())
    if how == "bug":  # as srun starts them
        step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "3"}
        environment, port = environment | step | {"JAX_COORDINATOR_PORT": port}, "0"
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "one_end_for_all.py"), port, "3"]
    last = ["5" if how == "stopped" else "30", "bug" if how == "bug" else "wait"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    tasks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(3)]
    three = [subprocess.Popen([*command, str(i), *last], env=environment | tasks[i], **pipes) for i in range(3)]
    victim = {"killed": 2, "stopped": 2, "the first killed": 0}.get(how)
    if victim is not None:
        while three[victim].stdout.readline() != "added\n":
            assert three[victim].poll() is None
        three[victim].send_signal(signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    said = [p.communicate(timeout=40)[1] for i, p in enumerate(three) if how != "stopped" or i != victim]
    for process in three:
        process.kill()
    lines = [re.findall("^error: .*", text, re.M) for text in said]
    codes = [process.returncode for process in three if process.wait() != -signal.SIGKILL]
    resume = "start the same command again on all hosts, the run resumes from its newest checkpoint"
    if how == "bug":
        assert codes == [1, 1, 1] and "Traceback" in said[2] and "Traceback" not in said[0] + said[1]
        assert lines == [[f"error: process 2 on {socket.gethostname()}: KeyError: 'x'"], [], []]
    elif how == "killed":
        assert codes == [1, 1] and lines[1] == [] and len(lines[0]) == 1
        assert lines[0][0].startswith(f"error: lost process 2 on {socket.gethostname()} (") and resume in lines[0][0]
    else:
        left = {"the first killed": (1, 2), "stopped": (0, 1)}[how]
        assert len(codes) == 2 and 0 not in codes
        for i in left:
            assert (
                lines[i][-1].startswith(f"error: process {i} of 3 was killed, or has lost") and resume in lines[i][-1]
            )


@pytest.mark.parametrize(
    "processes, fault",
    [
        ([(0, 3), (1, 3), (2, 3)], None),
        ([(0, 3), (1, 3)], "of 3 processes, 2 did not come within 1 seconds"),
        ([(0, 3), (1, 3), (1, 3)], "two processes have --process_id=1"),
        ([(0, 3), (1, 2)], "process 1 was given --num_processes=2, process 0 3"),
    ],
    ids=["all", "one is missing", "the same id", "another number"],
)
def test_the_rendezvous(processes, fault):
    """Catches: jax's abort where flags contradict each other; one of the processes that waits on."""
    address = f"localhost:{free_port()}"

    def come(process: int, count: int) -> str | None:
        try:
            rendezvous.rendezvous(address, count, process, seconds=1)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(come, *zip(*processes, strict=True)))
    assert all(line is None if fault is None else line.startswith(fault) for line in said), said


@pytest.mark.parametrize(
    "flags", [("host", 2, 0), ("host:99999", 2, 1), ("", 2, 1), ("host:1", None, 1), ("host:1", 2, 2)], ids=str
)
def test_flags_that_cannot_be(flags, monkeypatch):
    """Catches: a traceback out of jax, or a run that goes on alone and writes into the others' workdir."""
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(UserError, match="HOST:PORT"):
        distributed.join(*flags, start_seconds=1)


def test_processes_that_know_nothing_of_each_other(monkeypatch):
    """Catches: as many runs as processes, all in one workdir, under a launcher that jax does not know."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="MPI has started 4 processes"):
        distributed.join()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    distributed.join()
    assert distributed.is_first()


def test_every_host_takes_its_rows_of_the_same_batches():
    """Catches: an order of the data that depends on who reads it."""
    windows = np.arange(7 * 4, dtype=np.int32).reshape(7, 4)
    whole = data.batches(windows, batch_size=6, seed=3)
    parts = [data.batches(windows, batch_size=6, seed=3, rows=np.array(rows)) for rows in ([0, 1, 4], [2, 3, 5])]
    for _ in range(5):
        batch, (one, other) = next(whole), map(next, parts)
        for name, x in batch.items():
            np.testing.assert_array_equal(x[[0, 1, 4]], one[name])
            np.testing.assert_array_equal(x[[2, 3, 5]], other[name])
    assert parts[0].get_state() == whole.get_state()


def test_windows_in_order_fill_up_with_nothing():
    """Catches: a window that is scored twice or never, or whose row is another host's."""
    windows = np.arange(5 * 4, dtype=np.int32).reshape(5, 4)
    hosts = [list(data.in_order(windows, batch_size=3, rows=np.array(rows))) for rows in ([0, 2], [1])]
    scored = []
    for parts in zip(*hosts, strict=True):
        for part in parts:
            assert part["tokens"].shape == part["loss_mask"].shape
            scored += [row.tolist() for row, mask in zip(part["tokens"], part["loss_mask"], strict=True) if mask.any()]
            assert {int(mask.sum()) for mask in part["loss_mask"]} <= {0, 3}
    assert sorted(scored) == windows.tolist()


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
def test_a_batch_lands_where_it_belongs(monkeypatch):
    """Catches: rows or columns of one device on another; a mesh that leaves a host without devices."""
    sharding = batch_sharding(make_mesh(MeshConfig(2, 2, 2, 1)), 8)
    batch = {"tokens": np.arange(8 * 6, dtype=np.int32).reshape(8, 6)}
    rows = local_rows(sharding, (8, 6))
    np.testing.assert_array_equal(rows, np.arange(8))
    placed = place_batch(batch, sharding, rows, 8)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert placed.sharding == sharding
    with pytest.raises(UserError, match="seq_len=7 is not a multiple of mesh.context=2"):
        local_rows(sharding, (8, 7))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="takes 4 of 8 devices, none of processes 1: set one of its axes to -1"):
        make_mesh(MeshConfig(fsdp=4))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_can_be_read(recipe):
    """Catches: a recipe that its program cannot parse, a flag or a config that train.py does not have."""
    text = recipe.read_text()
    if recipe.suffix == ".yaml":
        assert isinstance(yaml.safe_load(text), dict)
    else:
        subprocess.run(["bash", "-n", str(recipe)], check=True)
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    ours = code[code.index("train.py") :]
    known = {"config", "workdir", *re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "train.py").read_text())}
    assert set(re.findall(r"(?<![\w-])--(\w+)", ours)) <= known
    for config in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / config).exists(), config


def test_recipes_for_every_cluster_are_there():
    """Catches: a recipe that got lost, so that nothing above reads it."""
    assert [path.name for path in RECIPES] == [
        "jobset.yaml", "local.sh", "skypilot.yaml", "slurm.sbatch", "tpu_pod.sh",
    ]  # fmt: skip
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    assert json.dumps(jobset).count("train.py") == 1
