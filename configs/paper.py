"""One row of the paper's tables in miniature: the shipped LLaMA (window 256), extended 4 times to 1,008 tokens.

Command:   python -m longlora_jax.paper, which changes mode, pattern, group, rank or scaling for each row; or this row
           alone: python train.py --config configs/paper.py --workdir runs/paper_row
Hardware:  2 CPU cores, 2 GB of memory.
Expected:  see docs/paper.md.
"""

from longlora_jax.config import Config, DataConfig, MeshConfig, OptimConfig, RopeConfig
from longlora_jax.data import HELD_OUT


def get_config() -> Config:
    """LongLoRA as the paper trains it, with linear interpolation; 1,008 is a multiple of 24: every ratio is a group."""
    return Config(
        init_from="models/tiny-python-llama",
        seq_len=1008,
        steps=200,
        rope=RopeConfig(type="linear"),
        data=DataConfig(source="python", hold_out=HELD_OUT),
        optim=OptimConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20, end_ratio=0.1),
        mesh=MeshConfig(fsdp=1),  # one row a step is work for one device
        dtype="float32",
        remat="none",
        save_every=1000,
        keep_checkpoints=1,
    )
