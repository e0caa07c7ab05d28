"""The main job, small: the shipped LLaMA (window 256) extended 8 times to 2,048 tokens by LongLoRA, on a laptop.

Command:   make quickstart, or python train.py --config configs/quickstart.py --workdir runs/quickstart/extended
Hardware:  2 CPU cores, 2 GB of memory.
Expected:  see README.md: the table that make quickstart prints. docs/quickstart.md has what more steps bring.
"""

from longlora_jax.config import AttentionConfig, Config, DataConfig, MeshConfig, OptimConfig, RopeConfig
from longlora_jax.data import HELD_OUT


def get_config() -> Config:
    """S2-Attn with G = T/4, LoRA + embedding + norms, and a last stretch under full attention."""
    return Config(
        init_from="models/tiny-python-llama",
        seq_len=2048,
        steps=60,
        batch_size=2,
        rope=RopeConfig(type="yarn"),
        attention=AttentionConfig(full_last=0.1),
        data=DataConfig(source="python", hold_out=HELD_OUT),
        optim=OptimConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=10, end_ratio=0.1),
        mesh=MeshConfig(fsdp=1),  # two rows a step are work for one device
        dtype="float32",
        remat="dots",
        save_every=40,
    )
