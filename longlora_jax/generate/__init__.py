"""Text from a model: generate() for one call, session.py for a conversation, __main__.py for the command."""

from longlora_jax.generate.generation import generate, load_for_generation

__all__ = ["generate", "load_for_generation"]
