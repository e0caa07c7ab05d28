"""Training data: documents, their tokens, windows and batches. Imports neither jax nor torch."""

from longlora_jax.data.documents import Documents, InMemory, Memmap, open_documents
from longlora_jax.data.loader import Batches, Joined, as_batch, batches, in_order
from longlora_jax.data.pack import Packing, Windows, pack, pack_documents, plan_packing
from longlora_jax.data.prepared import Prepared
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
    "Documents",
    "InMemory",
    "Joined",
    "Memmap",
    "Packing",
    "Prepared",
    "Tokenizer",
    "Windows",
    "as_batch",
    "batches",
    "in_order",
    "is_held_out",
    "load_tokenizer",
    "open_documents",
    "pack",
    "pack_documents",
    "plan_packing",
    "read_documents",
    "read_python",
    "read_text",
    "standard_library",
    "tokenize_documents",
]
