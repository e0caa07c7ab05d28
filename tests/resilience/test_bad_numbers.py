"""Numbers that go wrong: a bad step changes nothing but the count of steps, and a row of them ends the run."""

import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import longlora
from safetensors.numpy import load_file, save_file
from states import LORA, start
from tiny import random_batch

from longlora_jax.config import EvalConfig, OptimConfig
from longlora_jax.resilience.health import Health
from longlora_jax.training.optim import make_optimizer
from longlora_jax.training.resolve import resolve
from longlora_jax.training.step import jit_train_step

# A schedule, and clipping, which divides by a norm that is not finite.
ADAMW = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=3, schedule="cosine", weight_decay=0.1), steps=8)
BAD = 36  # a token whose embedding is not finite


def poisoned(value: float, accumulation: int):
    """(state, frozen) of a model in which one token's embedding is `value`; it is frozen, so it stays."""
    state, frozen = start("lora", ADAMW, lora=LORA, accumulation=accumulation)
    frozen["embed_tokens"]["embedding"] = frozen["embed_tokens"]["embedding"].at[BAD].set(value)
    return state, frozen


def harmless(seed: int):
    """A batch without the bad token."""
    batch = random_batch(2, 20, seed=seed)
    return batch | {"tokens": batch["tokens"] % BAD}


def one_step_later(state):
    """The state after a step that was not taken: what goes by steps is one further, all else as it was."""
    clip, (adam, decay, schedule) = state.opt_state
    schedule = schedule._replace(count=schedule.count + 1)
    return state.replace(step=state.step + 1, opt_state=(clip, (adam, decay, schedule)))


@pytest.mark.parametrize("value, accumulation", [pytest.param(np.inf, 1, marks=pytest.mark.slow), (np.nan, 2)], ids=str)
def test_a_bad_batch_changes_nothing_but_the_count(value, accumulation):
    """Catches: NaN in weights or moments, a bad part that accumulation hides, a schedule that falls a step behind, a
    bias correction that counts an update that was none, a later step that differs."""
    state, frozen = poisoned(value, accumulation)
    step = jit_train_step(state)
    reference = jax.tree.map(jnp.copy, state)
    for i in range(6):
        batch = harmless(i)
        if i == 3:
            batch["tokens"] = batch["tokens"].at[1, 4].set(BAD)
            state, values = step(state, frozen, batch)
            assert not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"])
            assert (int(values["skipped"]), int(values["in_a_row"])) == (1, 1)
            reference = one_step_later(reference)
            continue
        state, values = step(state, frozen, batch)
        reference, expected = step(reference, frozen, batch)
        assert float(values["loss"]) == float(expected["loss"]) and int(values["in_a_row"]) == 0
    assert int(state.skipped) == 1
    counts = {"skipped": state.skipped}
    jax.tree.map(np.testing.assert_array_equal, state, reference.replace(**counts))
    assert step._cache_size() == 1


def test_a_gradient_alone_can_be_bad():
    """Catches: a check of the loss only. Adapters of 1e30 times zero add nothing, but the zeros' gradient overflows."""
    state, frozen = poisoned(1.0, 1)
    huge = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (1e30 if path[-1].key == "lora_a" else 0), state.trainable
    )
    kept = jax.tree.map(np.array, huge)
    new, values = jit_train_step(state)(state.replace(trainable=huge), frozen, harmless(0))
    assert math.isfinite(values["loss"]) and not math.isfinite(values["grad_norm"])
    assert int(values["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, new.trainable, kept)


def poison(home, folder):
    """A copy of the base in which the letter "q" gives NaN."""
    (folder / "base").mkdir()
    for file in (home / "base").iterdir():
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    weights = folder / "base" / "model.safetensors"
    tensors = load_file(weights)
    letters = json.loads((home / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["model.embed_tokens.weight"][letters["q"]] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    return str(folder / "base"), letters["q"]


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
def test_a_row_of_bad_steps_ends_the_run_with_its_batch(script, train, home, tmp_path, capsys):
    """Catches: days of steps that change nothing; a line that does not say where to look; another step's batch."""
    base, letter = poison(home, tmp_path)
    changes = {"mode": "lora", "accumulation": 1, "batch_size": 8, "eval": EvalConfig(), "save_every": 2}
    config = longlora(home, init_from=base, steps=9, max_bad_steps=4, log_every=2, **changes)
    with pytest.raises(SystemExit) as stop:
        train(config, tmp_path / "work")
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(err) == 1
    path = tmp_path / "work" / "bad_batch_4.npz"
    assert err[0].startswith("error: steps 1 to 4 were skipped") and str(path) in err[0]
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped"] for line in lines] == [2, 4] and lines[-1]["train/loss"] is None

    saved = np.load(path, allow_pickle=False)
    assert int(saved["step"]) == 4 and (saved["tokens"] == letter).any()
    config, _ = resolve(config, str(tmp_path / "none"))
    batches = script.run.open_batches(config, None)
    wanted = [next(batches) for _ in range(4)][-1]
    for name, x in wanted.items():
        np.testing.assert_array_equal(saved[name], x)


def test_jumps_of_the_loss_are_said(caplog):
    """Catches: a jump that nobody hears of, a word at each wiggle, and a jump that hides the next one."""
    health, rng = Health(10), np.random.default_rng(0)

    def look(step, loss):
        return health.look(step, {"loss": loss, "grad_norm": 1.0, "skipped": 0})

    with caplog.at_level(logging.WARNING, "longlora_jax"):
        for step in range(200):
            assert look(step, 3 - step / 2000 + rng.normal() / 20) == {}
        assert not caplog.messages
        for step, loss in ((200, 3.5), (201, 2.0), (202, 3.5)):
            look(step, loss)
    assert [message.split(",")[0] for message in caplog.messages] == ["step 200: loss 3.5", "step 202: loss 3.5"]
