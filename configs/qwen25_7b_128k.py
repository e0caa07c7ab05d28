"""Qwen2.5 7B to a window of 131,072 tokens.

Command:   python train.py --config configs/qwen25_7b_128k.py --workdir runs/qwen25_7b_128k --config.init_from=DIR
           DIR is a local folder of Qwen/Qwen2.5-7B (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  8 x H100: 15.4 of 75.1 GiB a device by the planner's formula, the sequence cut over four of them:
           --config.mesh.fsdp=2 --config.mesh.context=4 --config.accumulation=32
Expected:  no figure is quoted: nobody has published this extension.
"""

from longlora_jax.config import Config
from longlora_jax.presets import longlora, qwen25_7b


def get_config() -> Config:
    """The paper's recipe at 131,072 tokens: groups of 32,768, YaRN x4, as its authors publish."""
    return longlora(qwen25_7b(), init_from="Qwen/Qwen2.5-7B", seq_len=131_072)
