"""Tokens that the base lacks: found in the text, trained, and exported with the tokenizer, as transformers reads it."""

import dataclasses

import numpy as np
import pytest
from runs import FakeStep, longlora, read_metrics

import convert_weights
from longlora_jax.config import DataConfig, EvalConfig, MeshConfig
from longlora_jax.config_file import read_run_config
from longlora_jax.data import load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.training import run
from longlora_jax.training.resolve import resolve
from longlora_jax.weights.hf import load_hf
from longlora_jax.weights.load import load_model

TOKENS = ("<tool>", "<|call|>")


@pytest.fixture
def config(home, tmp_path):
    """A run on a text that has the tokens."""
    (tmp_path / "text.txt").write_text("pear <tool>quince<|call|> rowan " * 200)
    data = DataConfig(source="text", path=str(tmp_path / "text.txt"))
    config = longlora(home, steps=2, save_every=2, new_tokens=TOKENS, data=data, eval=EvalConfig())
    attention = dataclasses.replace(config.attention, full_last=0.0)
    return dataclasses.replace(config, attention=attention, mesh=MeshConfig(fsdp=1))  # one step to compile


@pytest.mark.slow
def test_new_tokens_are_trained_and_exported(train, script, monkeypatch, home, config, tmp_path):
    """Catches: a token in pieces, a row that is not there or not trained, an export whose tokenizer does not know it,
    a resumed run that adds it twice."""
    transformers = pytest.importorskip("transformers")
    base = load_hf(str(home / "base"))[1]
    train(config, tmp_path / "work")
    saved = read_run_config(str(tmp_path / "work"))
    assert saved.model.vocab_size == 259 and saved.data.tokenizer == str(tmp_path / "work" / "tokenizer")
    assert saved.init_from == config.init_from
    model = load_model(str(tmp_path / "work"))
    rows = model.params["embed_tokens"]["embedding"]
    mean = base["embed_tokens"]["embedding"].mean(axis=0)
    moved = np.abs(rows[257:] - mean).max(axis=1)
    assert (moved > 0).all() and (moved < 0.01).all()  # the mean, and two steps away from it

    convert_weights.main(["to-hf", str(tmp_path / "work"), str(tmp_path / "export")])
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    text = "pear <tool>quince<|call|> rowan"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == load_tokenizer(str(tmp_path / "export")).encode_batch([text], add_bos=False)[0].tolist()
    assert [i for i in ids if i >= 257] == [257, 258]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "export"))
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.lm_head.weight.shape[0] == 259
    head = base["lm_head"]["kernel"].mean(axis=1)
    np.testing.assert_allclose(theirs.lm_head.weight[258].float().detach(), head, rtol=1e-5, atol=1e-6)

    before = read_metrics(tmp_path / "work")
    monkeypatch.setattr(script, "compile_train_step", FakeStep().compile)
    train(config, tmp_path / "work")  # resumed: nothing is left to do
    assert read_metrics(tmp_path / "work") == before


def test_the_start_is_the_mean_of_the_others(config, tmp_path, script):
    """Catches: rows of zeros or noise, which a frozen model answers with nonsense."""
    resolved, _ = resolve(config, str(tmp_path / "none"))
    state, _ = run.initial_state(resolved, run.build_model(resolved), script.sharding.make_mesh(resolved.mesh))
    rows = np.asarray(state.trainable["embed_tokens"]["embedding"])
    np.testing.assert_allclose(rows[257], rows[:257].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens, said", [(("a b ",), "blanks"), (("",), "blanks"), (("<x>", "<x>"), "twice")])
def test_tokens_that_cannot_be_new(tokens, said, config, tmp_path):
    """Catches: a token that stands for two rows, and one that no text can hold."""
    with pytest.raises(UserError, match=said):
        resolve(dataclasses.replace(config, new_tokens=tokens), str(tmp_path / "none"))


def test_a_token_that_is_there_needs_no_row(config, tmp_path):
    """Catches: a second id for EOS, which the trained one would no longer end at."""
    resolved, _ = resolve(dataclasses.replace(config, new_tokens=("<eos>", "<tool>")), str(tmp_path / "none"))
    assert resolved.model.vocab_size == 258
