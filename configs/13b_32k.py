"""LLaMA-2 13B to a window of 32,768 tokens, as in the paper.

Command:   python train.py --config configs/13b_32k.py --workdir runs/13b_32k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-13b-hf (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  the paper used 8 x A100-80GB; rows are cut over all devices (mesh.fsdp).
           8 chips of TPU v5e hold it with the sequence cut over them instead of the rows:
           --config.mesh.fsdp=1 --config.mesh.context=8 --config.accumulation=64
Expected:  proof-pile perplexity 2.32 at 32,768 (paper).
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama2_13b, longlora


def get_config() -> Config:
    """The paper's recipe at 32,768 tokens: groups of 8,192, positions interpolated by 8."""
    return longlora(llama2_13b(), init_from="meta-llama/Llama-2-13b-hf", seq_len=32_768)
