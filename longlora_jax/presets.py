"""Shapes of the paper's models and its training recipe; the files in configs/ say only what differs."""

from longlora_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimConfig


def _llama2(**sizes) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        head_dim=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )


def llama2_7b() -> ModelConfig:
    """LLaMA-2 7B: 6,738,415,616 parameters, a window of 4,096."""
    return _llama2(
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )


def llama2_13b() -> ModelConfig:
    """LLaMA-2 13B: 13,015,864,320 parameters, a window of 4,096."""
    return _llama2(
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )


def llama2_70b() -> ModelConfig:
    """LLaMA-2 70B: 68,976,648,192 parameters, 8 kv heads, a window of 4,096."""
    return _llama2(
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M-Instruct: 134,515,008 parameters, tied embeddings, a window of 8,192."""
    return ModelConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def longlora(model: ModelConfig, *, init_from: str, seq_len: int, learning_rate: float = 2e-5) -> Config:
    """The paper's continued pre-training: S2-Attn at G = T/4, LoRA r=8 + embedding + norms, linear interpolation.

    64 rows an update, 1,000 updates, AdamW (0.9, 0.95), constant rate after 20 warm-up steps, RedPajama joined
    with EOS and cut. learning_rate: 2e-5 for 7B and 13B, 1e-5 for 70B. arXiv:2309.12307, section 4.1.
    """
    return Config(
        init_from=init_from,
        model=model,
        seq_len=seq_len,
        steps=1000,
        batch_size=64,
        accumulation=8,
        data=DataConfig(source="hf", path="togethercomputer/RedPajama-Data-1T-Sample"),
        optim=OptimConfig(learning_rate=learning_rate),
    )


def long_alpaca(model: ModelConfig, *, init_from: str, seq_len: int, steps: int) -> Config:
    """The supervised fine-tuning of the original's README: LongAlpaca-12k on a chat model, LongLoRA's Llama-2 prompt.

    8 rows an update, 2e-5 constant after 20 warm-up steps, LoRA r=8 + embedding + norms. There a row is one example,
    here as many as fit, short ones under full attention; the loss is on answers alone in both.
    """
    return Config(
        init_from=init_from,
        model=model,
        seq_len=seq_len,
        steps=steps,
        batch_size=8,
        attention=AttentionConfig(full_below=seq_len // 16),
        data=DataConfig(source="hf", path="Yukang/LongAlpaca-12k", task="sft", prompt="alpaca", packing="best_fit"),
        optim=OptimConfig(learning_rate=2e-5),
    )
