"""Every file in configs/ loads, is valid, and its very training step lowers from abstract shapes."""

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from longlora_jax.config import Config, validate
from longlora_jax.config_file import read_config
from longlora_jax.errors import UserError
from longlora_jax.fields import from_dict
from longlora_jax.model.decoder import abstract_params
from longlora_jax.model.trainable import count
from longlora_jax.plan import gpus, planner
from longlora_jax.plan.chips import GIB
from longlora_jax.training import run
from longlora_jax.training.resolve import extend_model
from longlora_jax.training.step import train_step
from longlora_jax.weights import hf

CONFIGS = sorted(p for p in Path("configs").glob("*.py"))
# method.md's numbers and those of the models' own cards: a preset with one wrong size shows here.
PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192, "smollm2": 134_515_008}


# One of every structure: LLaMA's other sizes, windows and modes lower as these do.
LOWERED = {"tiny_base", "gemma3_4b_256k", "pythia_1b_16k", "7b_32k_nf4"}


def load(path: Path) -> Config:
    """The config of a file, loaded as train.py does it: from its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def resolved(config: Config) -> Config:
    """The config as a run sees it, but without the base's folder: a newcomer has no LLaMA-2."""
    if config.model is None:
        config.model = hf.load_config(config.init_from)
    config.model = extend_model(config.model, config)
    return config


def abstract_run(path: Path):
    """(Config, Llama, TrainState, frozen) of a file, as shapes."""
    config = load(path)
    validate(config)
    config = resolved(config)
    model = run.build_model(config)
    return config, model, *run.abstract_state(config, model)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem in LOWERED else pytest.mark.slow) for p in CONFIGS],
)
def test_config_lowers(path):
    """Catches a config that names a field or a shape that does not exist, before somebody pays for a pod."""
    config, _, state, frozen = abstract_run(path)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    batch = {"tokens": rows, "positions": rows, "loss_mask": rows}
    lowered = jax.jit(train_step, donate_argnums=0).lower(state, frozen, batch)
    new_state, metrics = lowered.out_info
    assert metrics["loss"].shape == ()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state.trainable) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state.trainable
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_loads(path):
    """Catches a config that names a field that does not exist, a preset with one wrong size."""
    _, model, state, _ = abstract_run(path)
    for name, parameters in PARAMETERS.items():
        if path.stem.startswith(name):
            adapters = sum(
                leaf.size
                for keys, leaf in jax.tree_util.tree_leaves_with_path(state.trainable)
                if keys[-1].key.startswith("lora_")
            )
            assert count(abstract_params(model.clone(quantization=None))) - adapters == parameters


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_docstring_tells_how_to_run_it(path):
    """A config file without its command, hardware or expected result is a riddle."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    for word in ("Command:", "Hardware:", "Expected:", path.name):
        assert word in docstring, f"{path} does not say {word}"


PLANNED = {path: text for path in CONFIGS if "GiB" in (text := path.read_text()) and "planner's formula" in text}
CARDS = {"8 x H100": "h100:8", "one RTX 3090": "rtx3090:1"}


@pytest.mark.parametrize("path", PLANNED, ids=lambda p: p.stem)
def test_a_docstring_has_the_planners_memory(path, monkeypatch):
    """Catches: a figure of an earlier formula. The flags of the plan are the lines below it that hold flags alone."""
    monkeypatch.setattr(gpus, "installed_version", lambda package: "")  # by formula, whatever is installed
    hardware = PLANNED[path].partition("Hardware:")[2].partition("Expected:")[0]
    (figure,) = re.findall(r"([\d.]+)(?: of [\d.]+)? GiB(?: a device)? by the planner's formula", hardware)
    flags = [f for line in re.findall(r"^ +(--config\S+(?: --config\S+)*)$", hardware, re.M) for f in line.split()]
    (card,) = (card for name, card in CARDS.items() if name in hardware)
    found = planner.plan(read_config(str(path), flags), card)
    assert figure == f"{found['hbm_bytes_per_device'] / GIB:.1f}", found["estimate"]


def test_paper_windows_and_factors():
    """The window, the group and the interpolation of the paper's longest 7B, which is no power of two."""
    config = resolved(load(Path("configs/7b_100k.py")))
    assert config.seq_len == 100_000
    assert config.attention.group_tokens(config.seq_len) == 25_000
    assert config.model.rope_scaling.factor == 25
    assert config.model.max_position_embeddings == 100_000


def test_a_saved_config_of_another_form_is_refused():
    """Catches: a traceback for a config.json that somebody edited."""
    with pytest.raises(UserError, match="DataConfig is .* here: it is an object of fields"):
        from_dict(Config, {"seq_len": 8, "steps": 1, "data": []})
    with pytest.raises(UserError, match="Config has no field seqlen"):
        from_dict(Config, {"seqlen": 8})


@pytest.mark.parametrize("by", ["train.py", "commands"])
def test_a_file_that_was_changed_within_a_second_is_read_anew(by, script, tmp_path, monkeypatch):
    """Catches: Python's bytecode of the file as it was before, which has the same size and time."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "run.py"
    for seed in (1, 2):
        path.write_text(
            "from longlora_jax.config import Config\n\n\ndef get_config():\n"
            f"    return Config(seq_len=8, steps=1, seed={seed})\n"
        )
        os.utime(path, (1_000_000_000, 1_000_000_000))
        if by == "commands":
            assert read_config(str(path)).seed == seed
        else:
            argv = ["train.py", f"--config={path}"]
            monkeypatch.setattr(sys, "argv", argv)
            script.parse_flags(argv)
            assert script._CONFIG.value.seed == seed
