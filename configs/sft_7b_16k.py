"""LLaMA-2 7B Chat fine-tuned on LongAlpaca at a window of 16,384 tokens.

Command:   python train.py --config configs/sft_7b_16k.py --workdir runs/sft_7b_16k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-7b-chat-hf (safetensors).
           The data come from the hub; a copy is --config.data.source=jsonl --config.data.path=LongAlpaca-12k.json.
Hardware:  the original used 8 x A100-80GB; rows are cut over all devices (mesh.fsdp). What fits on yours:
           python -m longlora_jax.plan --config configs/sft_7b_16k.py --topology v5p:2x2x2
Expected:  no score is printed for this row (the original's LongAlpaca-7B is full fine-tuning at 32,768).
           7,500 updates are the original's 5 epochs of 12,000 rows, one example a row. Packed, it is more
           epochs: the run says how many before it begins, and --config.steps makes them fewer.
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama2_7b, long_alpaca


def get_config() -> Config:
    """The original's recipe at 16,384 tokens: groups of 4,096, positions interpolated by 4."""
    return long_alpaca(llama2_7b(), init_from="meta-llama/Llama-2-7b-chat-hf", seq_len=16_384, steps=7500)
