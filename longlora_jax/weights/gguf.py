"""GGUF files of llama.cpp's `llama` architecture: configuration, weights and tokenizer, no torch.

Keys and tensor names are those of llama.cpp's convert_hf_to_gguf.py, read by its `gguf` package.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gguf import ReaderTensor, dequantize

from longlora_jax.attention.rope import RopeScaling, rope_frequencies
from longlora_jax.config import ModelConfig
from longlora_jax.weights.config_faults import config_faults, refuse, rope_faults
from longlora_jax.weights.gguf_reader import open_parts
from longlora_jax.weights.gguf_tokenizer import tokenizer_files
from longlora_jax.weights.rules import Params, build_params, cast_table, table_faults
from longlora_jax.weights.tensors import DTYPES, Tensor

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# One divisor for each rotary frequency; they describe the scaling and are no weights.
_FREQ_DIVISORS = "rope_freqs.weight"
_LONG_DIVISORS, _SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"
_ROPE_TENSORS = (_FREQ_DIVISORS, _LONG_DIVISORS, _SHORT_DIVISORS)
# Every Llama 3.1, 3.2 and 3.3; a GGUF file keeps only the divisors that follow from them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_WORDS = ("general.architecture", "llama.rope.scaling.type", "tokenizer.ggml.model", "tokenizer.ggml.pre")
_NUMBERS = ("llama.expert_count", "llama.attention.sliding_window", "llama.rope.scale_linear")
_LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
_LONGEST_WORD = 4096

Read = Callable[..., Any]


def load_gguf(path: str, dtype: str = "float32") -> tuple[ModelConfig, Params, dict[str, str]]:
    """As open_gguf, with the weights read into a param tree of numpy arrays."""
    config, table, files = open_gguf(path, dtype)
    return config, build_params(config, table), files


def open_gguf(path: str, dtype: str = "float32") -> tuple[ModelConfig, dict[str, Tensor], dict[str, str]]:
    """Opens a GGUF file of a LLaMA in any type that the `gguf` package can dequantize; in parts, by any one of them.

    dtype: a key of DTYPES; the weights are dequantized in float32, when they are read, and then rounded to it.
    Returns the config, the tensors under Hugging Face's names, and the tokenizer files {name: content}.
    All names, shapes and types are checked before a weight is read. Raises UserError.
    """
    reader, found = open_parts(path)
    refuse(path, list(_name_faults(found)))
    tensors = {_hf_name(t.name): t for t in found if t.name not in _ROPE_TENSORS}
    rope_tensors = [t for t in found if t.name in _ROPE_TENSORS]
    refuse(path, list(_type_faults(rope_tensors)))
    divisors = {t.name: _array(t) for t in rope_tensors}

    def read(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        try:
            value = default if field is None else field.contents()
        except UnicodeDecodeError:
            value = math.nan
        if field is not None and not _fits(key, value):
            refuse(path, [f"{key} is of the wrong type, or no text in UTF-8"])
        return value

    config = _config(path, read, tensors, divisors)
    table = {name: _tensor(name, tensor, config) for name, tensor in tensors.items()}
    refuse(path, [*table_faults(config, table), *_type_faults(found)])
    try:
        files = tokenizer_files(path, read, config)
    except ValueError as error:  # UserError, and what the tokenizers library says of a word
        refuse(path, [str(error).removeprefix(f"{path}: ")])
        raise
    return config, cast_table(table, lambda _: DTYPES[dtype]), files


def _tensor(name: str, tensor: ReaderTensor, config: ModelConfig) -> Tensor:
    shape = tuple(tensor.shape.tolist()[::-1])
    return Tensor(DTYPES["float32"], shape, lambda: _weight(name, tensor, config))


def _name_faults(tensors: list[ReaderTensor]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.name.startswith(("model.", "lm_head.")):
            yield f"{tensor.name} is Hugging Face's name, not llama.cpp's"


def _fits(key: str, value: Any) -> bool:
    """Whether a value is of the type that is promised by its key."""
    if key in _WORDS or key == "tokenizer.chat_template":
        return isinstance(value, str)
    if key.startswith("tokenizer.ggml.add_"):
        return isinstance(value, bool)
    if key.endswith("_token_id"):
        return type(value) is int and value >= 0
    if kind := _LISTS.get(key.removeprefix("tokenizer.ggml.")):
        right = isinstance(value, list) and all(type(item) is kind for item in value)
        return right and (kind is not str or max(map(len, value), default=0) <= _LONGEST_WORD)
    if key == "llama.rope.scaling.original_context_length":
        return type(value) is int and value > 0
    if key in _NUMBERS or key.startswith("llama.rope.scaling."):
        return type(value) in (int, float) and math.isfinite(value)
    return True  # said where it is used


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown name stays as it is and is refused later."""
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = found.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}" if part in _LAYER_NAMES else name
    part, _, kind = name.rpartition(".")
    return f"{_TOP_NAMES[part]}.{kind}" if part in _TOP_NAMES else name


def _array(tensor: ReaderTensor) -> np.ndarray:
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def _type_faults(tensors: list[ReaderTensor]) -> Iterator[str]:
    for kind in {t.tensor_type for t in tensors}:
        first = next(t for t in tensors if t.tensor_type == kind)
        try:
            dequantize(first.data[:1], kind)
        except NotImplementedError:
            yield f"{first.name} has type {kind.name}, which the gguf package cannot dequantize"


def _weight(name: str, tensor: ReaderTensor, config: ModelConfig) -> np.ndarray:
    """One weight in Hugging Face's layout.

    llama.cpp turns neighbours (2i, 2i + 1) of a head, Hugging Face (i, i + H/2): its converter
    has reordered the rows of q and k, and this puts them back.
    """
    array = _array(tensor)
    if "q_proj" in name or "k_proj" in name:
        pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return array


def _config(path: str, read: Read, tensors: dict, divisors: dict) -> ModelConfig:
    architecture = read("general.architecture")
    if architecture != "llama":
        refuse(path, [f"general.architecture is {architecture!r}, it must be 'llama'"])
    faults = []

    def size(key: str, default: Any = None) -> int:
        value = read(f"llama.{key}", default)
        if not (type(value) is int and value > 0):
            faults.append(f"llama.{key} is {value!r}, it must be one whole number above 0")
            return 1
        return value

    def number(key: str, default: Any = None) -> float:
        value = read(f"llama.{key}", default)
        if not (type(value) in (int, float) and 0 < value < 1e30):
            faults.append(f"llama.{key} is {value!r}, it must be a number above 0")
            return 1.0
        # 1e-5 comes out of its 32 bits as 9.99999975e-06; the shortest decimal is what was meant.
        return float(str(np.float32(value)))

    width, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", width // heads)
    window = size("context_length")
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            faults.append(f"llama.{key} is {read(f'llama.{key}')}, it must be {head_dim}")
    if read("llama.expert_count", 0):
        faults.append("it is a mixture of experts")
    sliding = read("llama.attention.sliding_window", 0)
    if 0 < sliding < window:
        faults.append(f"its window slides ({sliding} of {window} tokens), that is not supported")
    scales = {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0, "attention.scale": head_dim**-0.5}
    # 0 is llama.cpp's word for "not set".
    scales = {key: value for key, value in scales.items() if not math.isclose(number(key, value), value, rel_tol=1e-4)}
    odd = [*scales, *(key for key in ("attn_logit_softcapping", "final_logit_softcapping") if read(f"llama.{key}"))]
    odd += ["attention.causal"] if read("llama.attention.causal", True) is not True else []
    faults += [f"llama.{key} is {read(f'llama.{key}')!r}: it makes another architecture of a LLaMA" for key in odd]
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        faults.append("missing tensor token_embd.weight")
    theta = number("rope.freq_base", 10000.0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
    }
    refuse(path, faults)
    assert embedding is not None
    config = ModelConfig(
        **sizes,
        vocab_size=int(embedding.shape[-1]),
        head_dim=head_dim,
        max_position_embeddings=window,
        rope_theta=theta,
        tie_word_embeddings="lm_head.weight" not in tensors,
        attention_bias=any(n.endswith("bias") and ".self_attn." in n for n in tensors),
        mlp_bias=any(n.endswith("bias") and ".mlp." in n for n in tensors),
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
    )
    refuse(path, [*config_faults(vars(config)), *rope_faults(config)])
    config.rope_scaling = _rope_scaling(path, read, divisors, theta, head_dim, window)
    refuse(path, rope_faults(config))
    return config


def _rope_scaling(
    path: str, read: Read, divisors: dict, theta: float, head_dim: int, window: int
) -> RopeScaling | None:
    """The scaling from `llama.rope.scaling.*` and from the tensors of divisors."""

    def key(name: str, default: Any = None) -> Any:
        return read(f"llama.rope.scaling.{name}", default)

    # As llama.cpp reads them: linear where a factor stands alone, under its old name as well.
    kind = key("type", "linear")
    factor = float(key("factor") or read("llama.rope.scale_linear") or 1.0)
    faults = [f"the factor of its rope is {factor}, it must be 1 or more"] if factor < 1 else []
    faults += [f"{name} divides by 0" for name, d in divisors.items() if not np.all((d > 0) & (d < np.inf))]
    if kind != "longrope":
        faults += [f"{name} does not go with rope scaling {kind!r}" for name in divisors if name != _FREQ_DIVISORS]
    refuse(path, faults)
    if kind == "linear" and factor == 1:
        kind = "none"
    if kind == "none" and _FREQ_DIVISORS in divisors:
        return _from_divisors(divisors[_FREQ_DIVISORS].ravel(), theta, head_dim, window)
    if kind == "none":
        return None
    odd = [n for n, usual in (("yarn_ext_factor", 1), ("yarn_attn_factor", 1)) if key(n, 1) != usual]
    if key("yarn_log_multiplier", 0):
        odd.append("yarn_log_multiplier")
    odd += [_FREQ_DIVISORS] if _FREQ_DIVISORS in divisors else []
    if odd or kind not in ("linear", "yarn", "longrope"):
        refuse(path, [f"rope scaling {kind!r} with {odd} is not supported"])
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
    refuse(path, [f"missing tensor {name}" for name in missing])
    return RopeScaling(
        rope_type=kind,
        factor=max(1.0, window / (original or window)),
        original_max_position_embeddings=int(original or window),
        attention_factor=attention,
        short_factor=tuple(divisors[_SHORT_DIVISORS].ravel().tolist()),
        long_factor=tuple(divisors[_LONG_DIVISORS].ravel().tolist()),
    )


def _from_divisors(divisors: np.ndarray, theta: float, head_dim: int, window: int) -> RopeScaling | None:
    """Finds the scaling behind `rope_freqs.weight`, [H/2]: frequency i is divided by number i.

    That is llama3 scaling if the published settings give these divisors. Whatever else they are,
    longrope with the same divisors at every length holds them exactly.
    """
    if np.all(divisors == 1):
        return None
    llama3 = RopeScaling(rope_type="llama3", factor=float(divisors.max()), **_LLAMA3)
    rope = {"head_dim": head_dim, "theta": theta, "seq_len": window}
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
