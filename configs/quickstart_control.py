"""The control of configs/quickstart.py: the same training tokens and recipe at the old window of 256.

Command:   make quickstart, or python train.py --config configs/quickstart_control.py --workdir runs/quickstart/control
Hardware:  2 CPU cores, 2 GB of memory.
Expected:  better than the base inside 256 tokens, no better beyond: what more training alone brings.
"""

from configs import quickstart
from longlora_jax.config import AttentionConfig, Config, RopeConfig


def get_config() -> Config:
    """As the quickstart, but every row is cut into windows of 256 under full attention, and rope stays as it is."""
    config = quickstart.get_config()
    rows = config.seq_len // 256
    config.batch_size *= rows
    config.seq_len = 256
    config.rope = RopeConfig(type="keep")
    config.attention = AttentionConfig(pattern="full")
    return config
