"""LLaMA-2 7B to a window of 100,000 tokens, as in the paper.

Command:   python train.py --config configs/7b_100k.py --workdir runs/7b_100k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-7b-hf (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  the paper used 8 x A100-80GB; rows are cut over all devices (mesh.fsdp).
           8 chips of TPU v5e hold it with the sequence cut over them instead of the rows:
           --config.mesh.fsdp=1 --config.mesh.context=8 --config.accumulation=64
Expected:  proof-pile perplexity 2.52 at 100,000 (paper).
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama2_7b, longlora


def get_config() -> Config:
    """The paper's recipe at 100,000 tokens: groups of 25,000, positions interpolated by 25."""
    return longlora(llama2_7b(), init_from="meta-llama/Llama-2-7b-hf", seq_len=100_000)
