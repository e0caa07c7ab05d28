"""Llama 3.1 8B to a window of 262,144 tokens.

Command:   python train.py --config configs/llama31_8b_256k.py --workdir runs/llama31_8b_256k --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-3.1-8B (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  8 x H100: 16.3 of 75.1 GiB a device by the planner's formula, the sequence cut over them:
           --config.mesh.fsdp=1 --config.mesh.context=8 --config.accumulation=64
Expected:  no figure is quoted: nobody has published this extension.
"""

from longlora_jax.config import Config
from longlora_jax.presets import llama31_8b, longlora


def get_config() -> Config:
    """The paper's recipe at 262,144 tokens: groups of 65,536, its own kind of scaling, from x8 to x16."""
    return longlora(llama31_8b(), init_from="meta-llama/Llama-3.1-8B", seq_len=262_144)
