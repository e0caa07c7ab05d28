"""Checkpoints of a run by their step, and runs whose base lies elsewhere by now, in exports and evaluations."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import FakeEvaluation, FakeStep, longlora

import convert_weights
from longlora_jax.config import EvalConfig, MeshConfig
from longlora_jax.errors import UserError
from longlora_jax.evals.results import weights_of
from longlora_jax.weights.hf import load_hf
from longlora_jax.weights.load import load_model, open_model
from longlora_jax.weights.workdir import at_step

TINY = Path(__file__).parents[2] / "models" / "tiny-python-llama"


@pytest.fixture
def counted(train, fake, script, monkeypatch, home, tmp_path):
    """A workdir whose weights say of which step they are; its base is tmp_path / "base"."""
    shutil.copytree(home / "base", tmp_path / "base")
    monkeypatch.setattr(script, "Evaluation", lambda *_: FakeEvaluation([3.0, 1.0, 2.0, 2.0]))

    def step(self, state, frozen, batch):
        trainable = jax.tree.map(lambda x: x * 0 + state.step + 1, state.trainable)
        values = {"loss": 1.0, "grad_norm": 0.5, "skipped": 0, "in_a_row": 0}
        return state.replace(step=state.step + 1, trainable=trainable), values

    monkeypatch.setattr(FakeStep, "__call__", step)
    changes = {"keep_checkpoints": 2, "keep_best": True, "mesh": MeshConfig(fsdp=1)}
    config = longlora(home, steps=4, save_every=1, init_from=str(tmp_path / "base"), **changes)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=1))
    train(config, tmp_path / "work")
    return tmp_path / "work"


def test_a_step_is_exported_and_evaluated(counted, tmp_path, caplog):
    """Catches: --step that gives the newest all the same; a best step that no command can reach; results of two steps
    that pass for the same weights; warnings of orbax about a run that is only read."""
    for name, step in {"3": 3.0, "best": 2.0}.items():
        out = tmp_path / f"export-{name}"
        convert_weights.main(["to-hf", str(counted), str(out), "--step", name])
        np.testing.assert_array_equal(load_hf(str(out))[1]["norm"]["scale"], step)
    caplog.clear()
    assert float(load_model(str(counted)).params["norm"]["scale"][0]) == 4
    assert not [record for record in caplog.records if record.name == "absl"]
    path = at_step(str(counted), "3")
    assert float(np.asarray(open_model(path).table["model.norm.weight"].read())[0]) == 3
    third, newest = (weights_of(open_model(at)) for at in (path, str(counted)))
    assert third.startswith("step 3, ") and newest.startswith("step 4, ")
    adapter = tmp_path / "adapter"
    convert_weights.main(["to-peft", str(counted), str(adapter), "--step", "best"])
    assert (adapter / "adapter_model.safetensors").stat().st_size > 0
    for step, said in {"1": "keeps 2, 3, 4: take one", "last": "keeps 2, 3, 4"}.items():
        with pytest.raises(UserError, match=said):
            at_step(str(counted), step)
    with pytest.raises(UserError, match="is no workdir of train.py"):
        at_step(str(tmp_path / "base"), "3")


def test_results_know_a_run_that_was_trained_anew(train, fake, home, tmp_path):
    """Catches: results of a run that is gone given out as those of the one trained at its path since; results of a run
    whose adapters were given another scale by hand; a copy, or a run without digests, that is another each time."""
    work, seen = tmp_path / "work", []
    for seed in (0, 1):
        shutil.rmtree(work, ignore_errors=True)
        train(longlora(home, steps=2, mesh=MeshConfig(fsdp=1), seed=seed), work)
        seen += [weights_of(open_model(str(work)))] * 2
        shutil.copytree(work, tmp_path / "copy", dirs_exist_ok=seed > 0)
        if seed == 0:
            assert weights_of(open_model(str(tmp_path / "copy"))) == seen[0]
        os.unlink(work / "checkpoints" / "2" / "sha256.json")  # as runs of earlier versions
        seen[-1] = weights_of(open_model(str(work)))
        assert seen[-1] == weights_of(open_model(str(work)))
    config = work / "config.json"
    config.write_text(config.read_text().replace('"alpha": 16.0', '"alpha": 32.0'))
    seen.append(weights_of(open_model(str(work))))
    assert len(set(seen)) == 5 and all(one.startswith("step 2, ") for one in seen)


def test_a_base_that_was_moved_can_be_named(counted, tmp_path):
    """Catches: an export that needs the base at its old path; an adapter that needs any of it."""
    os.rename(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is gone: put the base back, or say where it is now"):
        open_model(str(counted))
    there = str(tmp_path / "elsewhere")
    convert_weights.main(["to-hf", str(counted), str(tmp_path / "export"), "--base", there])
    assert (tmp_path / "export" / "tokenizer.json").is_file()
    convert_weights.main(["to-peft", str(counted), str(tmp_path / "adapter"), "--base", there])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == there
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"x" * 60_000)
    with pytest.raises(UserError, match="are not those that"):
        convert_weights.main(["to-hf", str(counted), str(tmp_path / "other"), "--base", there])


def to_peft(work, out, *flags):
    convert_weights.main(["to-peft", str(work), str(out), *map(str, flags)])
    return json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_is_only_given_with_its_base(counted, tmp_path, capsys):
    """Catches: an adapter that names a base which was changed, is gone or is another model: it computes nonsense."""
    base = tmp_path / "base"
    for other, said in {"none": "is not a folder", TINY: "are not those that", counted: "are not those"}.items():
        with pytest.raises(UserError, match=said):
            to_peft(counted, tmp_path / "a", "--base", other)
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match="are not those that .* was started from"):
        to_peft(counted, tmp_path / "a")
    weights.write_bytes(content)
    os.rename(base, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is gone.*--base DIR of convert_weights.py"):
        to_peft(counted, tmp_path / "a")
    assert not (tmp_path / "a").exists() and "no tokenizer" not in capsys.readouterr().out
    assert to_peft(counted, tmp_path / "b", "--base", "org/name") == "org/name"
    assert "so the adapter has no tokenizer: take that of org/name" in capsys.readouterr().out
    assert to_peft(counted, tmp_path / "c", "--base", tmp_path / "elsewhere") == str(tmp_path / "elsewhere")
    assert (tmp_path / "c" / "tokenizer.json").is_file() and not (tmp_path / "b" / "tokenizer.json").exists()


def test_a_folder_in_place_of_a_converted_checkpoint(train, fake, home, tmp_path):
    """Catches: the base that a converted checkpoint was made of refused, as its files are others; a base of other
    shapes accepted."""
    convert_weights.main(["from-hf", str(home / "base"), str(tmp_path / "ours")])
    config = longlora(home, steps=1, init_from=str(tmp_path / "ours"), mesh=MeshConfig(fsdp=1), eval=EvalConfig())
    train(config, tmp_path / "work")
    assert to_peft(tmp_path / "work", tmp_path / "a", "--base", home / "base") == str(home / "base")
    with pytest.raises(UserError, match="embed_tokens.weight has shape"):
        to_peft(tmp_path / "work", tmp_path / "b", "--base", TINY)
