"""What is wrong with the fields of a model's config, said in one line before anything is built on them."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from longlora_jax.attention.rope import RopeScaling
from longlora_jax.errors import UserError
from longlora_jax.files import one_line
from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.families import ACTIVATIONS, BIASES, FAMILIES

_SHOWN_FAULTS = 8
_SHOWN_CHARACTERS = 1600  # of them all
_MOST_LAYERS = 10_000  # a LLaMA of 405 B has 126; a table of names has some for each

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
SWITCHES = ("tie_word_embeddings",)
NUMBERS = ("rms_norm_eps", "initializer_range")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def refuse(where: str, faults: list[str]) -> None:
    """Raises one UserError, on one line, that names all faults; does nothing if there are none."""
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        shown = faults[:_SHOWN_FAULTS] + ([f"and {more} more"] if more > 0 else [])
        text = "; ".join(one_line(fault, _SHOWN_CHARACTERS // len(shown)) for fault in shown)
        raise UserError(f"{one_line(where, len(where))}: {text}")


def is_size(value: Any) -> bool:
    """Whether a value is a count."""
    return type(value) is int and 0 < value < 2**31  # token ids and positions are int32


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e30  # inf is none, neither is what float() cannot hold


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_positive, value))


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_id(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return value is None or all(type(i) is int and i < 2**31 for i in ids)


_WANTED: dict[Callable[[Any], bool], str] = {
    is_size: "a whole number above 0",
    _is_number: "a number of 0 or more",
    _is_positive: "a number above 0",
    _is_list: "a list of numbers above 0",
    _is_switch: "true or false",
    _is_id: "the number of a token, a list of them or null",
}
_Fields = dict[str, Callable[[Any], bool]]
_FIELDS: _Fields = {**dict.fromkeys(SIZES, is_size), **dict.fromkeys((*SWITCHES, *BIASES), _is_switch)}
_FIELDS |= {**dict.fromkeys(NUMBERS, _is_positive), **dict.fromkeys(TOKEN_IDS, _is_id)}
_KIND_FIELDS: _Fields = {
    **dict.fromkeys(("sliding_window", "no_rope_layer_interval"), is_size),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq"),
        _is_positive,
    ),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), _is_positive),
    **dict.fromkeys(("logits_scaling", "partial_rotary_factor"), _is_positive),
    **dict.fromkeys(("use_sliding_window", "use_parallel_residual", "qk_layernorm"), _is_switch),
    "max_window_layers": _is_number,
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SILU = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "granite")  # by their authors' code
_ROPE_NUMBERS = "attention_factor beta_fast beta_slow mscale mscale_all_dim low_freq_factor high_freq_factor".split()
_ROPE_FIELDS: _Fields = {"original_max_position_embeddings": is_size, "truncate": _is_switch}
_ROPE_FIELDS |= {**dict.fromkeys(_ROPE_NUMBERS, _is_number), **dict.fromkeys(("factor", "rope_theta"), _is_positive)}
_ROPE_FIELDS |= dict.fromkeys(("short_factor", "long_factor"), _is_list) | {"partial_rotary_factor": _is_positive}


def _field_faults(table: Mapping[str, Any], fields: _Fields) -> list[str]:
    return [
        f"{key} is {shown(table.get(key))}, it must be {_WANTED[check]}"
        for key, check in fields.items()
        if not check(table.get(key))
    ]


def shown(value: Any) -> str:
    """A value in a few words."""
    return one_line(reprlib.repr(value), 100)  # a few words of what may be megabytes


def config_faults(raw: Mapping[str, Any], kind: str = "llama") -> list[str]:
    """What is wrong with the fields of a config.json, or of a ModelConfig, its rope apart."""
    faults = _field_faults(raw, _FIELDS)
    if not faults and raw["num_attention_heads"] % raw["num_key_value_heads"]:
        faults.append(
            f"num_attention_heads={raw['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads={raw['num_key_value_heads']}"
        )
    if not faults and raw["num_hidden_layers"] > _MOST_LAYERS:
        faults.append(f"num_hidden_layers={raw['num_hidden_layers']} is more than {_MOST_LAYERS}")
    if not faults and (raw["head_dim"] % 2 or raw["head_dim"] < 4):
        faults.append(f"head_dim={raw['head_dim']} must be an even number of 4 or more: rotary embeddings turn pairs")
    if not isinstance(raw["hidden_act"], str) or raw["hidden_act"] not in ACTIVATIONS:
        faults.append(f"hidden_act is {shown(raw['hidden_act'])}, it must be one of {', '.join(ACTIVATIONS)}")
    elif kind in _SILU and ACTIVATIONS[raw["hidden_act"]] != "silu":
        faults.append(f"hidden_act is {shown(raw['hidden_act'])}, only silu is supported")
    if raw.get("quantization_config") and (fault := _method_fault(raw["quantization_config"])):
        faults.append(fault)
    return faults


def _method_fault(settings: Any) -> str | None:
    """Why a quantization_config is of weights that are not read; None if it is bitsandbytes' (see weights/bnb.py)."""
    settings = settings if isinstance(settings, dict) else {}
    method = settings.get("quant_method")
    if method == "bitsandbytes" or (method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))):
        return None
    return (
        f"the weights are quantized by {shown(method) if method else 'an unnamed method'}, and of quantized ones only "
        "bitsandbytes' are read: give the folder in float32, bfloat16 or float16 that they were made of (in training "
        "with base_quantization=nf4 where it must be small)"
    )


def family_faults(raw: Mapping[str, Any], kind: str) -> list[str]:
    """What is wrong with the keys of a config.json that some families have alone, its other fields being right."""
    known = FAMILIES[kind].known
    for table in (raw, raw.get("rope_scaling"), raw.get("rope_parameters")):
        share = table.get("partial_rotary_factor") if isinstance(table, dict) else None
        if "partial_rotary_factor" not in known and share not in (None, 1):
            return [f"partial_rotary_factor is {shown(share)}: a {kind} rotates whole heads, so leave it out"]
    return foreign_faults({key: value for key, value in raw.items() if key not in known}) + _kind_faults(raw, kind)


def _kind_faults(raw: Mapping[str, Any], kind: str) -> list[str]:
    """What is wrong with the fields that some families have alone; those of all are right."""
    given = {key: value for key, value in raw.items() if value is not None and key in FAMILIES[kind].known}
    faults = _field_faults(given, {key: check for key, check in _KIND_FIELDS.items() if key in given})
    layers = raw["num_hidden_layers"]
    kinds, rotated = given.get("layer_types"), given.get("no_rope_layers")
    if kinds is not None and not (isinstance(kinds, list) and len(kinds) == layers and _LAYER_TYPES.issuperset(kinds)):
        faults.append(f"layer_types is {shown(kinds)}, it must be {' or '.join(sorted(_LAYER_TYPES))} of each layer")
    if rotated is not None and not (
        isinstance(rotated, list) and len(rotated) == layers and {0, 1}.issuperset(rotated)
    ):
        faults.append(f"no_rope_layers is {shown(rotated)}, it must be 0 or 1 of each layer")
    if kind in ("gemma2", "gemma3_text"):
        needed = [key for key in ("sliding_window", "query_pre_attn_scalar") if raw.get(key) is None]
        faults += _field_faults(raw, {key: _KIND_FIELDS[key] for key in needed})
    if kinds and "sliding_attention" in kinds and not is_size(raw.get("sliding_window")):
        faults.append(f"layer_types has sliding_attention, but sliding_window is {shown(raw.get('sliding_window'))}")
    if raw.get("use_bidirectional_attention"):
        faults.append("use_bidirectional_attention is set: it makes an encoder, which is not computed here")
    return faults


def foreign_faults(raw: Mapping[str, Any]) -> list[str]:
    """The keys of other architectures that say that the model computes something else than a LLaMA."""
    faults = []
    for key, neutral in _FOREIGN.items():
        value = raw.get(key)
        if isinstance(neutral, tuple):
            is_neutral = any(type(value) is type(n) and value == n for n in neutral)
        else:
            is_neutral = neutral(value, raw)
        if value is not None and not is_neutral:
            what = "a mixture of experts" if "experts" in key else "another architecture"
            faults.append(f"{key} is {shown(value)}: it makes {what} of a LLaMA, which is not computed here")
    return faults


def _is_factor(value: Any, neutral: float) -> bool:
    return type(value) in (int, float) and math.isclose(value, neutral, rel_tol=1e-4)


def _is_head_scale(value: Any, raw: Mapping[str, Any]) -> bool:
    return is_size(raw.get("head_dim")) and _is_factor(value, raw["head_dim"] ** -0.5)


def _is_head_dim(value: Any, raw: Mapping[str, Any]) -> bool:
    return is_size(raw.get("head_dim")) and _is_factor(value, raw["head_dim"])


def _is_one(value: Any, raw: Mapping[str, Any]) -> bool:
    return _is_factor(value, 1)


def _is_root_of_layers(value: Any, raw: Mapping[str, Any]) -> bool:
    return is_size(raw.get("num_hidden_layers")) and _is_factor(value, raw["num_hidden_layers"] ** 0.5)


def _is_width(value: Any, raw: Mapping[str, Any]) -> bool:
    return is_size(raw.get("hidden_size")) and _is_factor(value, raw["hidden_size"])


def _all_full(value: Any, raw: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


def _all_rope(value: Any, raw: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and all(type(one) in (int, bool) and one == 1 for one in value)


def _at_most_one(value: Any, raw: Mapping[str, Any]) -> bool:
    return type(value) is int and value <= 1


_OFF = (False, 0, 0.0, [], {})
# What each key is where it changes nothing: values, or a test of (value, config.json). They are of Granite, MiniCPM,
# Cohere, Gemma, SmolLM3, Llama 4, OLMo, DeepSeek, Mixtral and encoders made of LLaMAs.
_FOREIGN: dict[str, tuple | Callable[[Any, Mapping[str, Any]], bool]] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), _is_one),
    **dict.fromkeys(("scale_emb", "lm_head_multiplier", "embedding_scale", "residual_scale"), _is_one),
    "attention_multiplier": _is_head_scale,
    "query_pre_attn_scalar": _is_head_dim,
    "scale_depth": _is_root_of_layers,
    "dim_model_base": _is_width,
    "layer_types": _all_full,
    "no_rope_layers": _all_rope,
    "is_causal": (True,),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_parallel_residual", "parallel_attn"), _OFF),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attn_temperature_tuning"), _OFF),
    **dict.fromkeys(("attention_chunk_size", "clip_qkv", "alibi", "is_encoder_decoder", "kv_lora_rank"), _OFF),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _at_most_one),
}


def rope_faults(config: ModelConfig) -> list[str]:
    """What is wrong with the rope of a config whose other fields are right."""
    faults, scaling, window = [], config.rope_scaling, config.max_position_embeddings
    if not 1 < config.rope_theta < 1e30:
        faults.append(f"rope_theta is {config.rope_theta}, it must be a number above 1")
    if not is_size(window):
        faults.append(f"the window is {shown(window)} tokens, it must be {_WANTED[is_size]} and below 2**31")
    if not 0 < config.partial_rotary_factor <= 1 or config.rotary_dim < 4 or config.rotary_dim % 2:
        faults.append(
            f"partial_rotary_factor={config.partial_rotary_factor} rotates {config.rotary_dim} of head_dim="
            f"{config.head_dim}: an even number of 4 or more is needed"
        )
    if scaling is None:
        return faults
    try:
        scaling.validate()
    except UserError as error:
        faults.append(str(error))
    if not is_size(scaling.original_max_position_embeddings):
        faults.append(f"an original window of {shown(scaling.original_max_position_embeddings)} tokens is none")
    for name in ("short_factor", "long_factor"):
        numbers = getattr(scaling, name)
        if numbers is not None and len(numbers) != config.rotary_dim // 2:
            faults.append(
                f"{name} has {len(numbers)} numbers, half of the {config.rotary_dim} that are rotated is needed"
            )
    return faults


def nested_rope_faults(raw: Mapping[str, Any], kind: str) -> list[str]:
    """What is wrong with the rope that a Gemma 3 has for each kind of layer; [] for the other families."""
    rope = raw.get("rope_parameters")
    if kind != "gemma3_text" or not isinstance(rope, dict) or not rope:
        return []
    layers = {name: rope.get(name) for name in ("full_attention", "sliding_attention")}
    if all(table is None for table in layers.values()) or not all(isinstance(t, dict | None) for t in layers.values()):
        return [f"rope_parameters is {shown(rope)}: a {kind} needs an object each for {' and '.join(layers)}"]
    local = layers["sliding_attention"] or {}
    scaled = local.get("rope_type", local.get("type", "default"))
    if scaled != "default":
        return [
            f"rope_parameters.sliding_attention has rope_type {shown(scaled)}: only layers of full attention are "
            "scaled here, so default is needed there"
        ]
    return []


def given_rope_faults(raw: Mapping[str, Any]) -> list[str]:
    """What rope_from_hf trusts."""
    faults = []
    ours = {name: raw[name] for name in ("longlora_ntk", "longlora_rope") if raw.get(name) is not None}
    top = {key: raw.get(key) for key in ("rope_theta", "original_max_position_embeddings")}
    for table in (top, raw.get("rope_scaling") or raw.get("rope_parameters") or {}, *ours.values()):
        if not isinstance(table, dict):
            faults.append(f"rope {shown(table)} must be one flat object with a rope_type")
            continue
        kind = table.get("rope_type", table.get("type"))
        if not isinstance(kind, str | None):
            faults.append(f"rope_type is {shown(kind)}, it must be a word")
        given = {key: value for key, value in table.items() if value is not None}
        faults += _field_faults(given, {key: _ROPE_FIELDS[key] for key in given if key in _ROPE_FIELDS})
    needed = {"rope_type", "factor", "original_max_position_embeddings", "rope_theta"}
    known = {*RopeScaling.__annotations__, "rope_theta"}
    for name, table in [] if faults else ours.items():
        if not needed <= {key for key in table if table[key] is not None} <= known:
            faults.append(f"{name} is {shown(table)}, it must have {', '.join(sorted(needed))}: delete it")
    return faults
