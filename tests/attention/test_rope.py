"""rope.py against transformers: frequencies, rotation, config forms, re-extension, bad input."""

import dataclasses
import itertools
import json
import logging
import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from longlora_jax.attention.rope import (
    ROPE_TYPES,
    RopeScaling,
    apply_rope,
    extend_rope,
    rope_frequencies,
    rope_tables,
)
from longlora_jax.config import Config, RopeConfig
from longlora_jax.errors import UserError
from longlora_jax.training.resolve import extend_model
from longlora_jax.weights.hf_rope import rope_from_hf, rope_to_hf, window_from_hf

# Both sides round a handful of f32 operations (6e-8 each) in their own order.
RTOL = 1e-6
SHAPE = {"num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8}


def llama_config(head_dim, **keys):
    return LlamaConfig(hidden_size=2 * head_dim, head_dim=head_dim, **SHAPE, **keys)


def hf_frequencies(keys, head_dim, seq_len):
    """What transformers rotates with in a forward pass of seq_len tokens; keys of config.json."""
    embedding = LlamaRotaryEmbedding(llama_config(head_dim, **json.loads(json.dumps(keys))))
    embedding(torch.zeros(1), torch.arange(seq_len)[None])
    return embedding.inv_freq.numpy(), embedding.attention_scaling


def assert_same_frequencies(ours, theirs, slack=0.0):
    """slack: an absolute tolerance for each frequency beside RTOL."""
    assert (np.abs(ours[0] - theirs[0]) <= RTOL * np.abs(theirs[0]) + slack).all(), (ours[0], theirs[0])
    assert ours[0].dtype == np.float32
    assert ours[1] == pytest.approx(theirs[1], rel=RTOL)


def extended(scaling, window, seq_len, rope_type="linear", **more):
    more |= {"scaling": scaling, "max_position_embeddings": window}
    return extend_rope(seq_len=seq_len, rope_type=rope_type, **more)


def maybe(strategy):
    return st.none() | strategy


@st.composite
def rope_settings(draw, kinds=("default", *ROPE_TYPES)):
    """head_dim, theta and a RopeScaling or None, with every optional field on and off."""
    head_dim = draw(st.sampled_from([4, 6, 16, 64, 80, 96, 128]))
    theta = draw(st.sampled_from([10_000.0, 100_000.0, 500_000.0]) | st.floats(500, 5e6))
    kind = draw(st.sampled_from(kinds))
    if kind == "default":
        return head_dim, theta, None
    factor = draw(st.sampled_from([1.0, 2.0, 8.0, 25.0]) | st.floats(1, 64))
    fields = {"original_max_position_embeddings": draw(st.sampled_from([64, 256, 4096, 8192]))}
    if kind == "llama3":
        low = draw(st.floats(0.5, 4))
        fields |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 8))}
    if kind == "longrope":
        factors = st.lists(st.floats(1, 60), min_size=head_dim // 2, max_size=head_dim // 2)
        fields |= {"short_factor": tuple(draw(factors)), "long_factor": tuple(draw(factors))}
    if kind in ("yarn", "longrope"):
        fields["attention_factor"] = draw(maybe(st.floats(0.5, 2)))
    if kind == "yarn":
        fields["beta_fast"] = draw(maybe(st.floats(16, 64)))
        fields["beta_slow"] = draw(maybe(st.floats(0.5, 8)))
        fields["mscale"] = draw(maybe(st.floats(0.2, 2)))
        fields["mscale_all_dim"] = draw(maybe(st.floats(0.2, 2)))
        fields["truncate"] = draw(maybe(st.booleans()))
    return head_dim, theta, RopeScaling(rope_type=kind, factor=factor, **fields)


def hf_parameters(theta, scaling):
    """rope_parameters of transformers 5 by hand: the oracle must not lean on rope_to_hf."""
    fields = {name: value for name, value in vars(scaling).items() if value is not None}
    fields = {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}
    if scaling.rope_type in ("linear", "dynamic"):
        del fields["original_max_position_embeddings"]
    return fields | {"rope_theta": theta}


@settings(max_examples=150, deadline=None)
@given(
    case=rope_settings(kinds=("linear", "dynamic", "yarn", "llama3", "longrope")),
    reach=st.sampled_from([0.1, 0.5, 1.0, 1.02, 1.5, 3.0, 25.0]),
)
def test_frequencies_equal_transformers_functions(case, reach):
    """A slip in any formula, default or switch (dynamic and longrope at their window's edge)."""
    head_dim, theta, scaling = case
    original = scaling.original_max_position_embeddings
    seq_len = max(1, int(original * reach))
    parameters = hf_parameters(theta, scaling)
    config = llama_config(head_dim, max_position_embeddings=original, rope_parameters=parameters)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](config, seq_len=seq_len)
    ours = rope_frequencies(head_dim=head_dim, theta=theta, scaling=scaling, seq_len=seq_len)
    slack = 0.0
    if scaling.rope_type == "llama3":
        # llama3's ramp is a difference of two turns up to high_freq_factor, over high - low: what rounding leaves of
        # it, 6e-8 an operation, is a share of the unscaled frequency, which is up to `factor` times the result.
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        unscaled, _ = rope_frequencies(head_dim=head_dim, theta=theta, scaling=None, seq_len=seq_len)
        slack = 2.5e-7 * high / (high - low) * unscaled
    assert_same_frequencies(ours, (inv_freq.numpy(), attention_factor), slack)


def test_ntk_stretches_the_slowest_pair_alone():
    """The exponent H / (H - 2) lost: then the slowest pair misses the factor."""
    scaling = extended(None, 256, 2048, "ntk")
    for head_dim, theta in ((64, 10_000.0), (128, 500_000.0)):
        rope = {"head_dim": head_dim, "theta": theta, "seq_len": 9}
        base, _ = rope_frequencies(scaling=None, **rope)
        raised, factor = rope_frequencies(scaling=scaling, **rope)
        formula = (theta * 8 ** (head_dim / (head_dim - 2))) ** (-np.arange(0, 1, 2 / head_dim))
        # Here the oracle is f64: the f32 exponent costs up to log(theta) * 3e-8.
        np.testing.assert_allclose(raised, formula, rtol=2e-6)
        assert raised[0] == base[0] == factor == 1
        assert base[-1] / raised[-1] == pytest.approx(8, rel=2e-6)


@settings(max_examples=60, deadline=None)
@given(case=rope_settings(), reach=st.sampled_from([0.5, 1.0, 2.0]))
def test_exported_config_reloads_in_transformers_and_here(case, reach):
    """A merged model that lost its scaling or its theta: every kind, through config.json."""
    head_dim, theta, scaling = case
    original = scaling.original_max_position_embeddings if scaling else 64
    window = math.ceil(original * scaling.factor) if scaling else 64
    seq_len = int(original * reach)
    ours = rope_frequencies(head_dim=head_dim, theta=theta, scaling=scaling, seq_len=seq_len)
    exported = rope_to_hf(theta, scaling, head_dim, window)
    no_new_form = {name: v for name, v in exported.items() if name != "rope_parameters"}
    no_old_form = exported | {"rope_scaling": None}
    for keys in (exported, no_new_form, no_old_form):
        assert_same_frequencies(ours, hf_frequencies(keys, head_dim, seq_len))
        config_json = json.loads(llama_config(head_dim, **keys).to_json_string())
        for content in (json.loads(json.dumps(keys | sizes(head_dim))), config_json):
            assert rope_from_hf(content) == (theta, scaling)
            assert window_from_hf(content) == window


def sizes(head_dim):
    return {"hidden_size": 2 * head_dim, "num_attention_heads": 2}


def test_exported_folder_reloads_through_autoconfig(tmp_path, caplog, monkeypatch):
    """Keys that transformers warns of, or an ntk that it does not know, in a real folder."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    forms = ("rope_scaling", "rope_parameters")
    for kind, form in itertools.product(("linear", "dynamic", "ntk", "yarn", "llama3"), forms):
        scaling = extended(None, 4096, 32_768, kind)
        keys = rope_to_hf(10_000.0, scaling, 64, 32_768) | {form: None}
        content = {"model_type": "llama", "head_dim": 64} | sizes(64) | keys
        (tmp_path / "config.json").write_text(json.dumps(content))
        with caplog.at_level(logging.WARNING):
            config = AutoConfig.from_pretrained(tmp_path)
        assert not caplog.records, kind
        assert config.max_position_embeddings == (4096 if kind == "dynamic" else 32_768)
        ours = rope_frequencies(head_dim=64, theta=10_000.0, scaling=scaling, seq_len=16)
        theirs = LlamaRotaryEmbedding(config)
        assert_same_frequencies(ours, (theirs.inv_freq.numpy(), theirs.attention_scaling))


LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize(("kind", "fields"), [("linear", {"factor": 2.0}), ("llama3", LLAMA31)])
def test_old_and_new_config_forms_parse_the_same(kind, fields):
    """One of the three spellings of the same model read as default, or with theta 10,000."""
    window, theta = {"max_position_embeddings": 131_072}, {"rope_theta": 5e5}
    forms = [
        window | theta | {"rope_scaling": {"type": kind} | fields},
        window | theta | {"rope_scaling": {"rope_type": kind} | fields},
        window | {"rope_parameters": {"rope_type": kind} | fields | theta},
    ]
    parsed = [rope_from_hf(form) for form in forms]
    assert parsed[0] == parsed[1] == parsed[2]
    assert parsed[0][0] == 5e5 and parsed[0][1].rope_type == kind
    for form in forms:
        ours = rope_frequencies(head_dim=64, theta=5e5, scaling=parsed[0][1], seq_len=9)
        assert_same_frequencies(ours, hf_frequencies(form, 64, 9))


def test_config_without_rope_keys_is_llama_1():
    """LLaMA-1 configs name no theta at all; `default` and null must not become a scaling."""
    assert rope_from_hf({"max_position_embeddings": 2048}) == (10_000.0, None)
    assert rope_from_hf({"rope_scaling": None, "rope_theta": 5e5}) == (5e5, None)
    default = {"rope_type": "default", "rope_theta": 5e5}
    assert rope_from_hf({"rope_parameters": default}) == (5e5, None)


def test_factor_of_longrope_and_yarn_may_be_the_ratio_of_windows():
    """Phi-3 and DeepSeek name two windows and no factor: attention factor 1 would be wrong."""
    lists = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    for fields in ({"rope_type": "longrope"} | lists, {"rope_type": "yarn", "factor": None}):
        keys = {"max_position_embeddings": 8192, "rope_theta": 1e4, "rope_scaling": dict(fields)}
        keys["original_max_position_embeddings"] = 2048
        _, scaling = rope_from_hf(keys)
        assert scaling.factor == 4
        ours = rope_frequencies(head_dim=16, theta=1e4, scaling=scaling, seq_len=2049)
        assert_same_frequencies(ours, hf_frequencies(keys, 16, 2049))


@pytest.mark.parametrize(
    ("window", "factor", "named", "original", "now"),
    [
        (32_768, 8.0, None, 4096, 32_768),  # LLaMA-2-7B-32K: the extended window is stated
        (16_384, 4.0, None, 4096, 16_384),  # deepseek-coder
        (4096, 4.0, None, 4096, 16_384),  # vicuna-7b-v1.5-16k: the original window is stated
        (4096, 8.0, None, 4096, 32_768),  # what LongLoRA's own code leaves in config.json
        (8192, 4.0, None, 8192, 32_768),  # a Llama 3 whose window was left
        (2048, 4.0, None, 2048, 8192),
        (100_000, 25.0, 4096, 4096, 100_000),  # ours: 100000 / 25 is no window
        (2048, 8.0, 256, 256, 2048),  # ours, small
    ],
)
def test_original_window_of_linear_scaling(window, factor, named, original, now, caplog):
    """Re-extension from a window that is already scaled; a guess that is not told."""
    keys = {"max_position_embeddings": window, "rope_scaling": {"type": "linear", "factor": factor}}
    if named:
        keys["original_max_position_embeddings"] = named
    with caplog.at_level(logging.WARNING, "longlora_jax"):
        _, scaling = rope_from_hf(keys)
    assert scaling.original_max_position_embeddings == original
    assert bool(caplog.records) == (named is None)
    assert window_from_hf(keys) == now


@pytest.mark.parametrize(
    ("stated", "factor", "original", "now"),
    [
        (32_768, 16.0, 8192, 131_072),  # the factor says more than max_position_embeddings
        (8192, 16.0, 8192, 131_072),
        (131_072, 16.0, 8192, 131_072),
        (160_000, 16.0, 8192, 160_000),
        (32_768, 4.0, None, 131_072),  # Qwen's habit
    ],
)
def test_window_of_yarn(stated, factor, original, now):
    """Catches: generation refused within the window that YaRN was trained for; ours is never larger than we say."""
    given = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    keys = {"max_position_embeddings": stated, "rope_scaling": given}
    assert window_from_hf(keys) == now
    theta, scaling = rope_from_hf(keys)
    for window in (now, 6000):
        assert window_from_hf(rope_to_hf(theta, scaling, 64, window)) == window


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_states_its_window(factor):
    """Catches: Llama 3.2 (x32 from 8,192, 131,072 tokens) read as 262,144."""
    given = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    given |= {"original_max_position_embeddings": 8192}
    assert window_from_hf({"max_position_embeddings": 131_072, "rope_scaling": given}) == 131_072


def test_extension_starts_from_the_original_window():
    """The reference's bug: 4096 x8 extended to 65,536 gave 2."""
    first = extended(None, 4096, 32_768)
    assert first.factor == 8.0
    for window in (4096, 32_768):  # both habits of max_position_embeddings
        again = extended(first, window, 65_536)
        assert (again.factor, again.original_max_position_embeddings) == (16.0, 4096)
    assert extended(None, 4096, 100_000).factor == 25.0
    assert extended(None, 4096, 8193).factor == 3.0


def test_extension_within_the_window_changes_nothing():
    """Training a 32k model on 8k rows must not take its scaling away, nor a base model get one."""
    first = extended(None, 4096, 32_768)
    assert extended(None, 4096, 4096) is None
    assert extended(first, 32_768, 8192) == extended(first, 32_768, 32_768) == first
    assert extended(None, 4096, 4096, factor=2.0).factor == 2.0


def test_extension_keeps_the_fields_of_the_same_kind_alone():
    """An attention factor fitted to the old factor carried on, or yarn's betas lost."""
    old = extended(None, 4096, 16_384, "yarn", attention_factor=1.14, beta_fast=24.0)
    again = extended(old, 16_384, 65_536, "yarn")
    assert (again.factor, again.beta_fast, again.attention_factor) == (16.0, 24.0, None)
    assert extended(old, 16_384, 65_536, "yarn", beta_fast=16.0).beta_fast == 16.0
    assert extended(old, 16_384, 65_536, "ntk").beta_fast is None
    llama3 = extended(None, 8192, 65_536, "llama3")
    assert (llama3.low_freq_factor, llama3.high_freq_factor) == (1.0, 4.0)


META = RopeScaling(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
)


def test_auto_extends_the_kind_that_a_model_has(caplog):
    """Catches: linear x32 laid over Llama 3.1's own scaling or over YaRN without a word, where the fastest pairs then
    turn 32 times slower; a factor of llama3 that forgets that Meta's 8 covers 16 windows."""
    assert extended(META, 131_072, 262_144, "auto") == dataclasses.replace(META, factor=16.0)
    assert extended(META, 131_072, 262_144, "llama3").factor == 16.0
    yarn = extended(None, 8192, 32_768, "yarn", beta_fast=24.0)
    again = extended(yarn, 32_768, 65_536, "auto")
    assert (again.rope_type, again.factor, again.beta_fast) == ("yarn", 8.0, 24.0)
    assert extended(None, 4096, 32_768, "auto") == extended(None, 4096, 32_768, "linear")
    assert extended(META, 131_072, 65_536, "auto") == META
    assert not caplog.records
    fastest = rope_frequencies(head_dim=128, theta=5e5, scaling=META, seq_len=1)[0][0]
    longer = extended(META, 131_072, 262_144, "auto")
    assert rope_frequencies(head_dim=128, theta=5e5, scaling=longer, seq_len=1)[0][0] == fastest


def test_a_kind_that_replaces_another_is_said(caplog):
    """Catches: a scaling that is lost in silence."""
    assert extended(META, 131_072, 262_144, "linear").factor == 32.0
    assert "llama3 x8 becomes linear x32" in caplog.text and len(caplog.records) == 1
    longrope = RopeScaling(
        rope_type="longrope", factor=4.0, original_max_position_embeddings=64, short_factor=(1.0,), long_factor=(2.0,)
    )
    with pytest.raises(UserError, match="longrope has factors that were searched for its window of 256, none for 512"):
        extended(longrope, 256, 512, "auto")


def test_kept_rope_has_the_window_that_is_trained():
    """Catches: rope.type=keep that leaves the old window in config.json, and generation that refuses more."""
    model = tiny_config(max_position_embeddings=16)
    config = Config(seq_len=32, steps=1, rope=RopeConfig(type="keep"))
    kept = extend_model(model, config)
    assert (kept.max_position_embeddings, kept.rope_scaling) == (32, None)
    assert extend_model(kept, dataclasses.replace(config, seq_len=8)) == kept


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_rotation_equals_transformers(kind):
    """Interleaved instead of half-split pairs, a sign, or cos without its attention factor."""
    rng = np.random.default_rng(0)
    fields = {}
    if kind == "longrope":
        fields = {"short_factor": (1.0,) * 8, "long_factor": tuple(1.0 + np.arange(8))}
    scaling = extended(None, 64, 256, kind, **fields)
    q = rng.normal(size=(2, 200, 4, 16)).astype(np.float32)
    k = rng.normal(size=(2, 200, 2, 16)).astype(np.float32)
    positions = np.stack([np.arange(200), rng.permutation(200)])
    frequencies = rope_frequencies(head_dim=16, theta=1e4, scaling=scaling, seq_len=200)
    tables = rope_tables(jnp.asarray(positions), *frequencies)
    embedding = LlamaRotaryEmbedding(llama_config(16, **rope_to_hf(1e4, scaling, 16, 256)))
    cos, sin = embedding(torch.zeros(1), torch.from_numpy(positions))
    theirs = apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(k), cos, sin, 2)
    for x, expected in zip((q, k), theirs, strict=True):
        # An angle of 200 radians has an ulp of 1.5e-5; values are up to 4.
        rotated = apply_rope(jnp.asarray(x), *tables)
        np.testing.assert_allclose(rotated, expected.numpy(), atol=1e-4)


def test_angles_stay_exact_at_long_positions():
    """A cosine with a poor argument reduction: off by 1e-3 and more at 100,000 radians."""
    positions = np.arange(99_000, 100_000)
    cos, sin = rope_tables(jnp.asarray(positions)[None], np.ones(1, np.float32), 1.0)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(positions), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(positions), atol=1e-6)


def test_bf16_input_is_rotated_in_f32():
    """Position 257 rounded to 256 in bf16, one radian off; or cos and sin rounded to 8 bits."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 16)), jnp.bfloat16)
    inv_freq, factor = rope_frequencies(head_dim=16, theta=1e4, scaling=None, seq_len=258)
    cos, sin = rope_tables(jnp.asarray([[256, 257]]), inv_freq, factor)
    assert cos.dtype == sin.dtype == jnp.float32
    rotated = apply_rope(x, cos, sin)
    exact = apply_rope(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(rotated, exact.astype(jnp.bfloat16), strict=True)
    same_token = jnp.broadcast_to(x[:, :1], x.shape)
    assert jnp.abs(jnp.diff(apply_rope(same_token, cos, sin)[..., 0], axis=1)).max() > 0.1


BAD_CONFIGS = {
    "unknown": ({"type": "su", "factor": 2.0}, ["'su'", "default", *ROPE_TYPES]),
    "no low factor": (LLAMA31 | {"type": "llama3", "low_freq_factor": None}, ["low_freq_factor"]),
    "llama3 upside down": (LLAMA31 | {"type": "llama3", "low_freq_factor": 4.0}, ["above"]),
    "no long factor": ({"type": "longrope", "factor": 2.0, "short_factor": [1.0]}, ["long_factor"]),
    "no factor": ({"rope_type": "linear"}, ["linear", "factor"]),
    "factor as text": ({"rope_type": "yarn", "factor": "8"}, ["yarn", "factor"]),
    "factor below 1": ({"rope_type": "dynamic", "factor": 0.5}, ["factor=0.5"]),
    "factor nan": ({"rope_type": "linear", "factor": math.nan}, ["factor"]),
    "beta as text": ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}, ["beta_fast='32'"]),
    "not an object": ("linear", ["'linear'"]),
    "by layer type": ({"full_attention": {"rope_type": "default"}}, ["flat"]),
    "part of a head": ({"rope_type": "default", "partial_rotary_factor": "half"}, ["partial_rotary"]),
    "theta as text": ({"rope_type": "default", "rope_theta": "1e4"}, ["rope_theta='1e4'"]),
}


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_one_line(case, form):
    """A KeyError, a TypeError, or NaN frequencies where a user needs to be told what to change."""
    content, words = BAD_CONFIGS[case]
    with pytest.raises(UserError) as error:
        rope_from_hf({"max_position_embeddings": 4096, form: content})
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def test_bad_arguments_are_one_line():
    """Bad settings of a run, rather than of a checkpoint."""
    with pytest.raises(UserError, match="'pose' is not known: use one of linear, dynamic"):
        extended(None, 4096, 8192, "pose")
    with pytest.raises(UserError, match="longrope.*needs short_factor and long_factor"):
        extended(None, 4096, 8192, "longrope")
    lists = {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4}
    wrong_length = extended(None, 4096, 8192, "longrope", **lists)
    for arguments in ({"scaling": wrong_length, "theta": 1e4}, {"scaling": None, "theta": 0.0}):
        with pytest.raises(UserError, match="head_dim"):
            rope_frequencies(head_dim=16, seq_len=8192, **arguments)
    ntk = extended(None, 4096, 8192, "ntk")
    edited = rope_to_hf(1e4, ntk, 64, 8192) | sizes(64) | {"rope_parameters": {"rope_theta": 5e5}}
    with pytest.raises(UserError, match="longlora_ntk"):
        rope_from_hf(edited)
