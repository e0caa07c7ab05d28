"""train.py as a user runs it: the files of a workdir, runs that are killed and started again, and bad input."""

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import STEPS, finish, full, kill_after, longlora, read_metrics, start, write_config
from tiny import tiny_config

from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import AttentionConfig, DataConfig, EvalConfig, MeshConfig
from longlora_jax.config_file import read_run_config
from longlora_jax.training.resolve import resolve
from longlora_jax.weights.hf import load_hf
from longlora_jax.weights.load import load_model

ROOT = Path(__file__).parents[2]


# Real processes


@pytest.fixture(scope="module", params=[longlora, pytest.param(full, marks=pytest.mark.slow)], ids=["longlora", "full"])
def whole_run(request, home, environment, tmp_path_factory):
    """A run that nothing disturbed: (kind, its folder, config file, workdir, stdout, stderr)."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    config, workdir = write_config(folder, request.param(home)), folder / "whole"
    out, err = finish(start(environment, config, workdir, "--config.optim.learning_rate=2e-3"))
    return request.param.__name__, folder, config, workdir, out, err


def test_a_workdir_holds_what_was_promised(whole_run, home):
    """Catches: an override that is not in config.json, a lost metric, noise of libraries on standard error, frozen
    weights that move."""
    kind, _, _, workdir, out, err = whole_run
    config = json.loads((workdir / "config.json").read_text())
    assert config["optim"]["learning_rate"] == 2e-3 and config["optim"]["beta2"] == 0.95
    assert config["model"]["vocab_size"] == 257 and config["model"]["max_position_embeddings"] == 32
    assert config["model"]["rope_scaling"]["factor"] == 2 and read_run_config(workdir).seq_len == 32

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    train = {"train/loss", "train/grad_norm", "train/learning_rate"}
    perf = {"perf/tokens_per_second", "perf/step_seconds"}
    evaluation = {"eval/loss", "eval/perplexity", "eval/tokens"} if kind == "longlora" else set()
    for line in lines:
        assert set(line) == {"step"} | train | perf | (evaluation if line["step"] % 10 == 0 else set())
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    rates = [line["train/learning_rate"] for line in lines]
    assert max(rates) == pytest.approx(2e-3) and rates[0] == pytest.approx(4e-4) and rates[-1] < 1e-4

    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [39, 40]
    events = b"".join(p.read_bytes() for p in workdir.glob("events.out.tfevents.*"))
    assert b"train/loss" in events and (b"eval/perplexity" in events) == (kind == "longlora")
    assert "group " in out and "tokens, 40 steps" in out
    bars = ("whole: ", "reading weights: ")
    assert all(line.startswith(bars) for line in err.splitlines() if line.strip()), err

    trained = load_model(str(workdir))
    if kind == "longlora":
        _, base = load_hf(str(home / "base"))
        for part in ("self_attn", "mlp"):
            for name, leaves in base["layers"][part].items():
                np.testing.assert_array_equal(trained.params["layers"][part][name]["kernel"], leaves["kernel"])
        assert (trained.params["norm"]["scale"] != base["norm"]["scale"]).all()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole_run, environment):
    """Catches: data, dropout, schedule or moments that start anew; steps that are reported twice or never."""
    kind, folder, config, whole, _, _ = whole_run
    workdir, moments = folder / "killed", random.Random(kind)
    stops = sorted(moments.sample(range(4, STEPS - 8), 1 if kind == "longlora" else 2))
    for lines in stops:
        process = start(environment, config, workdir, "--config.optim.learning_rate=2e-3")
        kill_after(process, workdir / "metrics.jsonl", lines)
        assert len(read_metrics(workdir)) < STEPS
    out, _ = finish(start(environment, config, workdir, "--config.optim.learning_rate=2e-3"))
    assert "resumed at step " in out
    assert read_metrics(workdir) == read_metrics(whole)
    one, other = (load_model(str(path)).params for path in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, one, other)


# A fault of a flag is seen in another process than one of the data, but told by the same lines.
@pytest.mark.parametrize("fault", [pytest.param("a flag", marks=pytest.mark.slow), "the data"])
def test_a_fault_is_one_line_and_exit_code_2(fault, home, environment, tmp_path):
    """Catches: a traceback, a warning of some library before the line, a workdir that nothing is in."""
    (tmp_path / "latin1.txt").write_bytes("Zürich".encode("latin-1") * 100)
    flag = "--config.optim.lr=1" if fault == "a flag" else f"--config.data.path={tmp_path / 'latin1.txt'}"
    process = start(environment, write_config(tmp_path, longlora(home)), tmp_path / "work", flag)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert ("lr" if fault == "a flag" else "not UTF-8") in err
    assert not (tmp_path / "work").exists()


# The same functions without a new process for each


def truncate(home, folder):
    """The base with half of its weights cut off."""
    copy_base(home, folder)
    weights = folder / "base" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def reshape(home, folder):
    """The base with a config that promises another width of the MLP."""
    copy_base(home, folder)
    config = folder / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 30}))


def copy_base(home, folder):
    (folder / "base").mkdir()
    for file in (home / "base").iterdir():
        (folder / "base" / file.name).write_bytes(file.read_bytes())


def text(content: bytes):
    return lambda home, folder: (folder / "text.txt").write_bytes(content)


FAULTS = {
    "group": ({"attention": AttentionConfig(group_size=12)}, None, "seq_len=32 is not a multiple of group_size=12"),
    "mode": ({"mode": "LORA"}, None, "use one of longlora, lora, lora_norm, lora_embedding, full"),
    "no model": ({"init_from": "", "model": None}, None, "set init_from to a model's folder"),
    "no base": ({"init_from": "{here}/nothing"}, None, "nothing is not a folder"),
    "truncated": ({"init_from": "{here}/base"}, truncate, "model.safetensors is damaged or cut off"),
    "shape": ({"init_from": "{here}/base"}, reshape, "gate_proj.weight has shape [28, 16], it must be [30, 16]"),
    "other model": ({"model": tiny_config(vocab_size=99)}, None, "it has vocab_size=257, not 99"),
    "no data": ({"data": DataConfig(path="{here}/nothing")}, None, "does not exist"),
    "no tokenizer": ({"data": DataConfig(path="{home}/text.txt", tokenizer="{here}/none")}, None, "does not exist"),
    "not UTF-8": ({"data": DataConfig(path="{here}/text.txt")}, text(b"caf\xe9" * 99), "not UTF-8: byte 0xe9"),
    "empty": ({"data": DataConfig(path="{here}/text.txt")}, text(b" \n"), "has no text"),
    "short": ({"data": DataConfig(path="{here}/text.txt")}, text(b"pear"), "longer than the corpus (5 tokens)"),
    "short eval": (
        {"eval": EvalConfig(every=1, data=DataConfig(path="{here}/text.txt"))},
        text(b"pear"),
        "longer than the corpus (5 tokens)",
    ),
    "devices": ({"batch_size": 12, "mesh": MeshConfig(auto=False)}, None, "6 rows a step cannot be cut"),
}


def placed(value, **places):
    """A config with the places in its paths filled in."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: placed(getattr(value, f.name), **places) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value.format(**places) if isinstance(value, str) else value


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
@pytest.mark.parametrize("name", FAULTS)
def test_bad_input_is_one_line_and_leaves_nothing(name, train, home, tmp_path, capsys):
    """Catches: a fault that is met only after the workdir is there, and one that is told as a traceback."""
    changes, prepare, message = FAULTS[name]
    if prepare:
        prepare(home, tmp_path)
    config = longlora(home, **{key: placed(value, here=tmp_path, home=home) for key, value in changes.items()})
    with pytest.raises(SystemExit) as stop:
        train(config, tmp_path / "work")
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "work").exists()


def tree_digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_the_loop_keeps_its_rhythm(train, fake, home, tmp_path, capsys):
    """Catches: an evaluation that is due between two logged steps, a last step that is not saved or logged, full
    attention that comes a step too early or is forgotten after a restart."""
    config = longlora(home, steps=11, log_every=4, save_every=5, keep_checkpoints=9, mesh=MeshConfig(fsdp=1))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=3))
    config = dataclasses.replace(config, attention=AttentionConfig(pattern="short", group_size=8, full_last=0.3))
    train(config, tmp_path / "work")
    lines = read_metrics(tmp_path / "work")
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 11]
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6, 9, 11]
    assert sorted(int(p.name) for p in (tmp_path / "work" / "checkpoints").iterdir()) == [5, 10, 11]
    assert fake.patterns == [Pattern("short", 8)] * 8 + [FULL] * 3
    assert "1.50 GiB a device expected: 1.00 of weights" in capsys.readouterr().out

    # Step 11 is undone, as after a crash: what is left to do is done again, under full attention.
    fake.patterns.clear()
    fake.compiled.clear()
    os.rename(tmp_path / "work" / "checkpoints" / "11", tmp_path / "undone")
    train(config, tmp_path / "work")
    assert fake.compiled == fake.patterns == [FULL] and read_metrics(tmp_path / "work") == lines
    assert "resumed at step 10" in capsys.readouterr().out


def test_steps_take_turns_between_patterns(train, fake, home, tmp_path):
    """Catches: full_every that begins a step early, compiles at every turn, or is out of step after a restart."""
    attention = AttentionConfig(pattern="short", group_size=8, full_every=3, full_last=0.3)
    config = longlora(home, steps=10, save_every=4, keep_checkpoints=9, mesh=MeshConfig(fsdp=1), attention=attention)
    train(config, tmp_path / "work")
    short = Pattern("short", 8)
    assert fake.patterns == [short, short, FULL, short, short, FULL, short, FULL, FULL, FULL]
    assert fake.compiled == [short, FULL]
    fake.patterns.clear()
    for step in ("8", "10"):
        os.rename(tmp_path / "work" / "checkpoints" / step, tmp_path / f"undone-{step}")
    train(config, tmp_path / "work")
    assert fake.patterns == [short, FULL, short, FULL, FULL, FULL]


def test_packed_and_mixed_data_reach_the_step(train, fake, home, tmp_path, capsys):
    """Catches: segments that a step does not see, or pays for where there are none; a batch that is placed ahead and
    lost or trained twice on resume; a census without the account; a run that goes on with other data."""
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text("quince " * (1 + i % 4))
    packed = DataConfig(path=str(tmp_path / "texts"), packing="best_fit", weight=3.0)
    config = longlora(home, steps=6, save_every=2, keep_checkpoints=9, mixture=(packed,), mesh=MeshConfig(fsdp=1))
    train(config, tmp_path / "work")
    whole = fake.batches
    assert len(whole) == 6 and {"tokens", "positions", "loss_mask", "segment_ids"} == set(whole[0])
    for batch in whole:
        rows = batch["segment_ids"][:, -1] != 1  # joined rows are one segment, of these packed ones none is
        assert rows.sum() == 12 and (batch["segment_ids"].max(axis=1) > 1)[rows].any()
    out = capsys.readouterr().out
    assert "data       25.0% of rows, " in out and " best_fit: " in out and "documents cut" in out

    for step in (4, 6):  # undone, as after a crash; and resumed with workers
        os.rename(tmp_path / "work" / "checkpoints" / str(step), tmp_path / f"undone{step}")
    fake.batches = []
    train(dataclasses.replace(config, workers=1), tmp_path / "work")
    assert len(fake.batches) == 4
    for again, batch in zip(fake.batches, whole[2:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, again, batch)

    (tmp_path / "texts" / "0.txt").write_text("pear")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(config, tmp_path / "work")
    assert "error: the saved position belongs to other data: data[1]" in capsys.readouterr().err

    fake.batches = []
    train(longlora(home, steps=1, mesh=MeshConfig(fsdp=1)), tmp_path / "joined")
    assert set(fake.batches[0]) == {"tokens", "positions", "loss_mask"}


def test_a_workdir_is_of_one_run(train, fake, home, tmp_path, capsys):
    """Catches: a run that goes on with another config or another base, and a workdir that such a try has changed."""
    copy_base(home, tmp_path)
    workdir = tmp_path / "work"
    config = longlora(home, steps=2, init_from=str(tmp_path / "base"), mesh=MeshConfig(fsdp=1))
    train(config, workdir)
    before = tree_digest(workdir)

    def refused(config, workdir, message):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(config, workdir)
        err = [
            line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("reading weights: ")
        ]
        assert stop.value.code == 2 and len(err) == 1 and err[0].startswith("error: ") and message in err[0]

    refused(
        dataclasses.replace(config, seed=1),
        workdir,
        "a run with another seed (1, it was 0): give the config that it was",
    )
    weights = tmp_path / "base" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    refused(config, workdir, "are not those that")
    assert tree_digest(workdir) == before
    base = tree_digest(tmp_path / "base")
    refused(config, tmp_path / "base", "holds the config.json of something else than a run")
    refused(config, weights, "cannot be made")
    assert tree_digest(tmp_path / "base") == base


@pytest.mark.parametrize("kind", [longlora, full])
def test_a_state_lies_on_the_whole_mesh(kind, script, home, tmp_path):
    """Catches: scalars that start on one device and come back on all of them, so that step 2 compiles anew or fails; a
    model from nothing whose trained weights are rounded."""
    config = dataclasses.replace(kind(home), dtype="bfloat16")
    config, _ = resolve(config, str(tmp_path / "none"))
    mesh = script.sharding.make_mesh(config.mesh)
    state, frozen = script.run.initial_state(config, script.run.build_model(config), mesh)
    for leaf in jax.tree.leaves((state, frozen)):
        assert leaf.committed and leaf.sharding.device_set == set(mesh.devices.flat)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == ({"bfloat16"} if kind is longlora else set())
