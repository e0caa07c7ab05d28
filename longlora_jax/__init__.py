"""LongLoRA in JAX: longer context windows for LLaMA models. Names are imported when first used."""

import importlib

_HOME = {
    "Llama": "model",
    "LoraConfig": "config",
    "ModelConfig": "config",
    "Pattern": "patterns",
    "RopeScaling": "rope",
    "TrainState": "trainer",
    "allowed": "patterns",
    "apply_rope": "rope",
    "attend": "attention",
    "combine": "trainable",
    "cross_entropy": "losses",
    "eval_step": "trainer",
    "generate": "generate",
    "load_hf": "hf",
    "load_peft": "peft",
    "make_mesh": "sharding",
    "merge_lora": "lora",
    "pack_documents": "data",
    "partition": "trainable",
    "plan": "plan",
    "save_hf": "hf",
    "save_peft": "peft",
    "train_step": "trainer",
    "trainable_mask": "trainable",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    # Not at the top: hf.py and data/ work in processes that must not load jax.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
