"""GGUF files of every family, from a Hugging Face folder, with the keys and values of llama.cpp's converter.

Tensors have the names that the gguf package itself gives them.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_files import rotary_order
from safetensors.numpy import load_file

ARCHITECTURES = {
    **{kind: kind for kind in ("qwen2", "qwen3", "phi3", "smollm3", "olmo2", "granite", "gemma", "gemma2", "stablelm")},
    **{"mistral": "llama", "llama": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"},
}
TURNS_NEIGHBOURS = ("llama", "smollm3", "granite")


def write_family(path: Path, folder: Path, keys: dict[str, Any] | None = None) -> str:
    """Writes the model of a folder; keys: more or other metadata, without the architecture's name, None leaves out."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    metadata = {f"{arch}.{key}": value for key, value in (_keys(arch, config) | (keys or {})).items()}
    tokens = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    metadata |= {f"tokenizer.ggml.{token}_token_id": config.get(key) for token, key in tokens.items()}
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for name, array in _heads_stacked(load_file(folder / "model.safetensors")).items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), _stored(arch, name, array, config))
    for name, numbers in _divisors(config).items():
        writer.add_tensor(f"rope_factors_{name}.weight", np.float32(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _heads_stacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """StableLM's norms of single heads [H] as one tensor [N, H] of a layer."""
    stacked = {name: array for name, array in weights.items() if ".norms." not in name}
    for name in weights:
        if name.endswith(".norms.0.weight"):
            before = name.removesuffix(".norms.0.weight")
            heads = sum(key.startswith(f"{before}.norms.") for key in weights)
            stacked[f"{before}.weight"] = np.stack([weights[f"{before}.norms.{i}.weight"] for i in range(heads)])
    return stacked


def _stored(arch: str, name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    heads = config["num_attention_heads"]
    if arch in TURNS_NEIGHBOURS and ("q_proj" in name or "k_proj" in name):
        return rotary_order(array, heads if "q_proj" in name else config["num_key_value_heads"])
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if "query_key_value" in name:  # head by head there, q, k and v in blocks here
        return array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    return array


def _keys(arch: str, config: dict[str, Any]) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    keys = {
        "embedding_length": width,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "context_length": config["max_position_embeddings"],
        "rope.freq_base": config.get("rope_theta"),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": config.get("layer_norm_eps"),
    }
    if "head_dim" in config:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in (*TURNS_NEIGHBOURS, "phi3", "stablelm", "gptneox"):
        share = config.get("rotary_pct") or config.get("partial_rotary_factor", 1.0)
        keys["rope.dimension_count"] = int(head_dim * share)
    return keys | _scaling(config) | _OWN.get(arch, lambda config: {})(config)


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "longrope":  # Phi-3's converter names no type
        original, window = config["original_max_position_embeddings"], config["max_position_embeddings"]
        return {"rope.scaling.attn_factor": math.sqrt(1 + math.log(window / original) / math.log(original))}
    return {
        "rope.scaling.type": kind,
        "rope.scaling.factor": scaling.get("factor"),
        "rope.scaling.original_context_length": scaling.get("original_max_position_embeddings"),
    }


def _divisors(config: dict[str, Any]) -> dict[str, list[float]]:
    scaling = config.get("rope_scaling") or {}
    return {name: scaling[f"{name}_factor"] for name in ("long", "short") if f"{name}_factor" in scaling}


# What the converter writes of one architecture alone.
_OWN = {
    "granite": lambda config: {
        "attention.scale": config.get("attention_multiplier", 1.0),
        "embedding_scale": config.get("embedding_multiplier", 1.0),
        "residual_scale": config.get("residual_multiplier", 1.0),
        "logit_scale": config.get("logits_scaling", 1.0),
    },
    "phi3": lambda config: {
        "attention.sliding_window": config.get("sliding_window") or 0,
        "rope.scaling.original_context_length": config["original_max_position_embeddings"],
    },
    "gemma2": lambda config: {
        "attention.sliding_window": config["sliding_window"],
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
    },
    "gemma3": lambda config: {
        "attention.sliding_window": config["sliding_window"],
        "rope.freq_base_swa": config.get("rope_local_base_freq"),
    },
    "stablelm": lambda config: {"use_parallel_residual": True},  # where config.json does not say
    "gptneox": lambda config: {"use_parallel_residual": config["use_parallel_residual"]},
}
