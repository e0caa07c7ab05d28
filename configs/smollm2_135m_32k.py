"""SmolLM2-135M-Instruct, a real LLaMA with a window of 8,192, to 32,768 tokens.

Command:   as in configs/smollm2_135m_16k.py, with --config configs/smollm2_135m_32k.py
Hardware:  any GPU or TPU chip with 16 GB.
Expected:  perplexity of novels at 32,768 is 25.50, where the base has 26.12 at its own 8,192 and untrained YaRN 31.73
           at 32,768 (docs/measured.md).
"""

from configs import smollm2_135m_16k
from longlora_jax.config import Config


def get_config() -> Config:
    """The recipe for 16,384 tokens at twice the length: groups of 8,192."""
    config = smollm2_135m_16k.get_config()
    config.seq_len, config.batch_size, config.accumulation = 32_768, 1, 1
    return config
