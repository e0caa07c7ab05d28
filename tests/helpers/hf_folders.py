"""Small LLaMAs of transformers, saved as folders that tests then change."""

import json
import os

import torch
import transformers
from safetensors.numpy import load_file, save_file


def tiny_model(dtype="float32", **options):
    """A random LLaMA of transformers; norms and biases are random too, else they hide swaps."""
    options = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **options,
    }
    rope = {"rope_theta": 5000.0, **options.pop("rope_parameters", {"rope_type": "default"})}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**options, rope_parameters=rope)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def save_tiny(folder, model=None, **kwargs):
    (model or tiny_model()).save_pretrained(folder, **kwargs)
    return str(folder)


def read_raw(folder):
    """All tensors of a folder as {name: (dtype, shape, bytes)}."""
    tensors = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            tensors |= load_file(os.path.join(folder, file))
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def edit_weights(folder, **changes):
    """Replaces tensors (or drops them: None) of the one safetensors file; dots as __."""
    tensors = load_file(folder / "model.safetensors")
    for name, array in changes.items():
        tensors[name.replace("__", ".")] = array
    tensors = {name: array for name, array in tensors.items() if array is not None}
    save_file(tensors, folder / "model.safetensors")
