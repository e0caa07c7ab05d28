"""LLaMA-2 13B Chat fine-tuned on LongAlpaca at a window of 32,768 tokens.

Command:   python train.py --config configs/sft_13b_32k.py --workdir runs/sft_13b_32k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-13b-chat-hf (safetensors).
           The data come from the hub; a copy is --config.data.source=jsonl --config.data.path=LongAlpaca-12k.json.
Hardware:  the original used 8 x A100-80GB; rows are cut over all devices (mesh.fsdp). What fits on yours:
           python -m longlora_jax.plan --config configs/sft_13b_32k.py --topology v5p:2x2x2
Expected:  no score is printed for this row (the original's LongAlpaca-13B is full fine-tuning).
           4,500 updates are the original's 3 epochs of 12,000 rows, one example a row. Packed, it is more
           epochs: the run says how many before it begins, and --config.steps makes them fewer.
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama2_13b, long_alpaca


def get_config() -> Config:
    """The original's recipe at 32,768 tokens: groups of 8,192, positions interpolated by 8."""
    return long_alpaca(llama2_13b(), init_from="meta-llama/Llama-2-13b-chat-hf", seq_len=32_768, steps=4500)
