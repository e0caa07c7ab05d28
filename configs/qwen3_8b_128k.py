"""Qwen3 8B to a window of 131,072 tokens.

Command:   python train.py --config configs/qwen3_8b_128k.py --workdir runs/qwen3_8b_128k --config.init_from=DIR
           DIR is a local folder of Qwen/Qwen3-8B-Base (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  8 chips of TPU v5e: 7.7 of 15.75 GiB a device, compiled, the sequence cut over them:
           --config.mesh.fsdp=1 --config.mesh.context=8 --config.accumulation=64 --config.remat=offload
Expected:  no figure is quoted: nobody has published this extension.
"""

from longlora_jax.config import Config
from longlora_jax.presets import longlora, qwen3_8b


def get_config() -> Config:
    """The paper's recipe at 131,072 tokens: groups of 32,768, YaRN x4, as its authors publish."""
    return longlora(qwen3_8b(), init_from="Qwen/Qwen3-8B-Base", seq_len=131_072)
