"""A page in the browser to ask questions about a long document; `python -m longlora_jax.chat --model DIR`."""
