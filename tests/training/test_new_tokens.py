"""Tokens that the base lacks: found in the text, trained, and exported with the tokenizer, as transformers reads it."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from runs import FakeStep, NoisyStep, longlora, read_metrics, shape
from tiny import random_params

import convert_weights
from longlora_jax.config import DataConfig, EvalConfig, MeshConfig
from longlora_jax.config_file import read_run_config
from longlora_jax.data import load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama
from longlora_jax.training import run
from longlora_jax.training.resolve import resolve
from longlora_jax.weights.hf import load_hf, save_hf
from longlora_jax.weights.load import load_model, open_model
from longlora_jax.weights.rules import build_params

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


@pytest.mark.parametrize(("mode", "tied"), [("lora", False), ("lora", True), ("longlora", False), ("longlora", True)])
def test_an_adapter_holds_the_new_rows(mode, tied, script, monkeypatch, home, config, train, tmp_path):
    """Catches: a card whose lines PEFT cannot run, as the base has no such rows; rows of the embedding or of lm_head
    that are in neither, because nothing of them was trained; an adapter that comes back without them."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    base = tmp_path / "base"
    model = Llama(shape(tie_word_embeddings=tied))
    save_hf(str(base), model.config, random_params(model), tokenizer_from=str(home / "tokenizer"))
    monkeypatch.setattr(script, "compile_train_step", NoisyStep().compile)
    config = dataclasses.replace(config, mode=mode, steps=1, init_from=str(base))
    train(dataclasses.replace(config, batch_size=2, accumulation=1), tmp_path / "work")
    convert_weights.main(["to-peft", str(tmp_path / "work"), str(tmp_path / "adapter")])

    tokens = np.random.default_rng(0).integers(250, 259, (1, 24))
    ours = load_model(str(tmp_path / "work"))
    expected = Llama(ours.config, lora=ours.lora).apply({"params": ours.params}, jnp.asarray(tokens, jnp.int32))
    assert expected.shape[-1] == 259
    monkeypatch.chdir(tmp_path / "adapter")
    names = {}
    exec(re.search(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.S)[1], names)
    assert isinstance(names["model"], peft.PeftModel)
    with torch.no_grad():
        theirs = names["model"].eval()(torch.from_numpy(tokens)).logits.float().numpy()
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-4)

    convert_weights.main(["from-peft", str(tmp_path / "adapter"), str(tmp_path / "again")])
    again, table, tokenizer, *_ = open_model(str(tmp_path / "again"))
    back = Llama(again).apply({"params": build_params(again, table)}, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(back, expected, rtol=0, atol=1e-4)
    assert load_tokenizer(tokenizer).token_id("<|call|>") == 258
    with pytest.raises(UserError, match="259 rows of tokens, its base 257.*leave --adapters_only out"):
        convert_weights.main(["to-peft", str(tmp_path / "work"), str(tmp_path / "few"), "--adapters_only"])
    if mode == "lora":  # as such adapters were written before: without the rows, which are the mean of the others
        path, settings = (
            tmp_path / "adapter" / "adapter_model.safetensors",
            tmp_path / "adapter" / "adapter_config.json",
        )
        safetensors = pytest.importorskip("safetensors.numpy")
        safetensors.save_file({k: t for k, t in safetensors.load_file(path).items() if ".lora_" in k}, path)
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"modules_to_save": None}))
        convert_weights.main(["from-peft", str(tmp_path / "adapter"), str(tmp_path / "earlier")])
        config, table, *_ = open_model(str(tmp_path / "earlier"))
        back = Llama(config).apply({"params": build_params(config, table)}, jnp.asarray(tokens, jnp.int32))
        np.testing.assert_allclose(back, expected, rtol=0, atol=1e-4)


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
