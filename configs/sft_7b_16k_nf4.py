"""LLaMA-2 7B Chat fine-tuned on LongAlpaca at a window of 16,384 tokens on one card of 24 GB, its base in four bits.

Command:   python train.py --config configs/sft_7b_16k_nf4.py --workdir runs/sft_7b_16k_nf4 --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-7b-chat-hf (safetensors), or one that bitsandbytes quantized.
           The data come from the hub; a copy is --config.data.source=jsonl --config.data.path=LongAlpaca-12k.json.
Hardware:  one RTX 3090, RTX 4090, L4 or A10G, one row at a time: 12.4 GiB by the planner's formula, of which 3.6 are
           the base.
Expected:  not run; no score is printed for this row (see configs/sft_7b_16k.py).
"""

import dataclasses

from longlora_jax.config import Config
from longlora_jax.presets import llama2_7b, long_alpaca


def get_config() -> Config:
    """The original's recipe at 16,384 tokens, its frozen matrices in NF4."""
    config = long_alpaca(llama2_7b(), init_from="meta-llama/Llama-2-7b-chat-hf", seq_len=16_384, steps=7500)
    return dataclasses.replace(config, base_quantization="nf4", accumulation=8)
