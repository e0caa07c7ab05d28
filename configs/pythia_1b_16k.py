"""Pythia 1B to a window of 16,384 tokens.

Command:   python train.py --config configs/pythia_1b_16k.py --workdir runs/pythia_1b_16k --config.init_from=DIR
           DIR is a local folder of EleutherAI/pythia-1b (safetensors).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  8 x H100: 2.9 of 75.1 GiB a device by the planner's formula, rows cut over them as they are.
Expected:  no figure is quoted: nobody has published this extension.
"""

from longlora_jax.config import Config
from longlora_jax.presets import longlora, pythia_1b


def get_config() -> Config:
    """The paper's recipe at 16,384 tokens: groups of 4,096, positions interpolated by 8."""
    return longlora(pythia_1b(), init_from="EleutherAI/pythia-1b", seq_len=16_384)
