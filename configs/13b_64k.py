"""LLaMA-2 13B to a window of 65,536 tokens, as in the paper.

Command:   python train.py --config configs/13b_64k.py --workdir runs/13b_64k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-13b-hf (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  the paper used 8 x A100-80GB; rows are cut over all devices (mesh.fsdp).
           8 chips of TPU v5e hold it with the sequence cut over them instead of the rows:
           --config.mesh.fsdp=1 --config.mesh.context=8 --config.accumulation=64
Expected:  no figure of its own in the paper; its 13B has proof-pile perplexity 2.32 at 32,768.
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama2_13b, longlora


def get_config() -> Config:
    """The paper's recipe at 65,536 tokens: groups of 16,384, positions interpolated by 16."""
    return longlora(llama2_13b(), init_from="meta-llama/Llama-2-13b-hf", seq_len=65_536)
