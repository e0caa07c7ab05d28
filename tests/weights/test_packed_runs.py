"""Runs over a base in four bits, from training to what they give away: where adapters go, and what is said of it."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import transformers
from runs import FakeStep, NoisyStep, longlora, shape
from tiny import random_params

import convert_weights
from longlora_jax.config import EvalConfig, MeshConfig
from longlora_jax.evals import perplexity
from longlora_jax.model.decoder import Llama
from longlora_jax.weights import load
from longlora_jax.weights.hf import open_hf, save_hf
from longlora_jax.weights.rules import adapters_of

PACKINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "int8 in part": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "q_proj"]},
}


@pytest.fixture(scope="module")
def packed_base(home, tmp_path_factory):
    """A base with home's tokenizer, as bitsandbytes quantizes it: packed_base(key of PACKINGS)."""
    # Of a size that bitsandbytes multiplies by on a CPU.
    model = Llama(shape(hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16))
    plain = str(tmp_path_factory.mktemp("plain") / "base")
    save_hf(plain, model.config, random_params(model), tokenizer_from=str(home / "tokenizer"))

    @functools.cache
    def make(how):
        folder = tmp_path_factory.mktemp("packed") / "base"
        shutil.copytree(plain, folder)
        settings = transformers.BitsAndBytesConfig(**PACKINGS[how])
        model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("where", ["unquantized", pytest.param("quantized", marks=pytest.mark.slow)])
def test_what_a_run_over_four_bits_gives_away(home, packed_base, train, script, monkeypatch, tmp_path, capsys, where):
    """Catches: adapters merged into a base that nobody published; a card that is silent on four bits; a run that says
    of its base what it did not do; a second start that is refused."""
    base = home / "base" if where == "unquantized" else packed_base("nf4")
    wanted = "nf4" if where == "unquantized" else "none"
    config = longlora(home, init_from=str(base), base_quantization=wanted, steps=1, eval=EvalConfig())
    attention = dataclasses.replace(config.attention, full_last=0.0)
    config = dataclasses.replace(config, attention=attention, mesh=MeshConfig(fsdp=1))  # one step to compile
    work = tmp_path / "work"
    train(config, work)
    assert json.loads((work / "config.json").read_text())["base_quantization"] == "nf4"
    assert "matrices of the blocks in nf4" in capsys.readouterr().out
    monkeypatch.setattr(script, "compile_train_step", FakeStep().compile)
    train(config, work)  # there is nothing left to do, and nothing is in its way

    convert_weights.main(["to-hf", str(work), str(tmp_path / "hf")])
    said = capsys.readouterr().out
    assert ("in its own dtype" if where == "unquantized" else "dequantized, as it is quantized (nf4)") in said
    run, trained = load.open_adapters(str(work))
    assert not {"codes", "kernel"} & {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    shape, exported = open_hf(str(tmp_path / "hf"))
    _, published = open_hf(str(base))
    adapters = adapters_of(shape, trained, run.lora.scale)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        expected = published[name].read().astype(np.float32)
        if name in adapters:
            expected = expected + run.lora.scale * adapters[name].b @ adapters[name].a
        np.testing.assert_allclose(exported[name].read(), expected, atol=1e-6)

    convert_weights.main(["to-peft", str(work), str(tmp_path / "peft")])
    card = (tmp_path / "peft" / "README.md").read_text()
    assert ('load_in_4bit=True, bnb_4bit_quant_type="nf4"' in card) == (where == "unquantized")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("how", ["nf4", *(pytest.param(x, marks=pytest.mark.slow) for x in PACKINGS if x != "nf4")])
def test_the_card_of_a_quantized_base_loads_it(home, packed_base, train, script, monkeypatch, tmp_path, how):
    """Catches: codes of the base taken for weights, or a crash over them, where config.json of the adapter takes the
    place of the one that says how they are quantized; a card that would quantize the base a second time."""
    pytest.importorskip("peft")
    torch, modules = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.nn.modules")
    # On CPUs that multiply in bfloat16 it would do so.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)
    monkeypatch.setattr(script, "compile_train_step", NoisyStep().compile)
    config = longlora(home, init_from=str(packed_base(how)), steps=1, eval=EvalConfig(), mesh=MeshConfig(fsdp=1))
    train(config, tmp_path / "work")
    convert_weights.main(["to-hf", str(tmp_path / "work"), str(tmp_path / "hf"), "--dtype", "float32"])
    convert_weights.main(["to-peft", str(tmp_path / "work"), str(tmp_path / "peft")])

    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "peft" / "README.md").read_text(), re.S)
    assert len(blocks) == 1  # one way to load it, as it is
    monkeypatch.chdir(tmp_path / "peft")
    names = {}
    exec(blocks[0], names)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 257, (1, 32)))
    with torch.no_grad():
        found, expected = (model(tokens).logits.float().numpy() for model in (names["model"].eval(), merged))
    # LLM.int8 rounds the activations as well; codes taken for weights give an error of 1 and more.
    error = np.std(found - expected) / np.std(expected)
    assert error < (1e-4 if how.startswith("nf4") else 0.1)


@pytest.mark.slow
def test_perplexity_in_four_bits(home, tmp_path):
    """Catches: --quantize that changes nothing, or everything; a folder in four bits that another path reads."""
    found = {}
    for how in ("none", "nf4", "int8"):
        flags = [
            "--model",
            str(home / "base"),
            "--data",
            str(home / "text.txt"),
            "--seq_len",
            "16",
            "--max_windows",
            "4",
        ]
        flags += ["--json", str(tmp_path / f"{how}.json"), *(["--quantize", how] if how != "none" else [])]
        perplexity.main(flags)
        found[how] = json.loads((tmp_path / f"{how}.json").read_text())["results"][0]["nll"]
    assert found["nf4"] != found["none"] != found["int8"]
    np.testing.assert_allclose(found["int8"], found["none"], rtol=0.01)
    np.testing.assert_allclose(found["nf4"], found["none"], rtol=0.2)
