"""The families of models: what each one's config.json and files have otherwise than a LLaMA's, a row of a table each.

All are the same decoder (model/decoder.py) with other fields of ModelConfig. To add a family, add its row here; where
it stores weights under other names or several in one, its row says so too (weights/layouts.py does the rest).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.family_keys import (
    Raw,
    all_sliding,
    partial_rotary,
    reads_gemma1,
    reads_gemma2,
    reads_gemma3,
    reads_phi3,
    reads_smollm3,
    reads_stablelm,
    upper_layers_slide,
    writes_all_sliding,
    writes_gemma2,
    writes_gemma3,
    writes_gpt_neox,
    writes_phi3,
    writes_smollm3,
    writes_stablelm,
    writes_upper_layers,
)


@dataclass(frozen=True)
class Fused:
    """Several of our matrices stored as one: its name and theirs, within a block ("self_attn.qkv_proj").

    by_head: its rows go head by head, each head's share of every part in turn; else one part after another.
    """

    name: str
    parts: tuple[str, ...]
    by_head: bool = False


def _nothing(raw: Raw) -> Raw:
    return {}


def _writes_nothing(config: ModelConfig) -> Raw:
    return {}


@dataclass(frozen=True)
class Family:
    """What a model_type has otherwise than a LLaMA.

    architecture: its class in transformers, which config.json names. defaults: what transformers takes a key to be
    where config.json leaves it out. always: fields of ModelConfig that all of its models have. same: keys that are
    fields of ModelConfig under their own name. reads(raw) gives further fields of ModelConfig, writes(config)
    further keys of config.json. known: keys that these two take care of. rope_type: what rope.type=auto makes of a
    model that was never scaled. longrope_only: transformers computes no other scaling of it. synonyms: {theirs: ours}
    of keys that its config.json has under another name; ours is none of its keys. renames: parts of names in
    its files, {ours: theirs}; fused: what they store in one; each_head: {ours: theirs} of a norm that they store head
    by head, as "{theirs}.norms.{head}".
    """

    architecture: str
    defaults: Raw = field(default_factory=dict)
    always: Raw = field(default_factory=dict)
    same: tuple[str, ...] = ()
    reads: Callable[[Raw], Raw] = _nothing
    writes: Callable[[ModelConfig], Raw] = _writes_nothing
    known: tuple[str, ...] = ()
    rope_type: str = "linear"
    longrope_only: bool = False
    synonyms: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    each_head: Mapping[str, str] = field(default_factory=dict)


BIASES = ("attention_bias", "mlp_bias")
_COMMON: Raw = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_GEMMA_DEFAULTS: Raw = {
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA2: Raw = {"norm": "rms_unit_offset", "norm_placement": "both"}
_QWEN_DEFAULTS: Raw = {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", same=BIASES),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        reads=all_sliding,
        writes=writes_all_sliding,
        known=("sliding_window",),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _QWEN_DEFAULTS,
        always={"qkv_bias": True},
        reads=upper_layers_slide,
        writes=writes_upper_layers,
        known=_WINDOWS,
        rope_type="yarn",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _QWEN_DEFAULTS | {"head_dim": 128},
        always={"qk_norm": "head"},
        same=("attention_bias",),
        reads=upper_layers_slide,
        writes=writes_upper_layers,
        known=_WINDOWS,
        rope_type="yarn",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000, "pad_token_id": 32000},
            "partial_rotary_factor": 1.0,
        },
        reads=reads_phi3,
        writes=writes_phi3,
        known=("sliding_window", "partial_rotary_factor"),
        longrope_only=True,
        fused=(
            Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            **{"max_position_embeddings": 32768, "tie_word_embeddings": True, "num_key_value_heads": 4},
            "rope_theta": 2_000_000.0,
            **{"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
        },
        same=BIASES,
        reads=reads_smollm3,
        writes=writes_smollm3,
        known=(*_WINDOWS, "no_rope_layers", "no_rope_layer_interval"),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"rms_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279},
        always={"norm_placement": "post", "qk_norm": "projection"},
        same=("attention_bias",),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        dict.fromkeys(_GRANITE, 1.0),
        same=(*BIASES, *_GRANITE),
        known=_GRANITE,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _GEMMA_DEFAULTS,
        always={"norm": "rms_unit_offset"},
        same=("attention_bias",),
        reads=reads_gemma1,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
            **{"sliding_window": 4096, "query_pre_attn_scalar": 256},
            **{"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        },
        always=_GEMMA2,
        same=("attention_bias", "final_logit_softcapping", "attn_logit_softcapping"),
        reads=reads_gemma2,
        writes=writes_gemma2,
        known=(*_WINDOWS, "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        synonyms={"hidden_activation": "hidden_act"},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
            **{"max_position_embeddings": 131072, "sliding_window": 4096, "query_pre_attn_scalar": 256},
            **{"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        },
        always=_GEMMA2 | {"qk_norm": "head"},
        same=("attention_bias",),
        reads=reads_gemma3,
        writes=writes_gemma3,
        known=(*_WINDOWS, "query_pre_attn_scalar", "rope_local_base_freq"),
        synonyms={"hidden_activation": "hidden_act"},
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        {
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
            **{"use_qkv_bias": False, "bos_token_id": 0, "eos_token_id": 0},
        },
        always={"norm": "layer"},
        reads=reads_stablelm,
        writes=writes_stablelm,
        known=("partial_rotary_factor", "qk_layernorm", "use_parallel_residual"),
        synonyms={"layer_norm_eps": "rms_norm_eps"},
        each_head={"self_attn.q_norm": "self_attn.q_layernorm", "self_attn.k_norm": "self_attn.k_layernorm"},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {
            **{"rms_norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25, "bos_token_id": 0},
            **{"attention_bias": True, "use_parallel_residual": True},
        },
        always={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
        same=("attention_bias", "use_parallel_residual"),
        reads=partial_rotary,
        writes=writes_gpt_neox,
        known=("partial_rotary_factor", "use_parallel_residual"),
        synonyms={
            "layer_norm_eps": "rms_norm_eps",
            "rotary_pct": "partial_rotary_factor",
            "rotary_emb_base": "rope_theta",
        },
        renames={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            "self_attn": "attention",
            "o_proj": "dense",
            "up_proj": "dense_h_to_4h",
            "down_proj": "dense_4h_to_h",
        },
        fused=(Fused("attention.query_key_value", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True),),
    ),
}
ACTIVATIONS = {
    **{name: "silu" for name in ("silu", "swish")},
    **{name: "gelu_pytorch_tanh" for name in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")},
    "gelu": "gelu",
}


def family_of(config: ModelConfig) -> Family:
    """The row of a model's family."""
    return FAMILIES[config.model_type]


def defaults_of(model_type: str) -> Raw:
    """What transformers takes every key to be where a config.json of that model_type leaves it out."""
    return _COMMON | FAMILIES[model_type].defaults
