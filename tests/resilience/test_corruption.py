"""Checkpoints of a run that are damaged, of another run, or half of one: never read, and named with what to do."""

import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from states import start, state_at
from tiny import tiny_config

from longlora_jax.config import Config, DataConfig, LoraConfig
from longlora_jax.errors import UserError
from longlora_jax.resilience.checkpoints import RunCheckpoints
from longlora_jax.weights import checksums
from longlora_jax.weights.load import load_model, open_model
from longlora_jax.weights.workdir import write_run_config

ROOT = Path(__file__).parents[2]
SAVED = (10, 20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A workdir with two checkpoints."""
    workdir = tmp_path_factory.mktemp("whole")
    with RunCheckpoints(str(workdir)) as checkpoints:
        for step in SAVED:
            checkpoints.save(state_at(step), {"step": step})
    return workdir


@pytest.fixture
def workdir(whole, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "work")
    return tmp_path / "work"


def restored(workdir: Path, **options):
    """(state, data position) of the newest checkpoint."""
    checkpoints = RunCheckpoints(str(workdir))
    return checkpoints.restore(state_at(0, **options))


def refused(workdir: Path, **options) -> str:
    """The one line that says why it is not restored."""
    with pytest.raises(UserError) as error:
        restored(workdir, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def files(folder: Path) -> list[Path]:
    """Its files, largest first: the arrays."""
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (-p.stat().st_size, p))


def flip(path: Path, seed: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1
    path.write_bytes(content)


def test_what_was_saved_comes_back(workdir):
    """Catches: checksums that upset orbax, or that a complete checkpoint does not have."""
    state, data = restored(workdir)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, state_at(20).trainable)
    assert data == {"step": 20} and int(state.step) == 20
    listed = json.loads((workdir / "checkpoints" / "20" / checksums.CHECKSUMS).read_text())
    others = {path.name for path in files(workdir / "checkpoints" / "20")} - {Path(name).name for name in listed}
    assert others <= {"_CHECKPOINT_METADATA", "commit_success.txt", checksums.CHECKSUMS}


NEWEST = "checkpoints/20 is damaged or of another run"
GO_ON = "remove this folder and start again, the run goes on from step 10"
DAMAGE = {
    "a flipped bit of an array": (lambda folder: flip(files(folder)[0]), "has changed"),
    "a flipped bit of the position in the data": (lambda folder: flip(folder / "data" / "metadata"), "metadata has"),
    "a missing file": (lambda folder: files(folder)[0].unlink(), "is missing"),
    "truncated metadata": (lambda folder: os.truncate(folder / "state" / "_METADATA", 100), "state/_METADATA has"),
    "a missing part": (lambda folder: shutil.rmtree(folder / "state"), "is missing"),
    "damaged checksums": (
        lambda folder: os.truncate(folder / checksums.CHECKSUMS, 50),
        "sha256.json cannot be read as JSON",
    ),
    "checksums that lead outside": (
        lambda folder: (folder / checksums.CHECKSUMS).write_text('{"../../../etc/passwd": [1, "x"]}'),
        "which is not in the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(name, workdir):
    """Catches: a run that goes on with other weights than it had, a traceback, a line without a way to go on."""
    damage, message = DAMAGE[name]
    damage(workdir / "checkpoints" / "20")
    line = refused(workdir)
    assert NEWEST in line and message in line and line.endswith(GO_ON)
    shutil.rmtree(workdir / "checkpoints" / "20")  # as it says
    assert int(restored(workdir)[0].step) == 10


def test_the_offer_is_a_good_one(workdir):
    """Catches: the advice to go on from a checkpoint that is damaged as well."""
    for step in SAVED:
        flip(files(workdir / "checkpoints" / str(step))[0])
    assert refused(workdir).endswith("the run starts from its beginning: there is no other checkpoint")


def test_without_checksums_it_is_read_and_said(workdir, caplog):
    """Catches: runs of older versions that cannot go on; damage there that is a traceback."""
    (workdir / "checkpoints" / "20" / checksums.CHECKSUMS).unlink()
    with caplog.at_level(logging.WARNING, "longlora_jax"):
        assert int(restored(workdir)[0].step) == 20
    assert "20 has no digests" in caplog.text
    for path in files(workdir / "checkpoints" / "20" / "state"):
        path.write_bytes(b"")
    assert NEWEST in refused(workdir)


def test_another_model_is_refused_by_name(workdir):
    """Catches: a checkpoint that was put into the workdir of another run, and is cut or filled up to fit."""
    line = refused(workdir, lora=LoraConfig(rank=5, targets=("q_proj", "o_proj")))
    assert NEWEST in line and "q_proj.lora_a has shape [2, 16, 3], it must be [2, 16, 5]" in line
    line = refused(workdir, lora=LoraConfig(rank=3, targets=("q_proj",)))
    assert "layers.self_attn.o_proj.lora_a is too much" in line


def test_half_a_save_is_never_chosen(workdir):
    """Catches: a folder of a save that was killed which is restored, kept for good, or in the way of the next one."""
    half = workdir / "checkpoints" / "30.orbax-checkpoint-tmp-0"
    shutil.copytree(workdir / "checkpoints" / "20", half)
    assert int(restored(workdir)[0].step) == 20 and not half.exists()


FULL = """
import resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
from states import state_at
from longlora_jax.errors import UserError
from longlora_jax.resilience.checkpoints import RunCheckpoints

try:
    with RunCheckpoints({workdir!r}) as checkpoints:
        checkpoints.save(state_at(30), {{}})
        checkpoints._manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        checkpoints.save(state_at(40), {{}})
except UserError as error:
    print("error:", error)
"""


def test_a_full_disk_leaves_the_last_good_state(workdir):
    """Catches: a save that fails without a word, a traceback, a checkpoint that is lost or half there.

    No file may have more than 2,000 bytes: for who writes it the same as a full disk.
    """
    code = FULL.format(root=str(ROOT), tests=str(ROOT / "tests" / "helpers"), workdir=str(workdir))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "step 40 could not be saved" in said[0], (done.stdout, done.stderr)
    assert said[0].endswith("started again, the run goes on from step 30")
    assert done.returncode == 0 and "Traceback" not in done.stdout
    assert int(restored(workdir)[0].step) == 30
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_checksums_find_every_flipped_bit(tmp_path):
    """Catches: a file that is not covered, or only its head and tail."""
    rng = np.random.default_rng(0)
    for i in range(5):
        (tmp_path / "a" / str(i)).mkdir(parents=True)
        (tmp_path / "a" / str(i) / "x").write_bytes(rng.bytes(3000 * i + 1))
    checksums.write_checksums(tmp_path)
    assert checksums.verify(tmp_path) == []
    for seed in range(100):
        path = random.Random(seed).choice([p for p in tmp_path.rglob("x")])
        flip(path, seed)
        assert checksums.verify(tmp_path) == [f"{path.relative_to(tmp_path)} has changed"]
        flip(path, seed)


@pytest.fixture(scope="module")
def run_of_a_model(tmp_path_factory) -> Path:
    """A workdir of a model that trained every weight, as train.py leaves it."""
    config = Config(
        seq_len=16, steps=9, mode="full", model=tiny_config(), data=DataConfig(tokenizer="none"), save_every=3
    )
    workdir = tmp_path_factory.mktemp("run")
    with RunCheckpoints(str(workdir)) as checkpoints:
        write_run_config(str(workdir), config)
        for step in SAVED:
            state, _ = start("full")
            checkpoints.save(state.replace(step=state.step + step), {"step": step})
    return workdir


@pytest.mark.parametrize("seed", range(12))
def test_an_export_of_damage_is_refused(seed, run_of_a_model, tmp_path):
    """Catches: a released model whose weights have a flipped bit, a traceback, a config.json that runs or hangs."""
    workdir, rng = tmp_path / "work", random.Random(seed)
    shutil.copytree(run_of_a_model, workdir)
    read = np.asarray(open_model(str(workdir), check=True).table["model.norm.weight"].read())
    assert read.shape == (16,)
    newest = workdir / "checkpoints" / "20"
    listed = [newest / name for name in json.loads((newest / checksums.CHECKSUMS).read_text())]
    victim = rng.choice([workdir / "config.json", *listed])
    how = rng.choice([lambda p: flip(p, seed), lambda p: os.truncate(p, p.stat().st_size // 2), Path.unlink])
    how(victim)
    try:
        table = open_model(str(workdir), check=True).table
        assert victim.name == "config.json" and "model.norm.weight" in table  # a bit that changes a number or nothing
    except UserError as error:
        assert "\n" not in str(error)
        assert victim.name in str(error) or str(newest) in str(error) or "config" in str(error)


@pytest.mark.parametrize("seed", range(12))
def test_damage_without_digests_is_one_line_or_the_same_weights(seed, run_of_a_model, tmp_path):
    """Catches: tracebacks and hangs of orbax over a folder that it cannot read, from whatever file is bad."""
    workdir, rng = tmp_path / "work", random.Random(seed)
    shutil.copytree(run_of_a_model, workdir)
    newest = workdir / "checkpoints" / "20"
    (newest / checksums.CHECKSUMS).unlink()
    victim = rng.choice(files(newest))
    rng.choice([lambda p: os.truncate(p, p.stat().st_size // 2), Path.unlink, lambda p: p.write_bytes(b"{}")])(victim)
    try:
        load_model(str(workdir))
    except UserError as error:
        assert "\n" not in str(error) and str(newest) in str(error), victim
