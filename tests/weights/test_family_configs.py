"""What config.json of a family may say in more than one way, and what we write there: transformers makes the same."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import MODELS, config_json, make_folder
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_jax.attention.rope import extend_rope
from longlora_jax.config import Config, RopeConfig
from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama
from longlora_jax.training.resolve import extend_model
from longlora_jax.weights.hf import load_hf, save_hf
from longlora_jax.weights.hf_config import load_config

TOKENS = np.random.default_rng(0).integers(3, 61, (1, 120))  # beyond the window of the tiny models, 64


def their_logits(folder, **options) -> np.ndarray:
    options = {"attn_implementation": "eager", "dtype": torch.float32, **options}
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options)(torch.tensor(TOKENS)).logits.numpy()


def our_logits(config, params) -> np.ndarray:
    return np.asarray(jax.jit(Llama(config).apply)({"params": params}, jnp.asarray(TOKENS, jnp.int32)))


def extended(config, kind):
    """The model made fit for twice its window, as a run extends it."""
    scaling = extend_rope(scaling=None, max_position_embeddings=64, seq_len=128, rope_type=kind)
    return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=128)


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    """A tiny Phi-4-mini, whose heads are rotated in part, and a Phi-3: {name: folder}."""
    home = tmp_path_factory.mktemp("phi")
    return {name: make_folder(home / name, name, initializer_range=0.2) for name in ("phi4-mini", "phi3")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("phi4-mini", "yarn"), ("phi4-mini", "linear"), ("phi3", "llama3"), ("phi3", "yarn"), ("phi3", "ntk")],
)
def test_an_extended_phi_is_exported_as_transformers_computes_it(name, kind, phi, tmp_path):
    """Catches: a scaling that Phi3Config does not know (it knows longrope alone), a factor on cos and sin that it
    makes of the windows by itself, a kind that our own reader does not find again."""
    config, params = load_hf(str(phi[name]))
    config = extended(config, kind)
    save_hf(str(tmp_path / "out"), config, params)
    assert load_config(str(tmp_path / "out")) == config
    ours = our_logits(config, params)
    np.testing.assert_allclose(their_logits(tmp_path / "out"), ours, rtol=0, atol=1e-4)
    assert np.abs(their_logits(phi[name]) - ours).max() > 0.1  # the scaling changes what it computes
    # As the card of an adapter loads it; and as transformers writes it again.
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(their_logits(phi[name], config=theirs), ours, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    assert load_config(str(tmp_path / "again")) == config


@pytest.mark.parametrize("kind", ["linear", "llama3", "longrope"])
def test_a_phi_has_the_three_keys_that_transformers_4_wants(kind, phi, tmp_path):
    """Catches: a rope_scaling of more keys, which every Phi3Config of transformers 4 refuses."""
    if kind == "longrope":
        folder = make_folder(tmp_path / "long", "phi3 128k")
        config, params = load_hf(str(folder))
    else:
        config, params = load_hf(str(phi["phi3"]))
        config = extended(config, kind)
    save_hf(str(tmp_path / "out"), config, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert set(written) == {"type", "short_factor", "long_factor"} and written["type"] == "longrope"
    assert load_config(str(tmp_path / "out")) == config


def test_an_older_name_of_longrope_is_longrope(tmp_path):
    """Catches: the first Phi-3's files, which call their longrope su or yarn, computed as a plain yarn."""
    scaling = {"type": "yarn", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
    folder = make_folder(tmp_path / "m", "phi3 128k", rope_scaling=scaling, initializer_range=0.2)
    config, params = load_hf(str(folder))
    assert config.rope_scaling is not None and config.rope_scaling.rope_type == "longrope"
    np.testing.assert_allclose(our_logits(config, params), their_logits(folder), rtol=0, atol=1e-4)
    # transformers 4 reads su so, 5 no longer.
    content = config_json("phi3 128k", rope_scaling=scaling | {"type": "su"}, initializer_range=0.2)
    (folder / "config.json").write_text(json.dumps(content))
    assert load_config(str(folder)) == config


def test_a_kept_kind_that_does_not_fit_its_longrope_is_refused(phi, tmp_path):
    """Catches: a config.json whose longrope was edited by hand, read as the kind that it was made of."""
    config, params = load_hf(str(phi["phi3"]))
    save_hf(str(tmp_path / "out"), extended(config, "linear"), params)
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    content["rope_scaling"]["long_factor"] = [3.0] * 4
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="longlora_rope=.* delete it"):
        load_config(str(path.parent))


def test_a_phi_cannot_be_trained_with_dynamic(phi, tmp_path):
    """Catches: a run of days whose export no program can load."""
    model, params = load_hf(str(phi["phi3"]))
    config = Config(seq_len=128, steps=1, rope=RopeConfig(type="dynamic"))
    with pytest.raises(UserError, match="set rope.type .* to linear, yarn, llama3 or ntk"):
        extend_model(model, config)
    with pytest.raises(UserError, match="dynamic"):
        save_hf(str(tmp_path / "out"), extended(model, "dynamic"), params)
    assert extend_model(model, dataclasses.replace(config, rope=RopeConfig(type="auto"))).rope_scaling.factor == 2


# What may stand in a config.json beside or instead of what a family's own files have, and the model that it is of.
SAID = {
    "gemma: gelu": ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    "gemma: its activation's other name": ("gemma", {"hidden_activation": "silu"}),
    "gemma2: an activation's other name": ("gemma2", {"hidden_act": "silu"}),
    "gemma2: gelu is exact": ("gemma2", {"hidden_activation": "gelu"}),
    "gemma3: gelu is exact": ("gemma3", {"hidden_activation": "gelu", "hidden_act": "silu"}),
    "llama: keys of other families": ("llama", {"layer_norm_eps": 0.5, "rotary_emb_base": 100.0, "rotary_pct": 0.5}),
    "stablelm: keys of other families": ("stablelm", {"rms_norm_eps": 0.5, "rotary_pct": 1.0}),
    "gpt_neox: keys of other families": (
        "gpt_neox",
        {"rms_norm_eps": 0.5, "rope_theta": 100.0, "partial_rotary_factor": 1.0},
    ),
    "gemma3: both forms of a rope": (
        "gemma3",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            },
        },
    ),
    "gemma3: a rope of one kind of layer": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": None}},
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_every_key_counts_as_in_transformers(name, tmp_path, monkeypatch):
    """Catches: a key that is left over from another family in place of the family's own, the first Gemma's gelu
    computed as it is called, one of two forms of a rope read alone."""
    kind, changes = SAID[name]
    monkeypatch.setitem(MODELS, "llama", {"model_type": "llama"})
    monkeypatch.setitem(MODELS, "gemma2", {"model_type": "gemma2", "sliding_window": 9})
    folder = make_folder(tmp_path / "m", kind, initializer_range=0.2, **changes)
    config, params = load_hf(str(folder))
    np.testing.assert_allclose(our_logits(config, params), their_logits(folder), rtol=0, atol=1e-4)


REFUSED = {
    "a window's layers scaled": (
        {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
        "sliding_attention has rope_type 'linear'.*default is needed",
    ),
    "one rope for all": ({"rope_type": "default", "rope_theta": 1e6}, "an object each for full_attention and sliding"),
    "no object": ({"full_attention": 5}, "an object each for full_attention and sliding_attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rope_of_gemma3_that_is_not_read_is_refused(name, tmp_path):
    """Catches: a scaling of the layers with a window that is dropped in silence."""
    rope, said = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config_json("gemma3", rope_parameters=rope)))
    with pytest.raises(UserError, match=said):
        load_config(str(tmp_path))


@pytest.mark.parametrize("key", ["query_pre_attn_scalar", "sliding_window", "rope_local_base_freq"])
def test_a_key_of_gemma3_without_a_value(key, tmp_path):
    """Catches: a null that ends in an error of Python's."""
    (tmp_path / "config.json").write_text(json.dumps(config_json("gemma3", **{key: None})))
    if key == "rope_local_base_freq":
        assert load_config(str(tmp_path)).rope_local_base_freq == 10_000.0
        return
    with pytest.raises(UserError, match=f"{key} is None, it must be"):
        load_config(str(tmp_path))


def test_a_window_that_cuts_nothing_off_is_full_attention_and_said(caplog, tmp_path):
    """Catches: a Phi-3 128k to whose layers no groups apply, and a window that is left out in silence."""
    (tmp_path / "config.json").write_text(json.dumps(config_json("mistral window", sliding_window=64)))
    with caplog.at_level(logging.INFO):
        config = load_config(str(tmp_path))
    assert config.sliding_window is None and not any(config.windows)
    assert "sliding_window=64 cuts nothing off in 64 tokens" in caplog.text
    (tmp_path / "config.json").write_text(json.dumps(config_json("mistral window", sliding_window=63)))
    assert load_config(str(tmp_path)).sliding_window == 63
