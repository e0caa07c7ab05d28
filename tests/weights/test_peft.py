"""Adapters in and out; real PEFT is the oracle, on random models small enough to be exact about."""

import dataclasses
import json
import logging
import os
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from peft_models import (
    CLOSE,
    LORA_PLUS,
    V,
    adapt,
    edit_settings,
    load_base,
    merged_logits,
    our_logits,
    randomize,
    their_logits,
)
from tiny import random_params

from longlora_jax.attention.rope import RopeScaling
from longlora_jax.config import ATTENTION_TARGETS, MLP_TARGETS, LoraConfig
from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama
from longlora_jax.model.trainable import partition, trainable_mask
from longlora_jax.weights.hf import load_hf, open_hf, write_hf
from longlora_jax.weights.peft import load_peft, open_peft
from longlora_jax.weights.peft_export import save_peft
from longlora_jax.weights.rules import adapters_of, merge_table, params_table

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")


# Out


EXTENDED = {
    "linear": RopeScaling(rope_type="linear", factor=4.0, original_max_position_embeddings=64),
    "yarn": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "ntk": RopeScaling(rope_type="ntk", factor=4.0, original_max_position_embeddings=64),
}
# base, mode, rope, LoraConfig
OUT = {
    "lora": ("untied", "lora", "yarn", LoraConfig(rank=3)),
    "longlora": ("untied", "longlora", "linear", LoraConfig(rank=3, alpha=7.5, dropout=0.05)),
    "lora_norm": ("untied", "lora_norm", "linear", LoraConfig(rank=2)),
    "tied": ("tied", "longlora", "linear", LoraConfig(rank=2)),
    "tied, lora_embedding": ("tied", "lora_embedding", "linear", LoraConfig(rank=2)),
    "tied, lora alone": ("tied", "lora", "ntk", LoraConfig(rank=2)),
    "all targets": ("biases", "lora", "linear", LoraConfig(rank=5, targets=(*ATTENTION_TARGETS, *MLP_TARGETS))),
    "rslora": ("untied", "lora", "linear", LoraConfig(rank=4, rslora=True, targets=("v_proj", "down_proj"))),
}


def trained_model(base, mode, rope, lora):
    """(config, what a run would have trained, all params) of an extended base."""
    config, params = load_hf(base)
    config = dataclasses.replace(config, rope_scaling=EXTENDED[rope], max_position_embeddings=256)
    random = random_params(Llama(config, lora=lora), seed=2)
    trained, _ = partition(random, trainable_mask(random, mode))
    return config, trained, overlay(params, trained)


def overlay(tree, other):
    """A tree with the leaves of another one in their places, or added."""
    out = dict(tree)
    for name, child in other.items():
        out[name] = overlay(out.get(name, {}), child) if isinstance(child, dict) else child
    return out


def run_readme(folder, monkeypatch):
    """Runs the lines of the README in the folder and returns their model."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return names["model"].eval()


def assert_equal_trees(one, other):
    assert one.keys() == other.keys()
    for key, child in one.items():
        if isinstance(child, dict):
            assert_equal_trees(child, other[key])
        else:
            np.testing.assert_array_equal(child, np.asarray(other[key]), key)


SLOW = ("longlora", "lora_norm", "tied, lora_embedding", "tied, lora alone", "all targets")


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in OUT])
def test_peft_loads_what_we_write(name, bases, tmp_path, monkeypatch):
    """Catches: a transposition, a scale, a rope that is lost on the way, a tied head that stays the base's, names other
    than PEFT's own, a config.json that leads transformers astray; and a reader of ours that agrees with none of it."""
    kind, mode, rope, lora = OUT[name]
    config, trained, params = trained_model(bases[kind], mode, rope, lora)
    folder, again = tmp_path / "adapter", tmp_path / "again"
    save_peft(str(folder), config, lora, trained, base=bases[kind])
    model = run_readme(folder, monkeypatch)
    expected = our_logits(config, params, lora)
    np.testing.assert_allclose(their_logits(model), expected, **CLOSE)
    assert np.abs(their_logits(load_base(bases[kind])) - expected).max() > 0.1

    model.save_pretrained(again)
    one, other = (safetensors.load_file(path / "adapter_model.safetensors") for path in (folder, again))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, other[key]), key

    np.testing.assert_allclose(their_logits(model.merge_and_unload()), expected, **CLOSE)
    np.testing.assert_allclose(merged_logits(folder), expected, **CLOSE)
    shutil.copy(folder / "config.json", again)
    for source in (folder, again):
        ours, found, tree = load_peft(str(source))
        assert (ours, found) == (config, lora)
        assert_equal_trees(tree, params)
    trained, _ = partition(tree, trainable_mask(tree, mode))
    save_peft(str(tmp_path / "third"), ours, found, trained, base=bases[kind])
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "third" / file.name).read_bytes()


def test_what_an_adapter_says_of_itself(bases, tmp_path):
    """Catches: keys that old PEFT fails over, a base that only the writer's working directory finds, modules_to_save
    that PEFT has no weights for, a config.json that makes transformers load a bfloat16 base as float32."""
    config, trained, _ = trained_model(bases["tied"], "longlora", "linear", OUT["tied"][3])
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    base = os.path.relpath(bases["tied"])
    save_peft(str(tmp_path / "a"), config, OUT["tied"][3], trained, base=base, tokenizer_from=str(tmp_path))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(base),
        "revision": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "modules_to_save": [*LORA_PLUS, "lm_head"],
    }
    assert {"tokenizer.json", "generation_config.json"} < set(os.listdir(tmp_path / "a"))
    load_base(bases["tied"]).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    own = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert (own.max_position_embeddings, own.rope_parameters["factor"]) == (256, 4.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", config=own)
    assert model.dtype == torch.bfloat16

    save_peft(str(tmp_path / "b"), config, LoraConfig(rank=2, rslora=True), trained, base="org/name@main")
    settings = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert settings["use_rslora"] is True
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", "main")
    assert "from_pretrained('org/name', revision='main', config=config)" in (tmp_path / "b" / "README.md").read_text()


def test_saving_refuses_what_is_no_adapter(bases, tmp_path):
    """Catches: a whole tree of which the kernels would be dropped in silence, matrices that a target lacks."""
    lora = LoraConfig(rank=3)
    config, trained, params = trained_model(bases["untied"], "longlora", "linear", lora)
    cases = [
        (params, lora, "unexpected layers/self_attn/q_proj/kernel, give what was trained alone"),
        (trained, LoraConfig(rank=3, targets=("q_proj", "up_proj")), "missing layers/mlp/up_proj/lora_a"),
        (trained, LoraConfig(rank=4), "q_proj/lora_b has shape [2, 3, 4, 8], not [2, 4, 4, 8]"),
        (trained | {"norm": {}}, lora, "missing norm/scale"),
        (trained | {"norm": {"scale": np.ones(24)}}, lora, "norm/scale is float64"),
        (partition(params, trainable_mask(params, "lora"))[1], lora, "missing layers/self_attn/q_proj/lora_a"),
    ]
    for tree, lora, message in cases:
        with pytest.raises(UserError) as caught:
            save_peft(str(tmp_path / "a"), config, lora, tree, base=bases["untied"])
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        save_peft(str(tmp_path), config, OUT["lora"][3], trained, base=bases["untied"])


# In


# base, settings of PEFT, whether load_peft can keep the adapter apart
IN = {
    "plain": ("untied", {}, True),
    "as trained by the original": ("untied", {"modules_to_save": LORA_PLUS}, True),
    "rslora": ("linear", {"use_rslora": True, "target_modules": ["q_proj", "gate_proj"]}, True),
    "every linear": ("biases", {"target_modules": "all-linear"}, True),
    "one layer": ("untied", {"layers_to_transform": [1], "modules_to_save": ["input_layernorm"]}, True),
    "whole matrices": ("biases", {"target_modules": ["q_proj"], "modules_to_save": ["o_proj", "lm_head"]}, True),
    "patterns": (
        "untied",
        {
            "rank_pattern": {"k_proj": 2, "model.layers.1.self_attn.v_proj": 4},
            # In the order of a sorted file, which is how PEFT writes it; the last one fits no whole name.
            "alpha_pattern": {"(v|o)_proj": 2.5, r"^model\.layers\.0\..*": 5, "model.layers.1.self_attn": 9},
        },
        False,
    ),
    "alpha of all": ("untied", {"alpha_pattern": {"[qkvo]_proj": 5}, "rank_pattern": {".*": 2}}, True),
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"]}, False),
    "tied": ("tied", {"modules_to_save": LORA_PLUS, "ensure_weight_tying": True}, True),
    "tied, PEFT before 0.18": ("tied", {"modules_to_save": LORA_PLUS}, True),
    "tied, both trained": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "tied, head trained": ("tied", {"modules_to_save": ["lm_head"]}, True),
    "tied, head adapted": ("tied", {"target_modules": ["q_proj", "lm_head"]}, False),
    "more rows": ("untied", {"resize": 3}, True),
    "more rows, tied": ("tied", {"resize": 1}, True),
    "more rows, trained": ("untied", {"resize": 2, "modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "more rows, tied, trained": ("tied", {"resize": 2, "modules_to_save": ["embed_tokens"]}, True),
}


@pytest.mark.parametrize("name", IN)
def test_we_read_what_peft_writes(name, bases, tmp_path):
    """Catches: a scale by the wrong rank, a pattern that fits too much, a module that is forgotten, a tied model whose
    two uses of the embedding went different ways, rows that were added."""
    kind, settings, apart = IN[name]
    model = adapt(bases[kind], tmp_path / "adapter", **settings)
    expected = their_logits(model)
    assert np.abs(their_logits(load_base(bases[kind])) - expected[..., :V]).max() > 0.1
    config, table, tokenizer_dir = open_peft(str(tmp_path / "adapter"))
    assert tokenizer_dir == bases[kind]
    ties = load_base(bases[kind]).config.tie_word_embeddings
    splits = ties and name not in ("tied", "more rows, tied")
    assert config.tie_word_embeddings == (ties and not splits)

    write_hf(str(tmp_path / "merged"), config, table)
    np.testing.assert_allclose(their_logits(load_base(tmp_path / "merged")), expected, **CLOSE)
    if not (ties and "lm_head" in settings.get("target_modules", ())):  # PEFT merges that into the embedding as well
        names = dict(model.merge_and_unload().named_parameters())
        for key, tensor in table.items():
            # One f32 sum of products of at most 5 and a factor, in another order; weights are about 1.
            np.testing.assert_allclose(tensor.read(), names[key].detach(), rtol=0, atol=2e-6, err_msg=key)

    if apart:
        config, lora, params = load_peft(str(tmp_path / "adapter"))
        assert lora.dropout == 0.1
        merged = merge_table(params_table(config, params), adapters_of(config, params, lora.scale))
        for key, tensor in table.items():
            np.testing.assert_array_equal(tensor.read(), merged[key].read(), key)
    else:
        with pytest.raises(UserError, match="merge it with convert_weights.py from-peft"):
            load_peft(str(tmp_path / "adapter"))


@pytest.mark.parametrize("form", ["safe_serialization=False", "state_dict()"])
def test_other_forms_of_the_same_adapter(form, bases, tmp_path):
    """Catches: .bin files, and the names that modules have in memory, left out."""
    model = adapt(bases["untied"], tmp_path / "a", modules_to_save=LORA_PLUS)
    if form == "state_dict()":
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b" / "adapter_model.safetensors").unlink()
        state = {k: v for k, v in model.state_dict().items() if "lora_" in k or "modules_to_save" in k}
        assert any(".lora_A.default." in k for k in state) and any("modules_to_save.default." in k for k in state)
        torch.save(state, tmp_path / "b" / "adapter_model.bin")
    else:
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    one, other = (open_peft(str(tmp_path / name))[1] for name in "ab")
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        np.testing.assert_array_equal(tensor.read(), other[key].read(), key)


# The original project's artefacts


def train_as_the_original(base, folder, *, dtype, save):
    """Its model after fine-tune.py, and what get_trainable_weights.py ("split") or its callback keeps of it."""
    config = transformers.AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}  # 256 tokens
    model = transformers.LlamaForCausalLM.from_pretrained(base, config=config, dtype=dtype).eval()
    model.resize_token_embeddings(V + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[-1:] = layer.weight[:-1].mean(dim=0, keepdim=True)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(ATTENTION_TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).eval()
    randomize((p for n, p in model.named_parameters() if any(k in n for k in ("embed", "norm", "lora"))), seed=1)
    model.save_pretrained(folder, safe_serialization=False)
    state = model.state_dict()
    kept = {k: v for k, v in state.items() if "lora" not in k and ("embed" in k or "norm" in k)}
    assert len(kept) == 1 + 2 * 2 + 1
    if save == "split":
        torch.save(
            {k.replace("default.", ""): v for k, v in state.items() if "lora" in k}, folder / "adapter_model.bin"
        )
        kept = {k.removeprefix("base_model.model."): v for k, v in kept.items()}
        kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)
    torch.save(kept, folder / "trainable_params.bin")
    return model


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("save", ["split", "callback"])
def test_the_original_artefacts(save, kind, bases, tmp_path):
    """Catches: embedding and norms left behind, the row of [PAD] that makes a model of another size, a tied head that
    does not move, a rope that the original's own merge forgets."""
    model = train_as_the_original(bases[kind], tmp_path / "old", dtype=torch.float32, save=save)
    expected = their_logits(model)
    config, table, tokenizer_dir = open_peft(str(tmp_path / "old"), base=bases[kind], window=256)
    assert (config.vocab_size, config.tie_word_embeddings) == (V + 1, kind == "tied")
    assert config.max_position_embeddings == 256 and tokenizer_dir == bases[kind]
    assert config.rope_scaling == EXTENDED["linear"]
    write_hf(str(tmp_path / "merged"), config, table)
    np.testing.assert_allclose(their_logits(load_base(tmp_path / "merged")), expected, **CLOSE)
    _, lora, params = load_peft(str(tmp_path / "old"), base=bases[kind], window=256)
    assert lora == LoraConfig() and params["embed_tokens"]["embedding"].shape == (V + 1, 24)
    if kind == "untied":
        head = table["lm_head.weight"].read()
        np.testing.assert_allclose(head[V], head[:V].mean(axis=0), rtol=0, atol=1e-6)
        assert (expected[..., V] < expected.max(axis=-1)).all()


def test_bfloat16_is_rounded_once(bases, tmp_path):
    """Catches: an update that is rounded before it is added, a result in another dtype than the base's."""
    load_base(bases["untied"]).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = train_as_the_original(str(tmp_path / "base"), tmp_path / "old", dtype=torch.bfloat16, save="split")
    _, table, _ = open_peft(str(tmp_path / "old"), base=str(tmp_path / "base"), window=256)
    state = {k.removeprefix("base_model.model."): v.double().numpy() for k, v in model.state_dict().items()}
    for name, tensor in table.items():
        module = name.removesuffix(".weight")
        exact = state.get(name, state.get(f"{module}.base_layer.weight"))
        if name.endswith(tuple(f"{target}.weight" for target in ATTENTION_TARGETS)):
            exact = exact + 2 * state[f"{module}.lora_B.default.weight"] @ state[f"{module}.lora_A.default.weight"]
        array = tensor.read()
        assert array.dtype == ml_dtypes.bfloat16
        # Half a step between numbers of 8 bits, and what f32 loses in a sum of weights about 1.
        half = 2.0**-8 * np.exp2(np.floor(np.log2(np.abs(exact))))
        assert (np.abs(array.astype(np.float64) - exact) <= half + 1e-6).all(), name


# Windows and places


def test_where_the_window_comes_from(bases, tmp_path, caplog):
    """Catches: the base's window in silence, a second extension that multiplies the first, a window of the adapter's
    own config.json that is passed over."""
    adapt(bases["untied"], tmp_path / "theirs")
    with caplog.at_level(logging.WARNING):
        config = open_peft(str(tmp_path / "theirs"))[0]
    assert config == open_hf(bases["untied"])[0]
    assert "keeps the 64 tokens of its base, give --window" in caplog.text

    caplog.clear()
    longer = open_peft(str(tmp_path / "theirs"), window=250, rope_type="yarn")[0]
    assert (longer.rope_scaling, longer.max_position_embeddings) == (EXTENDED["yarn"], 250)
    model, trained, _ = trained_model(bases["untied"], "lora", "ntk", LoraConfig())
    save_peft(str(tmp_path / "ours"), model, LoraConfig(), trained, base=bases["untied"])
    assert open_peft(str(tmp_path / "ours"))[0] == model
    again = open_peft(str(tmp_path / "ours"), window=512, rope_type="linear")[0]
    assert again.rope_scaling == RopeScaling(rope_type="linear", factor=8.0, original_max_position_embeddings=64)
    assert "the model's ntk x4 becomes linear x8" in caplog.text
    with pytest.raises(UserError, match="rope_type='rope' is not known"):
        open_peft(str(tmp_path / "theirs"), window=512, rope_type="rope")


def test_which_base_and_which_tokenizer(bases, tmp_path):
    """Catches: a base that moved and cannot be named, the tokenizer of the base over that of the adapter."""
    adapt(bases["untied"], tmp_path / "a")
    edit_settings(tmp_path / "a", base_model_name_or_path="/gone/away")
    with pytest.raises(UserError, match=r"its base model: /gone/away is not a folder: give with --base the folder"):
        open_peft(str(tmp_path / "a"))
    edit_settings(tmp_path / "a", base_model_name_or_path=None)
    with pytest.raises(UserError, match="adapter_config.json does not name it, so give it with --base"):
        open_peft(str(tmp_path / "a"))
    assert open_peft(str(tmp_path / "a"), base=bases["untied"])[2] == bases["untied"]
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert open_peft(str(tmp_path / "a"), base=bases["untied"])[2] == str(tmp_path / "a")
    with pytest.raises(UserError, match="nothing is not a folder: give the folder of a PEFT adapter"):
        open_peft(str(tmp_path / "nothing"))
