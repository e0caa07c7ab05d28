"""The metadata of a GGUF file -> ModelConfig."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from longlora_jax.attention.rope import RopeScaling, rope_frequencies
from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.config_faults import config_faults, family_faults, refuse, rope_faults, shown
from longlora_jax.weights.families import FAMILIES, defaults_of
from longlora_jax.weights.gguf_families import ARCHITECTURES, NEUTRAL, SCALE_OF_HEAD, Architecture
from longlora_jax.weights.gguf_reader import Metadata
from longlora_jax.weights.hf_config import config_of

# One divisor for each rotary frequency; they describe the scaling and are no weights.
_FREQ_DIVISORS = "rope_freqs.weight"
_LONG_DIVISORS, _SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (_FREQ_DIVISORS, _LONG_DIVISORS, _SHORT_DIVISORS)
# Every Llama 3.1, 3.2 and 3.3; a GGUF file keeps only the divisors that follow from them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_WINDOW = "attention.sliding_window"
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

Shapes = Mapping[str, tuple[int, ...]]
Divisors = Mapping[str, np.ndarray]


def architecture_of(meta: Metadata) -> Architecture:
    """The row of a file's architecture; raises UserError for one that is not read."""
    name = meta.architecture
    if name not in ARCHITECTURES:
        what = ", a mixture of experts" if "moe" in name else ""
        refuse(
            meta.path,
            [f"general.architecture is {shown(name)}{what}, it must be one of {', '.join(ARCHITECTURES)}"],
        )
    return ARCHITECTURES[name]


def read_config(meta: Metadata, shapes: Shapes, divisors: Divisors) -> ModelConfig:
    """The config of a model from its keys, and from the tensors that it has.

    shapes: of its weights, by LLaMA's names, fused ones by the name that they have in FUSED. divisors: ROPE_TENSORS.
    Raises UserError, naming the keys at fault.
    """
    arch, faults = architecture_of(meta), []

    def size(key: str, default: Any = None) -> int:
        value = meta.own(key, default)
        if not (type(value) is int and value > 0):
            faults.append(f"{meta.key(key)} is {value!r}, it must be one whole number above 0")
            return 1
        return value

    def number(key: str, default: Any = None) -> float:
        value = meta.own(key, default)
        if not (type(value) in (int, float) and 0 < value < 1e30):
            faults.append(f"{meta.key(key)} is {value!r}, it must be a number above 0")
            return 1.0
        return _shortest(value)

    width, heads, window = size("embedding_length"), size("attention.head_count"), size("context_length")
    head_dim = size("attention.key_length", width // heads)
    kind = arch.windowed if arch.windowed and 0 < meta.own(_WINDOW, 0) < window else arch.model_type
    rotated = size("rope.dimension_count", head_dim)
    partial = "partial_rotary_factor" in FAMILIES[kind].known
    must = {"attention.value_length": size("attention.value_length", head_dim)}
    must |= {} if partial else {"rope.dimension_count": rotated}
    faults += [f"{meta.key(key)} is {value}, it must be {head_dim}" for key, value in must.items() if value != head_dim]
    embedding = shapes.get("model.embed_tokens.weight")
    if not embedding:
        faults.append("missing tensor token_embd.weight")
    theta = number("rope.freq_base", 10000.0)
    raw = defaults_of(kind) | {
        **{"hidden_size": width, "num_attention_heads": heads, "head_dim": head_dim},
        "vocab_size": embedding[0] if embedding else 1,
        "max_position_embeddings": window,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "rms_norm_eps": number(arch.epsilon),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": _has_bias(shapes, ".self_attn."),
        "mlp_bias": _has_bias(shapes, ".mlp."),
        "use_qkv_bias": _has_bias(shapes, ".q_proj.") or _has_bias(shapes, ".qkv_proj."),
        **{name: meta.read(f"tokenizer.ggml.{token}_token_id") for name, token in _TOKEN_IDS.items()},
    }
    raw |= {"partial_rotary_factor": rotated / head_dim} if partial else {}
    faults += _foreign(meta, arch, head_dim, window)
    # 0 is llama.cpp's word for "not set".
    given = {name: number(key) for key, name in arch.numbers.items() if meta.own(key)}
    raw |= {"attention_multiplier": head_dim**-0.5, "sliding_window": None} | arch.defaults | given
    switches = {key: meta.own(key) for key in arch.switches}
    faults += [f"{meta.key(k)} is {v!r}, it must be true or false" for k, v in switches.items() if v is None]
    refuse(meta.path, faults)
    raw |= switches | arch.tell(shapes) | arch.reads(meta.own, raw)
    raw["sliding_window"] = raw["sliding_window"] and int(raw["sliding_window"])
    refuse(meta.path, config_faults(raw, kind))
    refuse(meta.path, family_faults(raw, kind))
    config = config_of(kind, raw, theta)
    refuse(meta.path, rope_faults(config))
    config.rope_scaling = _rope_scaling(meta, divisors, config)
    refuse(meta.path, rope_faults(config))
    return config


def _shortest(value: float) -> float:
    """1e-5 comes out of its 32 bits as 9.99999975e-06; the shortest decimal is what was meant."""
    return float(str(np.float32(value)))


def _has_bias(shapes: Shapes, part: str) -> bool:
    return any(name.endswith(".bias") and part in name for name in shapes)


def _foreign(meta: Metadata, arch: Architecture, head_dim: int, window: int) -> list[str]:
    """The keys by which a file's model computes something that its family here does not."""
    faults = ["it is a mixture of experts"] if meta.own("expert_count", 0) else []
    slides = meta.own(_WINDOW, 0)
    if _WINDOW not in arch.numbers and 0 < slides < window:
        faults.append(f"its window slides ({meta.key(_WINDOW)} is {slides}), that is not supported")
    neutral = NEUTRAL | {SCALE_OF_HEAD: head_dim**-0.5} | arch.neutral
    for key, usual in neutral.items():
        value = None if key in (*arch.numbers, *arch.switches, *arch.known) else meta.own(key)
        if not _is_neutral(value, usual):
            faults.append(
                f"{meta.key(key)} is {shown(value)}: it makes another architecture of a {arch.model_type}, "
                "which is not computed here"
            )
    return faults


def _is_neutral(value: Any, usual: Any) -> bool:
    """Whether a value changes nothing: it is not there, not set (0), or what it is without the key."""
    if value is None or isinstance(usual, bool) or isinstance(value, bool):
        return value is None or value is usual
    if isinstance(value, list):
        return not any(value)
    if type(value) not in (int, float):
        return False
    return value == 0 or usual is not None and math.isclose(value, usual, rel_tol=1e-4)


def _rope_scaling(meta: Metadata, divisors: Divisors, config: ModelConfig) -> RopeScaling | None:
    """The scaling from `{architecture}.rope.scaling.*` and from the tensors of divisors."""

    def key(name: str, default: Any = None) -> Any:
        return meta.own(f"rope.scaling.{name}", default)

    window = config.max_position_embeddings
    # As llama.cpp reads them: linear where a factor stands alone, under its old name as well; long and short divisors
    # are used wherever there are any (Phi-3's files do not name the type).
    kind = key("type", "longrope" if _LONG_DIVISORS in divisors else "linear")
    factor = float(key("factor") or meta.own("rope.scale_linear") or 1.0)
    faults = [f"the factor of its rope is {factor}, it must be 1 or more"] if factor < 1 else []
    faults += [f"{name} divides by 0" for name, d in divisors.items() if not np.all((d > 0) & (d < np.inf))]
    if kind != "longrope":
        faults += [f"{name} does not go with rope scaling {kind!r}" for name in divisors if name != _FREQ_DIVISORS]
    refuse(meta.path, faults)
    if kind == "linear" and factor == 1:
        kind = "none"
    if kind == "none" and _FREQ_DIVISORS in divisors:
        return _from_divisors(divisors[_FREQ_DIVISORS].ravel(), config)
    if kind == "none":
        return None
    odd = [n for n, usual in (("yarn_ext_factor", 1), ("yarn_attn_factor", 1)) if key(n, 1) != usual]
    if key("yarn_log_multiplier", 0):
        odd.append("yarn_log_multiplier")
    odd += [_FREQ_DIVISORS] if _FREQ_DIVISORS in divisors else []
    if odd or kind not in ("linear", "yarn", "longrope"):
        refuse(meta.path, [f"rope scaling {kind!r} with {odd} is not supported"])
    original = key("original_context_length")
    attention = float(key("attn_factor", 1.0))
    if kind == "linear":
        return RopeScaling(
            rope_type=kind,
            factor=factor,
            original_max_position_embeddings=int(original or window / factor),
        )
    if kind == "yarn":
        return RopeScaling(
            rope_type=kind,
            factor=factor,
            original_max_position_embeddings=int(original or window),
            beta_fast=key("yarn_beta_fast"),
            beta_slow=key("yarn_beta_slow"),
            # On top of YaRN's own factor there, instead of it here.
            attention_factor=attention * (1 + 0.1 * np.log(factor)) if attention != 1 else None,
        )
    missing = [name for name in (_LONG_DIVISORS, _SHORT_DIVISORS) if name not in divisors]
    refuse(meta.path, [f"missing tensor {name}" for name in missing])
    short, long = (tuple(map(_shortest, divisors[name].ravel())) for name in (_SHORT_DIVISORS, _LONG_DIVISORS))
    return RopeScaling(
        rope_type=kind,
        factor=max(1.0, window / (original or window)),
        original_max_position_embeddings=int(original or window),
        attention_factor=_shortest(attention),
        short_factor=short,
        long_factor=long,
    )


def _from_divisors(divisors: np.ndarray, config: ModelConfig) -> RopeScaling | None:
    """Finds the scaling behind `rope_freqs.weight`, [H/2]: frequency i is divided by number i.

    That is llama3 scaling if the published settings give these divisors. Whatever else they are,
    longrope with the same divisors at every length holds them exactly.
    """
    if np.all(divisors == 1):
        return None
    llama3 = RopeScaling(rope_type="llama3", factor=float(divisors.max()), **_LLAMA3)
    window = config.max_position_embeddings
    rope = {"head_dim": config.rotary_dim, "theta": config.rope_theta, "seq_len": window}
    plain, _ = rope_frequencies(scaling=None, **rope)
    scaled, _ = rope_frequencies(scaling=llama3, **rope)
    # Both sides are float32 roundings of the same numbers.
    if len(divisors) == len(plain) and np.allclose(plain / divisors, scaled, rtol=1e-5, atol=0):
        return llama3
    table = tuple(divisors.tolist())
    return RopeScaling(
        rope_type="longrope",
        factor=1.0,
        original_max_position_embeddings=window,
        attention_factor=1.0,
        short_factor=table,
        long_factor=table,
    )
