"""The small LLaMA that this repository ships, from nothing: 5,770,496 parameters on Python's standard library.

Command:   python train.py --config configs/tiny_base.py --workdir runs/tiny_base
Hardware:  2 CPU cores and 2.2 GB of memory, an hour.
Expected:  eval/loss 3.10 (perplexity 22.2) after 4,000 steps with the library of CPython 3.11.
"""

from longlora_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
)
from longlora_jax.data import HELD_OUT

TOKENIZER = "models/tiny-python-llama"


def get_config() -> Config:
    """A window of 256 tokens, every weight trained, float32."""
    return Config(
        seq_len=256,
        steps=4000,
        batch_size=16,
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
        mode="full",
        attention=AttentionConfig(pattern="full"),
        data=DataConfig(source="python", tokenizer=TOKENIZER, hold_out=HELD_OUT),
        eval=EvalConfig(every=200, max_windows=256, data=DataConfig(source="python", only=HELD_OUT)),
        optim=OptimConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=100, end_ratio=0.02),
        dtype="float32",
        remat="none",
        log_every=10,
        save_every=200,
    )
