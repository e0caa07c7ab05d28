"""config.json of Hugging Face <-> ModelConfig."""

import os
from collections.abc import Mapping
from typing import Any

from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.files import read_json
from longlora_jax.rope import rope_from_hf, rope_to_hf, window_from_hf

_SHOWN_FAULTS = 8

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_NUMBERS = ("rms_norm_eps", "initializer_range")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LLAMA: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What transformers takes a key to be where config.json leaves it out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


def refuse(where: str, faults: list[str]) -> None:
    """Raises one UserError, on one line, that names all faults; does nothing if there are none."""
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        shown = faults[:_SHOWN_FAULTS] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(" ".join(f"{where}: {'; '.join(shown)}".split()))


def load_config(folder: str) -> ModelConfig:
    """Reads config.json of a LLaMA (or of a Mistral, whose layers are the same).

    Keys that are left out get transformers' defaults. Of several eos ids the first is kept: it is
    the one that ends a document. Raises UserError, naming every fault, for another architecture
    or for an option that this model does not have.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: give a Hugging Face folder with a config.json")
    path = os.path.join(folder, "config.json")
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in _DEFAULTS:
        raise UserError(f"{path}: model_type is {kind!r}, it must be llama or mistral")
    raw = _DEFAULTS[kind] | raw
    # A null means the same as a key that is left out.
    width: Any = raw.get("hidden_size")
    heads: Any = raw.get("num_attention_heads")
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = heads
    if raw.get("head_dim") is None and _is_size(width) and _is_size(heads) and not width % heads:
        raw["head_dim"] = width // heads
    refuse(path, _config_faults(kind, raw))
    theta, scaling = rope_from_hf(raw)
    raw["max_position_embeddings"] = window_from_hf(raw)
    fields: dict[str, Any] = {key: raw[key] for key in _SIZES + _SWITCHES}
    fields |= {key: float(raw[key]) for key in _NUMBERS}
    fields |= {key: _token_id(raw.get(key)) for key in TOKEN_IDS}
    return ModelConfig(**fields, rope_theta=theta, rope_scaling=scaling)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _config_faults(kind: str, raw: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{key} is {raw.get(key)!r}, it must be a whole number above 0" for key in _SIZES if not _is_size(raw.get(key))
    ]
    faults += [
        f"{key} is {raw[key]!r}, it must be true or false" for key in _SWITCHES if not isinstance(raw[key], bool)
    ]
    faults += [
        f"{key} is {raw[key]!r}, it must be a number above 0"
        for key in _NUMBERS
        if not (isinstance(raw[key], (int, float)) and raw[key] > 0)
    ]
    if not faults and raw["num_attention_heads"] % raw["num_key_value_heads"]:
        faults.append(
            f"num_attention_heads={raw['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads={raw['num_key_value_heads']}"
        )
    if not faults and raw["head_dim"] % 2:
        faults.append(f"head_dim={raw['head_dim']} is odd, rotary embeddings turn pairs")
    if raw.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act is {raw['hidden_act']!r}, only silu is supported")
    if raw.get("quantization_config"):
        faults.append("the weights are quantized, give a folder in float32, bfloat16 or float16")
    window = raw.get("sliding_window") if kind == "mistral" else None
    # A window that never cuts anything off is no window.
    if not faults and window and window < raw["max_position_embeddings"]:
        faults.append(
            f"sliding_window={window} is shorter than max_position_embeddings="
            f"{raw['max_position_embeddings']}: there is full attention only, so set one equal "
            "to the other, or sliding_window to null"
        )
    return faults


def _token_id(value: Any) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    # Old LLaMA files say -1 for "none".
    return value if isinstance(value, int) and value >= 0 else None


def config_to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of a config.json that transformers 4 and 5 both read; dtype as "bfloat16"."""
    same = _SIZES + _SWITCHES + _NUMBERS + TOKEN_IDS
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **{key: getattr(config, key) for key in same},
        **rope_to_hf(config.rope_theta, config.rope_scaling, config.head_dim, config.max_position_embeddings),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
