"""What a run is: what it computes, not where its parts lie, nor how it is watched; and what continues it."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import FakeEvaluation, longlora, read_metrics, train_here, write_config

from longlora_jax.config import DataConfig, EvalConfig, MeshConfig, OptimConfig
from longlora_jax.config_file import read_config, read_run_config
from longlora_jax.errors import UserError
from longlora_jax.resilience.lock import LOCK, WorkdirLock
from longlora_jax.training import optim, run
from longlora_jax.training.resolve import resolve
from longlora_jax.weights.load import load_model
from longlora_jax.weights.workdir import at_step


def plain(home, **changes):
    """A run of one compiled step: one device, one attention pattern, no evaluation."""
    config = longlora(home, mesh=MeshConfig(fsdp=1), eval=EvalConfig(), **changes)
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, full_last=0.0))


@pytest.fixture
def moved(home, tmp_path):
    """(a copy of the base, a config that starts from it): to be moved away."""
    shutil.copytree(home / "base", tmp_path / "base")
    return tmp_path / "base", plain(home, steps=4, save_every=2, init_from=str(tmp_path / "base"))


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """(config, workdir) of a run of three real steps."""
    folder = tmp_path_factory.mktemp("trained")
    config = plain(home, steps=3, save_every=3)
    train_here(config, folder, folder / "first")
    return config, folder / "first"


def refused(train, config, workdir, capsys) -> str:
    """The one line by which a run ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(config, workdir)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stop.value.code == 2
    return line


def test_a_base_that_was_moved_is_the_same_base(train, fake, moved, tmp_path, capsys):
    """Catches: a run that knows its base, or its corpus, by path; a config.json that goes on naming the old one."""
    base, config = moved
    train(config, tmp_path / "work")
    os.rename(tmp_path / "work" / "checkpoints" / "4", tmp_path / "undone")
    os.rename(base, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("# new")  # as a hub's repository gets a new revision
    assert "is not a folder" in refused(train, config, tmp_path / "work", capsys)
    shutil.copy(config.data.path, tmp_path / "text.txt")
    data = dataclasses.replace(config.data, path=str(tmp_path / "text.txt"))
    there = dataclasses.replace(config, init_from=str(tmp_path / "elsewhere"), data=data)
    train(there, tmp_path / "work")
    assert [line["step"] for line in read_metrics(tmp_path / "work")] == [1, 2, 3, 4]
    saved = read_run_config(str(tmp_path / "work"))
    assert (saved.init_from, saved.data.path) == (str(tmp_path / "elsewhere"), str(tmp_path / "text.txt"))
    assert load_model(str(tmp_path / "work")).lora == config.lora
    (tmp_path / "text.txt").write_text("pear " * 3000)
    assert "belongs to other data" in refused(train, there, tmp_path / "work", capsys)


def test_memory_and_reporting_are_free_on_resume(train, fake, home, tmp_path, capsys):
    """Catches: a run that must be given up because one device more, or one more evaluation, is there."""
    config = longlora(home, steps=4, save_every=2, mesh=MeshConfig(fsdp=1))
    train(config, tmp_path / "work")
    os.rename(tmp_path / "work" / "checkpoints" / "4", tmp_path / "undone")
    more = {"log_every": 2, "save_every": 1, "chunks": 2, "loss_chunk": 7, "accumulation": 1, "remat": "block"}
    evaluation = dataclasses.replace(config.eval, every=1, max_windows=3)
    train(dataclasses.replace(config, **more, eval=evaluation), tmp_path / "work")
    assert read_run_config(str(tmp_path / "work")).loss_chunk == 7
    for name, value in {"seed": 1, "batch_size": 32, "dtype": "bfloat16"}.items():
        line = refused(train, dataclasses.replace(config, **{name: value}), tmp_path / "work", capsys)
        assert (
            f"a run with another {name} ({value}, it was " in line
            and f"--config.continue_from={tmp_path / 'work'}" in line
        )


def test_steps_may_grow_where_the_schedule_does_not_depend_on_them(train, fake, home, tmp_path, capsys):
    """Catches: a cosine that is bent in the middle of a run, and a constant rate that is refused 500 steps more."""
    constant = plain(home, steps=2, optim=OptimConfig(learning_rate=1e-3, warmup_steps=1))
    train(constant, tmp_path / "work")
    train(dataclasses.replace(constant, steps=5), tmp_path / "work")
    assert [line["step"] for line in read_metrics(tmp_path / "work")] == [1, 2, 3, 4, 5]
    cosine = dataclasses.replace(constant, optim=dataclasses.replace(constant.optim, schedule="cosine"))
    train(cosine, tmp_path / "cosine")
    line = refused(train, dataclasses.replace(cosine, steps=5), tmp_path / "cosine", capsys)
    assert "another steps" in line


def test_continue_from_begins_with_weights_and_moments(trained, train, fake, home, tmp_path, capsys):
    """Catches: moments that start anew, a schedule or a data position that is carried on, another base or adapter."""
    config, first = trained
    (tmp_path / "other.txt").write_text("sloe and rowan, " * 600)
    optimizer = OptimConfig(learning_rate=5e-4, warmup_steps=1, embedding_learning_rate=1e-4)
    data = DataConfig(path=str(tmp_path / "other.txt"))
    changes = {"continue_from": str(first), "init_from": "", "optim": optimizer, "data": data}
    more = dataclasses.replace(config, steps=2, seed=5, **changes)

    resolved, resumes = resolve(more, str(tmp_path / "second"))
    assert not resumes and resolved.init_from == config.init_from
    mesh = run.sharding.make_mesh(resolved.mesh)
    state, _ = run.initial_state(resolved, run.build_model(resolved), mesh)
    begun = run.continued_state(resolved, state)
    saved = load_model(str(first)).params
    np.testing.assert_array_equal(begun.trainable["norm"]["scale"], saved["norm"]["scale"])
    (adam,) = [x for x in jax.tree.leaves(begun.opt_state, is_leaf=run._is_adam) if run._is_adam(x)]
    assert int(adam.count) == 3 and int(begun.step) == 0 and np.abs(adam.mu["norm"]["scale"]).max() > 0

    train(more, tmp_path / "second")
    assert [line["step"] for line in read_metrics(tmp_path / "second")] == [1, 2]
    assert "continued from step 3" in capsys.readouterr().out
    train(more, tmp_path / "second")  # resumes itself: done
    assert "resumed at step 2" in capsys.readouterr().out
    lora = dataclasses.replace(config.lora, alpha=1.0)
    line = refused(train, dataclasses.replace(more, lora=lora), tmp_path / "third", capsys)
    assert "was trained with lora=" in line and not (tmp_path / "third").exists()
    line = refused(train, dataclasses.replace(more, continue_from=str(home)), tmp_path / "third", capsys)
    assert "is not the workdir of a run" in line
    # The earlier run is needed until there is a checkpoint, and no longer.
    for changed in (more, dataclasses.replace(more, continue_from="", init_from=config.init_from)):
        moved = dataclasses.replace(changed, continue_from=changed.continue_from and str(tmp_path / "gone"))
        assert resolve(moved, str(tmp_path / "second"))[1]
    for step in (tmp_path / "second" / "checkpoints").iterdir():
        shutil.rmtree(step)
    line = refused(
        train, dataclasses.replace(more, continue_from="", init_from=config.init_from), tmp_path / "second", capsys
    )
    assert "a run with another continue_from" in line
    line = refused(train, dataclasses.replace(more, continue_from=str(tmp_path / "second")), tmp_path / "third", capsys)
    assert "has no checkpoint yet" in line and not (tmp_path / "third").exists()


def test_the_best_step_is_kept_and_a_run_without_gain_ends(train, fake, script, monkeypatch, home, tmp_path):
    """Catches: a best step that newer ones push out or a restart forgets, and patience that starts anew."""
    losses = [3.0, 2.0, 2.5, float("nan"), 2.4, 1.0]
    monkeypatch.setattr(script, "Evaluation", lambda *_: FakeEvaluation(losses))
    changes = {"keep_checkpoints": 1, "keep_best": True, "early_stop": 3, "mesh": MeshConfig(fsdp=1)}
    config = longlora(home, steps=6, save_every=100, **changes)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=1))
    train(dataclasses.replace(config, early_stop=2), tmp_path / "work")  # ends at step 4, done
    steps = lambda: sorted(int(p.name) for p in (tmp_path / "work" / "checkpoints").iterdir())  # noqa: E731
    assert steps() == [2, 4] and losses == [2.4, 1.0]
    train(dataclasses.replace(config, early_stop=2), tmp_path / "work")
    assert losses == [2.4, 1.0]  # nothing more is done
    train(config, tmp_path / "work")  # one more evaluation, the third without gain
    assert steps() == [2, 5] and losses == [1.0]
    lines = (tmp_path / "work" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and json.loads(lines.splitlines()[3])["eval/loss"] is None


def test_losses_of_other_data_are_not_compared(train, fake, script, monkeypatch, home, tmp_path, capsys):
    """Catches: a run that ends for want of gain, or keeps a step, by the loss of other data."""
    config = longlora(home, steps=4, save_every=1, early_stop=2, keep_best=True, mesh=MeshConfig(fsdp=1))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=1))
    config.optim.schedule, config.attention.full_last = "constant", 0.0
    monkeypatch.setattr(script, "Evaluation", lambda *_: FakeEvaluation([1.0]))
    train(dataclasses.replace(config, steps=2), tmp_path / "work")
    monkeypatch.setattr(script, "Evaluation", lambda *_: FakeEvaluation([5.0, 4.0], identity="other data"))
    train(config, tmp_path / "work")
    assert "the data of eval has changed" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "work")] == [1, 2, 3, 4]
    assert at_step(str(tmp_path / "work"), "best").endswith("/4")


def test_fewer_steps_than_are_done_are_refused(train, fake, home, tmp_path, capsys):
    """Catches: code 75, "to be started again", which a launcher obeys for ever."""
    train(plain(home, steps=4, optim=OptimConfig(warmup_steps=0)), tmp_path / "work")
    fewer = plain(home, steps=2, optim=OptimConfig(warmup_steps=0))
    assert "has done 4: give as many or more" in refused(train, fewer, tmp_path / "work", capsys)
    assert read_run_config(str(tmp_path / "work")).steps == 4


def test_a_workdir_in_use_is_refused(train, fake, home, tmp_path, capsys):
    """Catches: two runs that write to one workdir; a lock that outlives its process."""
    workdir = tmp_path / "work"
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(run.__file__).parents[2])!r})
from longlora_jax.resilience.lock import WorkdirLock
with WorkdirLock({str(workdir)!r}) as lock:
    lock.acquire()
    print("held", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    line = refused(train, plain(home, steps=2), workdir, capsys)
    assert f"is in use by process {holder.pid} on " in line
    assert sorted(p.name for p in workdir.iterdir()) == [LOCK]
    holder.kill()
    holder.wait()
    train(plain(home, steps=2), workdir)
    with WorkdirLock(str(workdir)) as lock:
        lock.acquire()


def test_a_warm_up_that_does_not_end_is_said(home, tmp_path, caplog):
    """Catches: a run of 3 steps that reaches 15% of its learning rate without a word."""
    config = longlora(home, steps=3)
    few = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=20))
    with caplog.at_level(logging.WARNING):
        resolve(few, str(tmp_path / "work"))
    assert "optim.warmup_steps=20 of 3 steps" in caplog.text and "15%" in caplog.text
    caplog.clear()
    resolve(dataclasses.replace(config, steps=40), str(tmp_path / "work"))
    assert not caplog.records


def test_weight_decay_leaves_norms_and_biases(home):
    """Catches: scales of norms that are pulled to zero."""
    ones = {"norm": {"scale": np.ones(3)}, "layers": {"q_proj": {"bias": np.ones(3), "lora_a": np.ones(3)}}}
    grads = jax.tree.map(np.zeros_like, ones)

    def updates(**options):
        optimizer = optim.make_optimizer(OptimConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.1, **options), 9)
        return optimizer.update(grads, optimizer.init(ones), ones)[0]

    found = updates()
    assert not found["norm"]["scale"].any() and not found["layers"]["q_proj"]["bias"].any()
    np.testing.assert_allclose(found["layers"]["q_proj"]["lora_a"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates(decay_norms=True)["norm"]["scale"], -0.1, rtol=1e-6)


def tokenizer_with_a_hole(home, tmp_path) -> Path:
    """That of home with 257 tokens, of which the largest is 600."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(home / "tokenizer", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["p"] = 600
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_token_without_a_row_is_named(train, fake, home, tmp_path, capsys):
    """Catches: an id past the vocabulary, which reads as NaN at every step and ends "done"."""
    config = plain(home, steps=2)
    folder = str(tokenizer_with_a_hole(home, tmp_path))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=folder))
    assert "data holds token 600" in refused(train, config, tmp_path / "work", capsys)


def test_a_token_without_a_row_is_named_before_training_where_it_is_evaluated(train, home, tmp_path, capsys):
    """Catches: a loss of NaN at every evaluation, by which nothing is best, and a run that ends "done"."""
    evaluated = DataConfig(
        source="text", path=str(home / "text.txt"), tokenizer=str(tokenizer_with_a_hole(home, tmp_path))
    )
    config = dataclasses.replace(plain(home, steps=2), eval=EvalConfig(every=1, data=evaluated))
    said = refused(train, config, tmp_path / "work", capsys)
    assert "eval.data holds token 600" in said and "set eval.data.tokenizer to the model's own" in said


def test_steps_that_are_all_bad_are_no_success(train, home, tmp_path, capsys):
    """Catches: a short run of NaN alone that says "done" and ends with code 0."""
    model = load_model(str(home / "base"))
    from longlora_jax.weights.hf import save_hf

    params = jax.tree.map(np.asarray, model.params)
    params["norm"]["scale"] = np.full_like(params["norm"]["scale"], np.nan)
    save_hf(str(tmp_path / "base"), model.config, params, tokenizer_from=str(home / "base"))
    config = plain(home, steps=3, save_every=3, init_from=str(tmp_path / "base"))  # compiled as trained is
    assert "steps 1 to 3 were skipped" in refused(train, config, tmp_path / "work", capsys)
    for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))


def test_a_config_file_can_say_all_of_it(home, tmp_path, script):
    """Catches: a field that the flag parser cannot read."""
    config = longlora(home, steps=2)
    path = write_config(tmp_path, config)
    found = read_config(path, ["--config.keep_best=True", "--config.early_stop=3", "--config.continue_from=x"])
    assert (found.keep_best, found.early_stop, found.continue_from) == (True, 3, "x")
    with pytest.raises(UserError, match="keep_best and early_stop go by eval/loss"):
        evaluation = dataclasses.replace(config.eval, every=0)
        resolve(dataclasses.replace(config, keep_best=True, eval=evaluation), str(tmp_path / "work"))
