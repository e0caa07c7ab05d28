"""config.json of Hugging Face <-> ModelConfig."""

import os
from collections.abc import Mapping
from typing import Any

from longlora_jax.attention.rope import RopeScaling
from longlora_jax.errors import UserError
from longlora_jax.files import read_json
from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.config_faults import (
    NUMBERS,
    SIZES,
    SWITCHES,
    TOKEN_IDS,
    config_faults,
    family_faults,
    given_rope_faults,
    is_size,
    nested_rope_faults,
    refuse,
    rope_faults,
    shown,
)
from longlora_jax.weights.families import ACTIVATIONS, FAMILIES, defaults_of, family_of
from longlora_jax.weights.hf_rope import rope_from_hf, rope_to_hf, window_from_hf


def load_config(folder: str) -> ModelConfig:
    """Reads config.json of a model of one of FAMILIES.

    Keys that are left out get transformers' defaults. Of several eos ids the first is kept: it is
    the one that ends a document. Raises UserError, naming every fault, for another architecture
    or for an option that this model does not have.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: give a Hugging Face folder with a config.json")
    path = os.path.join(folder, "config.json")
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        refuse(path, [_other_kind(kind, raw)])
    assert isinstance(kind, str)  # refused otherwise
    refuse(path, nested_rope_faults(raw, kind))
    raw = defaults_of(kind) | one_form(raw, kind)
    # A null means the same as a key that is left out.
    width: Any = raw.get("hidden_size")
    heads: Any = raw.get("num_attention_heads")
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = heads
    if raw.get("head_dim") is None and is_size(width) and is_size(heads) and not width % heads:
        raw["head_dim"] = width // heads
    refuse(path, config_faults(raw, kind))
    refuse(path, family_faults(raw, kind))
    refuse(path, given_rope_faults(raw))
    try:
        theta, scaling = rope_from_hf(raw)
        raw["max_position_embeddings"] = window_from_hf(raw)
    except UserError as error:
        refuse(path, [str(error).removeprefix("config.json: ")])
        raise
    config = config_of(kind, raw, theta, scaling)
    refuse(path, rope_faults(config))
    return config


def config_of(kind: str, raw: Mapping[str, Any], theta: float, scaling: RopeScaling | None = None) -> ModelConfig:
    """The ModelConfig of a model_type whose config.json is complete and without faults."""
    family = FAMILIES[kind]
    fields: dict[str, Any] = {key: raw[key] for key in SIZES + SWITCHES + family.same}
    fields |= {key: float(raw[key]) for key in NUMBERS}
    fields |= {key: _token_id(raw.get(key)) for key in TOKEN_IDS}
    fields |= {"model_type": kind, "hidden_act": ACTIVATIONS[raw["hidden_act"]], "rope_theta": theta}
    fields |= family.always | family.reads(dict(raw))
    return ModelConfig(**fields, rope_scaling=scaling)


def is_quantized(folder: str) -> bool:
    """Whether a folder's config.json says that its weights are quantized."""
    return bool(read_json(os.path.join(folder, "config.json")).get("quantization_config"))


def one_form(raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A config.json in LLaMA's words: without a family's synonyms, with the rope of layers of full attention alone.

    The theta of Gemma 3's other layers is then rope_local_base_freq.
    """
    raw, family = dict(raw), FAMILIES[kind]
    for theirs, ours in family.synonyms.items():
        raw.pop(ours, None)
        if raw.get(theirs) is not None:
            raw[ours] = raw[theirs]
    for form in ("rope_scaling", "rope_parameters") if family.longrope_only else ():
        given = raw.get(form)
        if isinstance(given, dict) and "long_factor" in given:  # older files name it otherwise
            named = given.get("rope_type", given.get("type"))
            raw[form] = given | {"rope_type": "longrope" if named in ("su", "yarn") else named}
    rope, scaling = raw.get("rope_parameters"), raw.get("rope_scaling")
    if kind == "gemma3_text" and isinstance(rope, dict) and rope:
        full, local = (rope.get(f"{layers}_attention") or {} for layers in ("full", "sliding"))
        if scaling is None or isinstance(scaling, dict):  # as transformers: one updates the other
            raw |= {"rope_parameters": full | (scaling or {}), "rope_scaling": None}
        raw["rope_local_base_freq"] = local.get("rope_theta", raw.get("rope_local_base_freq"))
    if raw.get("rope_local_base_freq") is None:
        raw.pop("rope_local_base_freq", None)
    return raw


def _other_kind(kind: Any, raw: Mapping[str, Any]) -> str:
    """Why a model_type is not read."""
    known = ", ".join(FAMILIES)
    if isinstance(raw.get("text_config"), dict):
        inner = raw["text_config"].get("model_type")
        return (
            f"model_type is {shown(kind)}, a multimodal model: only text models are read ({known}); "
            f"save its language model (model_type {shown(inner)}) by itself"
        )
    what = next((what for words, what in _OTHER_KINDS.items() if any(w in str(kind) for w in words)), "")
    return f"model_type is {shown(kind)}{what}, it must be one of {known}"


_OTHER_KINDS: dict[tuple[str, ...], str] = {
    ("moe", "mixtral", "deepseek", "gpt_oss", "dbrx", "jetmoe"): ", a mixture of experts",
    ("mamba", "jamba", "zamba", "bamba", "hybrid", "falcon_h1", "recurrent", "next"): ", with layers of no attention",
    ("_vl", "vision", "llava", "mllama", "omni", "audio"): ", a multimodal model",
}


def _token_id(value: Any) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    # Old LLaMA files say -1 for "none".
    return value if isinstance(value, int) and value >= 0 else None


def config_to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of a config.json that transformers 4 and 5 both read, as the family has it; dtype as "bfloat16"."""
    family = family_of(config)
    same = SIZES + SWITCHES + NUMBERS + TOKEN_IDS + family.same
    rope = rope_to_hf(
        config.rope_theta,
        config.rope_scaling,
        config.rotary_dim,
        config.max_position_embeddings,
        longrope_only=family.longrope_only,
    )
    if config.partial_rotary_factor != 1:
        rope["rope_parameters"] |= {"partial_rotary_factor": config.partial_rotary_factor}
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    if config.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq or config.rope_theta}
        rope["rope_parameters"] = {"full_attention": rope["rope_parameters"], "sliding_attention": local}
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "hidden_act": config.hidden_act,
        "attention_dropout": 0.0,
        "use_cache": True,
        **{key: getattr(config, key) for key in same},
        **rope,
        **family.writes(config),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
