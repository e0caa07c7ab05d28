"""Tiny models of every family, made by transformers: the oracle of tests that compare with it."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
# By name: model_type and what its config.json says, in the words of the published files.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 16},
    "qwen2 tied, yarn": {
        **{"model_type": "qwen2", "tie_word_embeddings": True},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "qwen2 upper layers slide": {
        **{"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    },
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3 biases": {"model_type": "qwen3", "attention_bias": True},
    "mistral window": {"model_type": "mistral", "sliding_window": 9},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "phi3": {"model_type": "phi3", "sliding_window": 11, "original_max_position_embeddings": 64},
    "phi3 128k": {
        **{"model_type": "phi3", "rope_scaling": _LONGROPE, "original_max_position_embeddings": 16},
        **{"sliding_window": 262144, "pad_token_id": 3},
    },
    "phi4-mini": {
        **{"model_type": "phi3", "head_dim": None, "num_attention_heads": 2, "partial_rotary_factor": 0.75},
        **{"tie_word_embeddings": True, "rope_scaling": None, "original_max_position_embeddings": 64},
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "no_rope_layer_interval": 4, "rope_theta": 2e6},
    "smollm3 untied": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "olmo2": {"model_type": "olmo2", "head_dim": 8},
    "olmo2 mha": {"model_type": "olmo2", "num_key_value_heads": 4, "rope_theta": 5e5},
    "granite": {
        **{"model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
        **{"attention_multiplier": 0.015625, "logits_scaling": 8.0, "tie_word_embeddings": True},
    },
    "granite biases": {"model_type": "granite", "attention_bias": True, "mlp_bias": True, "logits_scaling": 4.0},
    "gemma": {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1},
    "gemma2": {
        **{"model_type": "gemma2", "sliding_window": 9, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
        **{"final_logit_softcapping": 3.0, "hidden_activation": "gelu_pytorch_tanh"},
    },
    "gemma3": {
        **{"model_type": "gemma3_text", "num_hidden_layers": 5, "sliding_window": 7, "sliding_window_pattern": 3},
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 16},
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3 scaled": {
        **{"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 7, "rope_theta": 1e6},
        **{"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        **{"query_pre_attn_scalar": 8, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
    "stablelm": {"model_type": "stablelm", "partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "stablelm plain": {"model_type": "stablelm", "partial_rotary_factor": 1.0, "use_qkv_bias": False},
    "stablelm 12b": {
        **{"model_type": "stablelm", "partial_rotary_factor": 0.5, "use_qkv_bias": False},
        **{"qk_layernorm": True, "use_parallel_residual": True},
    },
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": True, "hidden_act": "gelu"},
    "gpt_neox in turn": {"model_type": "gpt_neox", "rotary_pct": 1.0, "use_parallel_residual": False},
}


def config_json(name: str, **changes) -> dict[str, Any]:
    """The config.json of a tiny model."""
    content = SIZES | MODELS[name] | changes
    if content["model_type"] in ("olmo2", "stablelm", "gpt_neox", "phi3", "smollm3", "granite", "qwen2"):
        content.pop("head_dim", None)  # their files have none
    if content["model_type"] == "gpt_neox":
        content.pop("num_key_value_heads")
    norm = "layer_norm_eps" if content["model_type"] in ("stablelm", "gpt_neox") else "rms_norm_eps"
    return content | {norm: 1e-5}


def make_folder(folder: Path, name: str, **changes) -> Path:
    """A folder as transformers saves a random model, its config.json in the words of the published ones."""
    content = config_json(name, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):  # else ones and zeros, which show nothing
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content | {"architectures": [type(model).__name__]}))
    return folder


@functools.cache
def torch_model(folder: Path):
    """transformers' model of a folder in float32, attention by its own formula."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
