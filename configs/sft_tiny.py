"""The shipped LLaMA (window 256, no chat template) fine-tuned on questions of yours at 1,024 tokens, on a laptop.

Command:   python train.py --config configs/sft_tiny.py --workdir runs/sft_tiny --config.data.path=questions.jsonl
           A line of questions.jsonl is {"instruction": ..., "output": ...}; the prompt around it takes 197 tokens.
Hardware:  2 CPU cores, 2 GB of memory.
Expected:  it learns to answer in the form of the answers given; it knows Python's standard library and nothing else.
"""

from longlora_jax.config import AttentionConfig, Config, DataConfig, MeshConfig, OptimConfig, RopeConfig


def get_config() -> Config:
    """S2-Attn with G = T/4, LoRA + embedding + norms, examples packed whole and answers alone scored."""
    return Config(
        init_from="models/tiny-python-llama",
        seq_len=1024,
        steps=100,
        batch_size=4,
        rope=RopeConfig(type="yarn"),
        attention=AttentionConfig(full_below=256),
        data=DataConfig(source="jsonl", path="questions.jsonl", task="sft", prompt="alpaca", packing="best_fit"),
        optim=OptimConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=10, end_ratio=0.1),
        mesh=MeshConfig(fsdp=1),
        dtype="float32",
        remat="none",
    )
