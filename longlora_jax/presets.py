"""Shapes of the paper's models and its training recipe; the files in configs/ say only what differs."""

from longlora_jax.attention.rope import RopeScaling
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


def llama31_8b() -> ModelConfig:
    """Llama 3.1 8B: 8,030,261,248 parameters, a window of 131,072 by its own scaling from 8,192."""
    return ModelConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        tie_word_embeddings=False,
        bos_token_id=128_000,
        eos_token_id=128_001,
    )


def qwen25_7b() -> ModelConfig:
    """Qwen2.5 7B: 7,615,616,512 parameters, biases on q, k and v, a window of 32,768."""
    return ModelConfig(
        model_type="qwen2",
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        qkv_bias=True,
        bos_token_id=151_643,
        eos_token_id=151_645,
    )


def qwen3_8b() -> ModelConfig:
    """Qwen3 8B: 8,190,735,360 parameters, q and k normed head by head, a window of 40,960."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        qk_norm="head",
        bos_token_id=151_643,
        eos_token_id=151_645,
    )


def mistral_7b() -> ModelConfig:
    """Mistral 7B v0.3: 7,248,023,552 parameters, no sliding window, a window of 32,768."""
    return ModelConfig(
        model_type="mistral",
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-5,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def gemma3_4b() -> ModelConfig:
    """The text model of Gemma 3 4B: 3,880,263,168 parameters, five of six layers in windows of 1,024."""
    return ModelConfig(
        model_type="gemma3_text",
        vocab_size=262_208,
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        rope_scaling=RopeScaling(rope_type="linear", factor=8.0, original_max_position_embeddings=16_384),
        rope_local_base_freq=10_000.0,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        norm="rms_unit_offset",
        norm_placement="both",
        qk_norm="head",
        sliding_window=1024,
        layer_types=tuple("full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)),
        embedding_multiplier=2560**0.5,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


def pythia_1b() -> ModelConfig:
    """Pythia 1B (GPT-NeoX): 1,011,781,632 parameters, a window of 2,048."""
    return ModelConfig(
        model_type="gpt_neox",
        vocab_size=50_304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=256,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        partial_rotary_factor=0.25,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
        gated_mlp=False,
        norm="layer",
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
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
