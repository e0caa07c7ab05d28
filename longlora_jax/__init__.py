"""LongLoRA in JAX: longer context windows for LLaMA models. Names are imported when first used."""

import importlib

_HOME = {
    "Llama": "model.decoder",
    "LoraConfig": "config",
    "ModelConfig": "config",
    "Pattern": "attention.patterns",
    "RopeScaling": "attention.rope",
    "TrainState": "training.step",
    "allowed": "attention.patterns",
    "apply_rope": "attention.rope",
    "attend": "attention.attend",
    "combine": "model.trainable",
    "cross_entropy": "model.losses",
    "eval_step": "training.step",
    "load_hf": "weights.hf",
    "load_peft": "weights.peft",
    "make_mesh": "parallel.sharding",
    "merge_lora": "model.lora",
    "pack_documents": "data",
    "partition": "model.trainable",
    "save_hf": "weights.hf",
    "save_peft": "weights.peft_export",
    "train_step": "training.step",
    "trainable_mask": "model.trainable",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    # Not at the top: weights/hf.py and data/ work in processes that must not load jax.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
