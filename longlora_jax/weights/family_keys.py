"""What families of models have of their own in config.json: read into fields of ModelConfig, and written back."""

import logging
import math
from typing import Any

from longlora_jax.model_config import FULL_ATTENTION, SLIDING_ATTENTION, ModelConfig

Raw = dict[str, Any]
_log = logging.getLogger(__name__)


def _sliding(raw: Raw, window: Any, kinds: list[str]) -> Raw:
    """sliding_window and layer_types; a window that never cuts anything off is none."""
    if window is None or SLIDING_ATTENTION not in kinds:
        return {}
    return {"sliding_window": window, "layer_types": tuple(kinds)}


def all_sliding(raw: Raw) -> Raw:
    """Every layer in one window: Mistral's and Phi-3's. One that cuts nothing off would only keep groups from them."""
    window, longest = raw.get("sliding_window"), raw["max_position_embeddings"]
    if window is not None and window >= longest:
        _log.info("sliding_window=%d cuts nothing off in %d tokens: all layers have full attention", window, longest)
        return {}
    return _sliding(raw, window, [SLIDING_ATTENTION] * raw["num_hidden_layers"])


def writes_all_sliding(config: ModelConfig) -> Raw:
    """The inverse of all_sliding."""
    return {"sliding_window": config.sliding_window}


def upper_layers_slide(raw: Raw) -> Raw:
    """Qwen's: the first max_window_layers have full attention."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    first = raw.get("max_window_layers", 28)
    kinds = [SLIDING_ATTENTION if i >= first else FULL_ATTENTION for i in range(raw["num_hidden_layers"])]
    return _sliding(raw, window, raw.get("layer_types") or kinds)


def _writes_layer_types(config: ModelConfig) -> Raw:
    sliding = SLIDING_ATTENTION in config.layer_types
    kinds = list(config.layer_types) or [FULL_ATTENTION] * config.num_hidden_layers
    return {"sliding_window": config.sliding_window, "layer_types": kinds, "use_sliding_window": sliding}


def writes_upper_layers(config: ModelConfig) -> Raw:
    """The inverse of upper_layers_slide."""
    kinds = _writes_layer_types(config)
    first = kinds["layer_types"].index(SLIDING_ATTENTION) if kinds["use_sliding_window"] else config.num_hidden_layers
    return kinds | {"max_window_layers": first}


def reads_phi3(raw: Raw) -> Raw:
    """A window and a share of a head that is rotated."""
    return all_sliding(raw) | partial_rotary(raw)


def writes_phi3(config: ModelConfig) -> Raw:
    """The inverse of reads_phi3."""
    return writes_all_sliding(config) | {"partial_rotary_factor": config.partial_rotary_factor}


def partial_rotary(raw: Raw) -> Raw:
    """The share of a head that is rotated."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    given = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    return {} if given is None else {"partial_rotary_factor": float(given)}


def reads_smollm3(raw: Raw) -> Raw:
    """Layers without rotary embedding, and windows."""
    layers, every = raw["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
    rotated = raw.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types") or [
        FULL_ATTENTION if has_rope or not window else SLIDING_ATTENTION for has_rope in rotated
    ]
    return {"no_rope_layers": () if all(rotated) else tuple(rotated)} | _sliding(raw, window, kinds)


def writes_smollm3(config: ModelConfig) -> Raw:
    """The inverse of reads_smollm3."""
    rotated = list(config.no_rope_layers) or [1] * config.num_hidden_layers
    return _writes_layer_types(config) | {"no_rope_layers": rotated}


def reads_gemma(raw: Raw) -> Raw:
    """The scale of the embedding."""
    return {"embedding_multiplier": math.sqrt(raw["hidden_size"])}


def reads_gemma1(raw: Raw) -> Raw:
    """The scale of the embedding; by "gelu" the first files mean the approximation, which their model computes."""
    return reads_gemma(raw) | ({"hidden_act": "gelu_pytorch_tanh"} if raw["hidden_act"] == "gelu" else {})


def reads_gemma2(raw: Raw) -> Raw:
    """Every second layer in a window, and the scale of the scores."""
    layers, every = raw["num_hidden_layers"], 2
    kinds = raw.get("layer_types") or [SLIDING_ATTENTION if (i + 1) % every else FULL_ATTENTION for i in range(layers)]
    return reads_gemma(raw) | _query_scale(raw) | _sliding(raw, raw.get("sliding_window"), kinds)


def _query_scale(raw: Raw) -> Raw:
    scalar = raw["query_pre_attn_scalar"]
    return {"attention_multiplier": None if scalar == raw["head_dim"] else scalar**-0.5}


def writes_gemma2(config: ModelConfig) -> Raw:
    """The inverse of reads_gemma2."""
    kinds = _writes_layer_types(config)
    scalar = config.head_dim if config.attention_multiplier is None else config.attention_multiplier**-2
    whole = round(scalar)
    return {
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": whole if math.isclose(whole, scalar) else scalar,
        "sliding_window": kinds["sliding_window"] or config.max_position_embeddings,
        "layer_types": kinds["layer_types"],
    }


def reads_gemma3(raw: Raw) -> Raw:
    """Windows in all layers but every sixth, and their own theta."""
    layers, every = (
        raw["num_hidden_layers"],
        raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6,
    )
    kinds = raw.get("layer_types") or [SLIDING_ATTENTION if (i + 1) % every else FULL_ATTENTION for i in range(layers)]
    windows = _sliding(raw, raw.get("sliding_window"), kinds)
    local = {"rope_local_base_freq": float(raw["rope_local_base_freq"])} if windows else {}
    return reads_gemma(raw) | _query_scale(raw) | windows | local


def writes_gemma3(config: ModelConfig) -> Raw:
    """The inverse of reads_gemma3."""
    return writes_gemma2(config) | {"rope_local_base_freq": config.rope_local_base_freq or config.rope_theta}


def reads_stablelm(raw: Raw) -> Raw:
    """Biases, the share of a head that is rotated, a norm for every head of q and k, one norm a block."""
    parallel = bool(raw.get("use_parallel_residual"))
    return {
        "qkv_bias": raw["use_qkv_bias"],
        "qk_norm": "own_head" if raw.get("qk_layernorm") else "",
        "use_parallel_residual": parallel,
        "shared_norm": parallel,
    } | partial_rotary(raw)


def writes_stablelm(config: ModelConfig) -> Raw:
    """The inverse of reads_stablelm."""
    return {
        "layer_norm_eps": config.rms_norm_eps,
        "use_qkv_bias": config.qkv_bias,
        "partial_rotary_factor": config.partial_rotary_factor,
        "qk_layernorm": config.qk_norm == "own_head",
        "use_parallel_residual": config.use_parallel_residual,
    }


def writes_gpt_neox(config: ModelConfig) -> Raw:
    """Its own names of three keys."""
    return {
        "layer_norm_eps": config.rms_norm_eps,
        "rotary_pct": config.partial_rotary_factor,
        "rotary_emb_base": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
    }
