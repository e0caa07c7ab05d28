"""Small LLaMAs of transformers, and what real PEFT makes of them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import safetensors.torch as safetensors
import torch
import transformers

from longlora_jax.config import ATTENTION_TARGETS
from longlora_jax.model.decoder import Llama
from longlora_jax.weights.peft import open_peft
from longlora_jax.weights.rules import build_params

V = 61
TOKENS = np.random.default_rng(0).integers(0, V, (2, 40))
LORA_PLUS = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
# Logits are about 1. Either side is up to 5e-5 off the same model in float64; a mistake shows as 0.1 and more.
CLOSE = {"rtol": 0, "atol": 1e-4}
BASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "head_dim": 10},
}


def randomize(parameters, seed=0):
    """Every parameter random: matrices about 0, norms about 1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in parameters:
            x = torch.from_numpy(rng.normal(size=tuple(parameter.shape)).astype(np.float32))
            parameter.copy_(1 + 0.2 * x if parameter.ndim == 1 else 0.25 * x)


def tiny_base(**options):
    """A random LLaMA of transformers with grouped heads whose sizes cannot be mistaken for each other."""
    sizes = {
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options)).eval()
    randomize(model.parameters())
    return model


def load_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


@functools.cache
def forward(config, lora):
    model = Llama(config, lora=lora)
    # Without the optimizations that take most of the time of so small a model.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(lambda params: model.apply({"params": params}, jnp.asarray(TOKENS)), compiler_options=quick)


def our_logits(config, params, lora=None):
    return np.asarray(forward(config, lora)(params))


def merged_logits(folder, **options):
    config, table, _ = open_peft(str(folder), **options)
    return our_logits(config, build_params(config, table))


def adapt(base, folder, *, resize=0, **settings):
    """Real PEFT: adapts a base with random matrices, saves the adapter, returns the model."""
    model = load_base(base)
    if resize:
        model.resize_token_embeddings(V + resize, mean_resizing=False)
    settings = {"r": 3, "lora_alpha": 8, "target_modules": list(ATTENTION_TARGETS), "lora_dropout": 0.1, **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    randomize((p for n, p in model.named_parameters() if p.requires_grad or "modules_to_save" in n), seed=1)
    model.save_pretrained(folder)
    return model


def edit_settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, **changes):
    """Replaces tensors, or drops them (None); names without their beginning."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    for name, tensor in changes.items():
        name = next((key for key in tensors if key.endswith(name)), f"base_model.model.{name}")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    safetensors.save_file(tensors, path)
