"""LLaMA-2 13B to a window of 8,192 tokens, as in the paper.

Command:   python train.py --config configs/13b_8k.py --workdir runs/13b_8k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-13b-hf (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  the paper used 8 x A100-80GB; rows are cut over all devices (mesh.fsdp).
Expected:  no figure of its own in the paper; a first step towards the longer windows.
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama2_13b, longlora


def get_config() -> Config:
    """The paper's recipe at 8,192 tokens: groups of 2,048, positions interpolated by 2."""
    return longlora(llama2_13b(), init_from="meta-llama/Llama-2-13b-hf", seq_len=8_192)
