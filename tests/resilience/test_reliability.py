"""Promises of docs/reliability.md and SECURITY.md that have no room of their own."""

import ast
import dataclasses
import errno
import json
import logging
import random
import re
from pathlib import Path

import jax
import pytest
from jax.errors import JaxRuntimeError
from runs import FakeStep, longlora, write_config

from longlora_jax.config import Config, validate
from longlora_jax.config_file import read_config
from longlora_jax.errors import UserError, in_plain_words
from longlora_jax.resilience import versions
from longlora_jax.training import metrics

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "longlora_jax").rglob("*.py"), *ROOT.glob("*.py")])
MANY = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")

# The machine runs out of something


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")


def no_memory(*_):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9876543210 bytes.")


def lost_mount(*_):
    raise OSError(errno.ESTALE, "Stale file handle", "runs/x/checkpoints")


def read_only(*_):
    raise OSError(errno.EROFS, "Read-only file system", "runs/x/config.json.incomplete")


@MANY
@pytest.mark.parametrize(
    "where, fault, said",
    [
        ((metrics.MetricsLog, "write"), full_disk, "metrics.jsonl: No space left on device: free some space"),
        ((FakeStep, "__call__"), no_memory, "allocate 9876543210 bytes): lower batch_size or raise accumulation"),
        ((FakeStep, "compile"), no_memory, "set remat=block, raise chunks, lower loss_chunk"),
        ((metrics.MetricsLog, "write"), lost_mount, "Stale file handle: look at the disk or its mount"),
        ((None, "write_run_config"), read_only, "Read-only file system: make it writable, or choose another"),
    ],
    ids=["full disk", "no memory for a step", "no memory to compile", "a lost mount", "read only"],
)
def test_what_a_machine_runs_out_of_is_one_line(
    where, fault, said, script, train, fake, home, tmp_path, capsys, monkeypatch
):
    """Catches: a stack trace of XLA that ends in a number, for what a smaller batch mends; a disk's fault that looks
    like a fault of the program."""
    place, name = where
    monkeypatch.setattr(place or script, name, fault)
    if name == "compile":
        monkeypatch.setattr(script, "compile_train_step", no_memory_to_compile)
    with pytest.raises(SystemExit) as stop:
        train(longlora(home, steps=3), tmp_path / "work")
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(err) == 1 and said in err[0]


def no_memory_to_compile(*_, **__):
    no_memory()


def test_faults_of_the_program_are_not_explained_away():
    """Catches: a bug that looks like a full disk."""
    for error in (ValueError("No space left"), FileNotFoundError(errno.ENOENT, "No such file"), KeyError("x")):
        assert in_plain_words(error) is None
    assert in_plain_words(JaxRuntimeError("INTERNAL: something else")) is None
    assert in_plain_words(MemoryError()).startswith("out of memory (of this machine)")


# What code computed it


def test_versions_are_kept_and_changes_are_said(tmp_path, caplog, monkeypatch):
    """Catches: a run of which nobody can say what computed it; a note at each start; one that changes steps in
    silence."""
    for _ in range(2):
        versions.record(str(tmp_path), 0)
    (start,) = json.loads((tmp_path / "versions.json").read_text())["starts"]
    assert start["from_step"] == 0 and start["jax"] == jax.__version__
    assert {"longlora_jax", "python", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"} <= set(start)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    now = versions.versions()
    monkeypatch.setattr(versions, "versions", lambda: {**now, "jax": "9.9"})
    versions.record(str(tmp_path), 40)
    assert f"steps before 40 were computed by other versions: jax {jax.__version__}, now 9.9" in caplog.text
    starts = json.loads((tmp_path / "versions.json").read_text())["starts"]
    assert [(s["from_step"], s["jax"]) for s in starts] == [(0, jax.__version__), (40, "9.9")]


# Nothing that is read is run


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """(name as written, call) of every call in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def test_no_reader_runs_what_it_reads():
    """Catches: an option of a library that runs code out of a folder that it reads; a reader that unpickles."""
    banned = re.compile(
        r"(c?pickle|dill|joblib|shelve|marshal)\.|torch\.(load|hub)|^(eval|exec|compile|__import__|execfile)$|"
        r"yaml\.(load|unsafe_load|full_load)|os\.(system|popen|exec)|extractall|unpack_archive"
    )
    wrong = []
    for path in SHIPPED:
        text = path.read_text()
        assert not re.search(r"trust_remote_code[\"']?\s*[=:]\s*(?!False)", text), path
        for name, call in calls(path):
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            unpickles = name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False"
            shell = given.get("shell", "False") != "False"
            if banned.search(name) or unpickles or shell:
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert not wrong


# Hostile overrides

WORDS = (
    "0 1 -1 1e400 nan inf 2**99 99999999999999999999999 '' None True [] () {} (1,2) [1] \\x00 ä text s2 full lora "
    "/etc/passwd . __class__ __init__ lambda:1 __import__('os') {1:2} 0x10 1_000 ' \" = == \n \t ${x} %s -- --config"
).split(" ")


def fields(value, before: str = "") -> list[str]:
    """Every field of a config by its dotted name."""
    found = []
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), f"{before}{field.name}"
        found += [name, *(fields(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [])]
    return found


def test_overrides_are_taken_or_refused(home, tmp_path):
    """Catches: a traceback for a flag, a flag that runs something, one whose type validate() stumbles over."""
    base = longlora(home)
    path, names, rng = write_config(tmp_path, base), fields(base), random.Random(0)
    taken = refused = 0
    for _ in range(1500):
        flags = []
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(names)
            if rng.random() < 0.2:
                at = rng.randrange(len(name))
                name = name[:at] + rng.choice(["", ".", "_", "__dict__", "x", "["]) + name[at + 1 :]
            value = rng.choice(WORDS) if rng.random() < 0.8 else repr(rng.uniform(-1e3, 1e3))
            flags.append(f"--config.{name}={value}" if rng.random() < 0.9 else f"--config.{name}")
        try:
            config = read_config(path, flags)
            assert isinstance(config, Config)
            validate(config)
            taken += 1
        except UserError as error:
            assert "\n" not in str(error), flags
            refused += 1
        except Exception as error:
            raise AssertionError(f"{flags}: {type(error).__name__}: {error}") from error
    assert taken > 40 and refused > 300
