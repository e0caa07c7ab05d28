"""The decoder and its parts: blocks, adapters, the KV cache, losses, and which weights train."""
