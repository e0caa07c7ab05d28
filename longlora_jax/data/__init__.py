"""Training data: documents, their tokens, windows and batches. Imports neither jax nor torch."""

from longlora_jax.data.loader import Batches, as_batch, batches, in_order
from longlora_jax.data.pack import pack_documents
from longlora_jax.data.source import (
    HELD_OUT,
    Document,
    is_held_out,
    read_documents,
    read_python,
    read_text,
    standard_library,
)
from longlora_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenize_documents

__all__ = [
    "HELD_OUT",
    "Batches",
    "Document",
    "Tokenizer",
    "as_batch",
    "batches",
    "in_order",
    "is_held_out",
    "load_tokenizer",
    "pack_documents",
    "read_documents",
    "read_python",
    "read_text",
    "standard_library",
    "tokenize_documents",
]
