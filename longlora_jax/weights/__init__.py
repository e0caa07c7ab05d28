"""Checkpoints in and out: one table of weights, Hugging Face, PEFT and GGUF formats, and any folder as a model."""
