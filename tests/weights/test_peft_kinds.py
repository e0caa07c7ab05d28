"""Adapters of every kind that PEFT merges, merged as PEFT merges them; PEFT is the oracle."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft_models import CLOSE, V, adapt, edit_settings, edit_tensors, load_base, their_logits
from tiny import random_params

from longlora_jax.config import ATTENTION_TARGETS, LoraConfig
from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama
from longlora_jax.model.trainable import partition, trainable_mask
from longlora_jax.weights.hf import open_hf, write_hf
from longlora_jax.weights.peft import load_peft, open_peft
from longlora_jax.weights.peft_export import save_peft
from longlora_jax.weights.tensors import open_safetensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

BOTH = ["q_proj", "embed_tokens", "lm_head"]
# base, settings of PEFT, whether the merged model stays tied
KINDS = {
    "dora": ("untied", {"use_dora": True}),
    "dora, rslora, patterns": (
        "untied",
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 5}, "target_modules": "all-linear"},
    ),
    "dora with biases": ("biases", {"use_dora": True, "bias": "all"}),
    "dora of embedding and head": ("untied", {"use_dora": True, "target_modules": BOTH}),
    "all biases": ("biases", {"bias": "all"}),
    "biases of the targets": ("biases", {"bias": "lora_only"}),
    "biases that are none": ("untied", {"bias": "all"}),
    "biases of B": ("biases", {"lora_bias": True}),
    "embedding": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding and head": ("untied", {"target_modules": BOTH, "alpha_pattern": {"lm_head": 3}}),
    "more rows": ("untied", {"resize": 4, "target_modules": BOTH}),
    "rows": ("untied", {"trainable_token_indices": [2, 60, 5]}),
    "rows of both": ("untied", {"trainable_token_indices": {"embed_tokens": [2, 5], "lm_head": [1, 5, 7]}}),
    "rows, tied": ("tied", {"trainable_token_indices": [2, 5]}),
    "rows, more of them, tied": ("tied", {"trainable_token_indices": [2, V + 1], "resize": 2}),
    "embedding, tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head, tied": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "both, tied": ("tied", {"target_modules": BOTH}),
    "rows of both, tied": ("tied", {"trainable_token_indices": {"embed_tokens": [2, 5], "lm_head": [1, 5]}}),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of tied models
@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_merged_as_peft_merges(name, bases, tmp_path):
    """Catches: a magnitude along the wrong axis, a bias or a row left behind, an embedding the wrong way round."""
    kind, settings = KINDS[name]
    model = adapt(bases[kind], tmp_path / "adapter", **settings)
    if settings.get("bias") == "lora_only":  # which PEFT 0.19 does not save
        model = peft.PeftModel.from_pretrained(load_base(bases[kind]), tmp_path / "adapter").eval()
    expected = their_logits(model)
    config, table, _ = open_peft(str(tmp_path / "adapter"))
    write_hf(str(tmp_path / "merged"), config, table)
    np.testing.assert_allclose(their_logits(load_base(tmp_path / "merged")), expected, **CLOSE)
    # Where the two uses of a tied matrix went apart, PEFT trained them so, but merges both into the one.
    apart = kind == "tied" and name not in ("rows, tied", "rows, more of them, tied")
    assert config.tie_word_embeddings == (kind == "tied" and not apart)
    if not apart:
        merged = dict(model.merge_and_unload().named_parameters())
        assert merged.keys() == table.keys()
        for key, tensor in table.items():
            np.testing.assert_allclose(tensor.read(), merged[key].detach(), rtol=0, atol=4e-6, err_msg=key)


def test_defaults_of_peft(bases, tmp_path):
    """Catches: an adapter refused since it leaves out r or lora_alpha, which are 8 then."""
    adapt(bases["untied"], tmp_path / "a", r=8, lora_alpha=8)
    before = open_peft(str(tmp_path / "a"))[1]
    path = tmp_path / "a" / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content if key not in ("r", "lora_alpha")}))
    after = open_peft(str(tmp_path / "a"))[1]
    assert all(np.array_equal(after[name].read(), before[name].read()) for name in before)
    assert load_peft(str(tmp_path / "a"))[1].rank == 8


def test_what_cannot_be_kept_apart_is_said(bases, tmp_path):
    """Catches: DoRA's magnitudes dropped where the matrices are read beside their kernels."""
    adapt(bases["untied"], tmp_path / "a", use_dora=True)
    with pytest.raises(UserError, match="DoRA's magnitudes.*merge it with convert_weights.py from-peft"):
        load_peft(str(tmp_path / "a"))


FAULTS = {
    "no indices": ({"trainable_token_indices": None}, {}, r"rows \[2, 24\], trainable_token_indices names 0"),
    "fewer indices": ({"trainable_token_indices": [1]}, {}, r"rows \[2, 24\], trainable_token_indices names 1"),
    "words": ({"trainable_token_indices": ["a", "b"]}, {}, "trainable_token_indices names 0"),
    "beyond": ({"trainable_token_indices": [1, 999]}, {}, r"rows \[2, 24\] up to number 999, it is \[61, 24\]"),
    "wide": (
        {},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 23)},
        r"trained rows \[2, 23\] up to number 5, it is \[61, 24\]",
    ),
    "rows of a projection": (
        {"trainable_token_indices": {"q_proj": [0], "embed_tokens": [2, 5]}},
        {"model.layers.0.self_attn.q_proj.token_adapter.trainable_tokens_delta": torch.ones(1, 24)},
        "q_proj.weight has trained rows",
    ),
    "bias of a": ({}, {"model.layers.0.self_attn.q_proj.lora_A.bias": torch.ones(3)}, "is no weight of a LoRA adapter"),
    "bias without a base": (
        {},
        {"model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(32)},
        "q_proj.weight is adapted with a bias .lora_bias., but has none in the base",
    ),
    "long bias": ({}, {"model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(31)}, "has a magnitude or bias"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_these_kinds_are_named(name, bases, tmp_path):
    """Catches: a traceback, or rows written where they do not belong."""
    settings, tensors, message = FAULTS[name]
    adapt(bases["untied"], tmp_path / "a", trainable_token_indices=[2, 5])
    edit_settings(tmp_path / "a", **settings)
    edit_tensors(tmp_path / "a", **tensors)
    with pytest.raises(UserError, match=message) as caught:
        open_peft(str(tmp_path / "a"))
    assert "\n" not in str(caught.value)


def test_adapters_alone(bases, tmp_path, caplog):
    """Catches: an adapter that llama.cpp and vLLM refuse for its embedding, and a loss that nobody is told of."""
    config, lora = open_hf(bases["untied"])[0], LoraConfig(rank=3)
    model = Llama(config, lora=lora)
    params = random_params(model)
    trained, _ = partition(params, trainable_mask(params, "longlora"))
    with caplog.at_level(logging.WARNING):
        save_peft(str(tmp_path / "a"), config, lora, trained, base=bases["untied"], adapters_only=True)
    assert "left out of the adapter: embed_tokens, input_layernorm" in caplog.text
    names = open_safetensors(str(tmp_path / "a" / "adapter_model.safetensors"))
    assert len(names) == 2 * 2 * len(ATTENTION_TARGETS) and all(".lora_" in name for name in names)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None
    loaded = peft.PeftModel.from_pretrained(load_base(bases["untied"]), tmp_path / "a")
    _, table, _ = open_peft(str(tmp_path / "a"))
    merged = dict(loaded.merge_and_unload().named_parameters())
    for key, tensor in table.items():
        np.testing.assert_allclose(tensor.read(), merged[key].detach(), rtol=0, atol=2e-6, err_msg=key)


def test_the_command_knows_the_switch():
    """Catches: a switch that the library has and the command does not."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "convert_weights.py", "to-peft", "--help"],
        cwd=root,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert "--adapters_only" in done.stdout and "says what is lost" in done.stdout
