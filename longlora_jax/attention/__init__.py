"""Attention patterns as predicates, RoPE, and the kernels that compute them, on one device or over a mesh."""
