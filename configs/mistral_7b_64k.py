"""Mistral 7B v0.3 to a window of 65,536 tokens.

Command:   python train.py --config configs/mistral_7b_64k.py --workdir runs/mistral_7b_64k --config.init_from=DIR
           DIR is a local folder of mistralai/Mistral-7B-v0.3 (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  8 x H100: 28.2 of 75.1 GiB a device by the planner's formula, rows cut over them as they are.
Expected:  no figure is quoted: nobody has published this extension.
"""

from longlora_jax.config import Config
from longlora_jax.presets import longlora, mistral_7b


def get_config() -> Config:
    """The paper's recipe at 65,536 tokens: groups of 16,384, positions interpolated by 2."""
    return longlora(mistral_7b(), init_from="mistralai/Mistral-7B-v0.3", seq_len=65_536)
