"""Folders that an earlier version wrote still open: tests/weights/earlier/folders.tar.xz holds one of each kind.

They were made before the package had wings, when the mode was called lora_plus: a base, a workdir of four steps, its
export and its adapter, and the base converted. logits.json is what that version computed from them.
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import read_metrics

from longlora_jax.config import Config, MeshConfig
from longlora_jax.config_file import read_run_config
from longlora_jax.model.decoder import Llama
from longlora_jax.training.resolve import resolve
from longlora_jax.weights.load import load_model
from longlora_jax.weights.peft import load_peft

THERE = "/tmp/earlier"  # where they lay when they were written


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """The folders, with the workdir's paths made those of this copy."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(Path(__file__).parent / "earlier" / "folders.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    config = folder / "workdir" / "config.json"
    config.write_text(config.read_text().replace(THERE, str(folder)))
    return folder


@pytest.mark.parametrize("kind", ["workdir", "converted", "export"])
def test_earlier_folders_are_the_same_model(kind, earlier):
    """Catches: a file format, a name of a weight or a field of config.json that changed under those who have one."""
    model = load_model(str(earlier / kind))
    logits = jax.jit(Llama(model.config).apply)({"params": model.merged()}, np.arange(20)[None])
    expected = json.loads((earlier / "logits.json").read_text())[kind]
    np.testing.assert_allclose(np.asarray(logits)[0, -1, :8], expected, rtol=1e-5, atol=1e-5)


def test_an_earlier_adapter_is_read(earlier):
    """Catches: names inside adapter_model.safetensors that are no longer known."""
    config, lora, params = load_peft(str(earlier / "adapter"), base=str(earlier / "base"))
    logits = jax.jit(Llama(config, lora=lora).apply)({"params": params}, np.arange(20)[None])
    expected = json.loads((earlier / "logits.json").read_text())["workdir"]
    np.testing.assert_allclose(np.asarray(logits)[0, -1, :8], expected, rtol=1e-5, atol=1e-5)


def test_an_earlier_run_goes_on(earlier, train, monkeypatch):
    """Catches: a mode, a state or a data position of an earlier run that resuming refuses."""
    monkeypatch.chdir(earlier)
    saved = read_run_config(str(earlier / "workdir"))
    assert saved.mode == "longlora" and Config(seq_len=8, steps=1, mode="lora_plus").mode == "longlora"
    before = read_metrics(earlier / "workdir")
    config = dataclasses.replace(saved, model=None, mesh=MeshConfig(fsdp=1), log_every=2)
    assert resolve(config, str(earlier / "workdir"))[1]
    train(config, earlier / "workdir")
    assert read_metrics(earlier / "workdir") == before  # all of its steps were done
