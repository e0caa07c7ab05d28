"""LLaMA-2 7B to a window of 32,768 tokens on one card of 24 GB: the paper's recipe over a base in four bits.

Command:   python train.py --config configs/7b_32k_nf4.py --workdir runs/7b_32k_nf4 --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-7b-hf (safetensors), or one that bitsandbytes quantized.
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  one RTX 3090 or 4090, one row at a time: 18.4 GiB by the planner's formula, of which 3.6 are the base (12.4
           with --config.remat=offload). XLA_PYTHON_CLIENT_MEM_FRACTION=.95 gives a run the card's memory.
Expected:  not run. The unquantized recipe gives PG19 validation perplexity 8.12 at 32,768 (paper).
"""

import dataclasses

from longlora_jax.config import Config
from longlora_jax.presets import llama2_7b, longlora


def get_config() -> Config:
    """The paper's recipe at 32,768 tokens, its frozen matrices in NF4."""
    config = longlora(llama2_7b(), init_from="meta-llama/Llama-2-7b-hf", seq_len=32_768)
    return dataclasses.replace(config, base_quantization="nf4", accumulation=64)
