"""The architectures of GGUF files: what llama.cpp writes otherwise than for a LLaMA, a row of a table each.

Facts of its convert_hf_to_gguf.py (names of keys and tensors, what is done to values on the way) and of its
src/models/ (what it takes a key to be that a file lacks). To add an architecture of a family that weights/families.py
has, add its row here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from longlora_jax.model_config import FULL_ATTENTION, SLIDING_ATTENTION

Raw = dict[str, Any]
Own = Callable[..., Any]  # own(key, default): the value of a key that begins with the architecture's name


def _nothing(*_: Any) -> Raw:
    return {}


@dataclass(frozen=True)
class Architecture:
    """What files of one general.architecture have otherwise than a LLaMA's.

    model_type: the family of FAMILIES; windowed: its family where the file has a sliding window. pairs: q and k turn
    neighbours of a head, for which the converter has reordered their rows. offset: what it has added to the scales of
    all norms. names: parts of a block otherwise than LLaMA's, {theirs: ours}. epsilon: the key of the norms' epsilon.
    numbers: keys that hold numbers of config.json, {key: config.json's name}, 0 meaning "not set"; defaults: what these
    are where the file does not say. switches: keys that must say true or false, as config.json calls them.
    reads(own, raw) gives further keys of config.json; known: the keys that it takes care of, or that say nothing.
    neutral: as NEUTRAL, of this architecture alone. tell(shapes) gives the keys of config.json that tensors tell.
    """

    model_type: str
    windowed: str = ""
    pairs: bool = False
    offset: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)
    epsilon: str = "attention.layer_norm_rms_epsilon"
    numbers: Mapping[str, str] = field(default_factory=dict)
    switches: tuple[str, ...] = ()
    defaults: Raw = field(default_factory=dict)
    reads: Callable[[Own, Raw], Raw] = _nothing
    known: tuple[str, ...] = ()
    neutral: Raw = field(default_factory=dict)
    tell: Callable[[Mapping[str, tuple[int, ...]]], Raw] = _nothing


TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What a file has as one tensor, one part's rows after the other's.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FOUR_NORMS = {**_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
_WINDOW = "attention.sliding_window"
_PATTERN = "attention.sliding_window_pattern"
# Keys that make another model of any of these, and what they are where they do not; None: not there.
# An architecture's own numbers and known keys are exempt.
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), 1.0),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attention.clamp_kqv"), 0.0),
    **dict.fromkeys(("attention.max_alibi_bias", "attention.temperature_scale"), 0.0),
    **dict.fromkeys((_PATTERN, "rope.freq_base_swa", "attention.key_length_swa", "rope.dimension_count_swa"), None),
    **dict.fromkeys(("attention.rope_pattern", "rope.dimension_sections", "deepstack_mapping"), None),
    "attention.causal": True,
    "use_parallel_residual": False,
}
SCALE_OF_HEAD = "attention.scale"  # its neutral value is 1 / sqrt(head_dim)


def _kinds(own: Own, layers: int, every: int) -> list[str]:
    """layer_types: all but the last of `every` layers slide, unless the file has a pattern of its own."""
    pattern = own(_PATTERN, every)
    if not isinstance(pattern, list):
        pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]
    return [SLIDING_ATTENTION if slides else FULL_ATTENTION for slides in pattern]


def _query_scalar(raw: Raw, layers_of_largest: int) -> Raw:
    """query_pre_attn_scalar, which no key holds: llama.cpp knows the largest model by its number of layers."""
    if raw["num_hidden_layers"] == layers_of_largest:
        return {"query_pre_attn_scalar": raw["hidden_size"] // raw["num_attention_heads"]}
    return {"query_pre_attn_scalar": raw["head_dim"]}


def _reads_gemma2(own: Own, raw: Raw) -> Raw:
    return {"layer_types": _kinds(own, raw["num_hidden_layers"], 2)} | _query_scalar(raw, 46)


def _reads_gemma3(own: Own, raw: Raw) -> Raw:
    layers = raw["num_hidden_layers"]
    kinds = _kinds(own, layers, 6) if own(_WINDOW, 0) else [FULL_ATTENTION] * layers
    return {"layer_types": kinds} | _query_scalar(raw, 62)


def _stablelm_tells(shapes: Mapping[str, tuple[int, ...]]) -> Raw:
    return {
        "use_parallel_residual": not any(".post_attention_layernorm." in name for name in shapes),
        "qk_layernorm": any(".self_attn.q_norm." in name for name in shapes),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", windowed="mistral", pairs=True, numbers={_WINDOW: "sliding_window"}),
    "smollm3": Architecture("smollm3", pairs=True),
    "granite": Architecture(
        "granite",
        pairs=True,
        numbers={
            "logit_scale": "logits_scaling",
            "residual_scale": "residual_multiplier",
            "embedding_scale": "embedding_multiplier",
            SCALE_OF_HEAD: "attention_multiplier",
        },
        neutral={"rope.scaling.finetuned": True},  # False: a Granite without rotary embeddings
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3", names={"ffn_up": "mlp.gate_up_proj"}, numbers={_WINDOW: "sliding_window"}),
    "olmo2": Architecture("olmo2", names=_POST_NORMS),
    "gemma": Architecture("gemma", offset=1.0),
    "gemma2": Architecture(
        "gemma2",
        offset=1.0,
        names=_FOUR_NORMS,
        numbers={
            _WINDOW: "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        defaults={"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        reads=_reads_gemma2,
        known=(_PATTERN,),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        offset=1.0,
        names=_FOUR_NORMS,
        numbers={_WINDOW: "sliding_window", "rope.freq_base_swa": "rope_local_base_freq"},
        defaults={"sliding_window": 4096, "rope_local_base_freq": 10000.0},
        reads=_reads_gemma3,
        known=(_PATTERN,),
    ),
    "stablelm": Architecture(
        "stablelm",
        epsilon="attention.layer_norm_epsilon",
        known=("use_parallel_residual",),  # true by default in old converters: the tensors of a block tell
        tell=_stablelm_tells,
    ),
    "gptneox": Architecture(
        "gpt_neox",
        epsilon="attention.layer_norm_epsilon",
        switches=("use_parallel_residual",),
    ),
}
