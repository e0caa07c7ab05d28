"""LLaMA-2 70B to a window of 32,768 tokens, as in the paper.

Command:   python train.py --config configs/70b_32k.py --workdir runs/70b_32k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-70b-hf (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  the paper used 8 x A100-80GB; rows are cut over all devices (mesh.fsdp).
           4 chips of TPU v5p hold it with the sequence cut over them instead of the rows:
           --config.mesh.fsdp=1 --config.mesh.context=4 --config.accumulation=64
Expected:  no perplexity is quoted here; the paper's abstract has 70B at 32k on one machine of 8 x A100.
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama2_70b, longlora


def get_config() -> Config:
    """The paper's recipe at 32,768 tokens: groups of 8,192, positions interpolated by 8."""
    return longlora(llama2_70b(), init_from="meta-llama/Llama-2-70b-hf", seq_len=32_768, learning_rate=1e-5)
