"""The control of configs/quickstart.py: the same scaling, recipe and training tokens, but at the old window of 256.

Command:   make quickstart, or python train.py --config configs/quickstart_control.py --workdir runs/quickstart/control
Hardware:  2 CPU cores, 2 GB of memory.
Expected:  see README.md. Its gain over untrained YaRN is due to more training; any further gain of LongLoRA is due to
           the longer window.
"""

from configs import quickstart
from longlora_jax.config import AttentionConfig, Config, RopeConfig


def get_config() -> Config:
    """As the quickstart, but every row is cut into eight windows of 256 under full attention."""
    config = quickstart.get_config()
    rows = config.seq_len // 256
    config.batch_size *= rows
    config.seq_len = 256
    config.rope = RopeConfig(type=config.rope.type, factor=rows)
    config.attention = AttentionConfig(pattern="full")
    return config
