"""GGUF files of llama.cpp: configuration, weights and tokenizer, no torch.

Keys and tensor names are those of llama.cpp's convert_hf_to_gguf.py, read by its `gguf` package; what its
architectures have otherwise than a LLaMA is in gguf_families.py.
"""

import math
import re
from collections.abc import Iterable, Iterator

import numpy as np
from gguf import ReaderTensor, dequantize

from longlora_jax.config import ModelConfig
from longlora_jax.weights.config_faults import refuse
from longlora_jax.weights.gguf_config import ROPE_TENSORS, architecture_of, read_config
from longlora_jax.weights.gguf_families import FUSED, LAYER_NAMES, TOP_NAMES, Architecture
from longlora_jax.weights.gguf_reader import Metadata, open_parts
from longlora_jax.weights.gguf_tokenizer import tokenizer_files
from longlora_jax.weights.rules import Params, build_params, cast_table, table_faults, weight_rules
from longlora_jax.weights.tensors import DTYPES, Tensor

_IN_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)")


def load_gguf(path: str, dtype: str = "float32") -> tuple[ModelConfig, Params, dict[str, str]]:
    """As open_gguf, with the weights read into a param tree of numpy arrays."""
    config, table, files = open_gguf(path, dtype)
    return config, build_params(config, table), files


def open_gguf(path: str, dtype: str = "float32") -> tuple[ModelConfig, dict[str, Tensor], dict[str, str]]:
    """Opens a GGUF file in any type that the `gguf` package can dequantize; a model in parts, by any one of them.

    dtype: a key of DTYPES; the weights are dequantized in float32, when they are read, and then rounded to it.
    Returns the config, the tensors under LLaMA's names, and the tokenizer files {name: content}.
    All names, shapes and types are checked before a weight is read. Raises UserError.
    """
    reader, found = open_parts(path)
    meta = Metadata(path, reader)
    arch = architecture_of(meta)
    refuse(path, list(_name_faults(found)))
    tensors = {_our_name(arch, t.name): t for t in found if t.name not in ROPE_TENSORS}
    rope_tensors = [t for t in found if t.name in ROPE_TENSORS]
    refuse(path, list(_type_faults(rope_tensors)))
    divisors = {t.name: _array(t) for t in rope_tensors}
    config = read_config(meta, {name: _shape(t) for name, t in tensors.items()}, divisors)
    table, faults = _table(arch, tensors, config)
    refuse(path, [*faults, *table_faults(config, table), *_type_faults(found)])
    try:
        files = tokenizer_files(path, meta.read, config)
    except ValueError as error:  # UserError, and what the tokenizers library says of a word
        refuse(path, [str(error).removeprefix(f"{path}: ")])
        raise
    return config, cast_table(table, lambda _: DTYPES[dtype]), files


def _our_name(arch: Architecture, name: str) -> str:
    """LLaMA's name of a tensor; an unknown name stays as it is and is refused later."""
    names = {**LAYER_NAMES, **arch.names}
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = found.groups()
        return f"model.layers.{layer}.{names[part]}.{kind}" if part in names else name
    part, _, kind = name.rpartition(".")
    return f"{TOP_NAMES[part]}.{kind}" if part in TOP_NAMES else name


def _name_faults(tensors: list[ReaderTensor]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.name.startswith(("model.", "lm_head.")):
            yield f"{tensor.name} is Hugging Face's name, not llama.cpp's"


def _type_faults(tensors: list[ReaderTensor]) -> Iterator[str]:
    for kind in {t.tensor_type for t in tensors}:
        first = next(t for t in tensors if t.tensor_type == kind)
        try:
            _array(first, slice(1))
        except NotImplementedError:
            yield f"{first.name} has type {kind.name}, which the gguf package cannot dequantize"


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape.tolist()[::-1])
    return (math.prod(shape),) if tensor.name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")) else shape


def _array(tensor: ReaderTensor, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a tensor in float32."""
    data = tensor.data[rows] if len(tensor.shape) > 1 else tensor.data  # a row is whole blocks, an element may be none
    array = dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
    return array if len(tensor.shape) > 1 else array[rows]


def _table(
    arch: Architecture, tensors: dict[str, ReaderTensor], config: ModelConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a model, fused ones taken apart; and which of these have a wrong shape."""
    shapes = {rule.name: rule.hf_shape for rule in weight_rules(config)}
    table: dict[str, Tensor] = {}
    faults = []
    for name, tensor in tensors.items():
        match = _IN_LAYER.fullmatch(name)
        parts = [f"{part}.{match[3]}" for part in FUSED.get(match[2], ())] if match else []
        known = [shapes.get(f"model.layers.{{}}.{part}", ()) for part in parts]
        if not match or not parts or not all(known):
            table[name] = _tensor(arch, name, tensor, _shape(tensor), slice(None), config)
            continue
        needed = (sum(shape[0] for shape in known), *known[0][1:])
        if _shape(tensor) != needed:
            faults.append(f"{tensor.name} has shape {list(_shape(tensor))}, it must be {list(needed)}")
        for part, shape, rows in zip(parts, known, _slices(shape[0] for shape in known), strict=True):
            table[match[1] + part] = _tensor(arch, match[1] + part, tensor, shape, rows, config)
    return table, faults


def _slices(sizes: Iterable[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _tensor(
    arch: Architecture, name: str, tensor: ReaderTensor, shape: tuple[int, ...], rows: slice, config: ModelConfig
) -> Tensor:
    return Tensor(DTYPES["float32"], shape, lambda: _weight(arch, name, _array(tensor, rows), config).reshape(shape))


def _weight(arch: Architecture, name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """One weight in Hugging Face's layout, what llama.cpp's converter has done to it undone.

    Where llama.cpp turns neighbours (2i, 2i + 1) of a head and Hugging Face (i, i + H/2), its converter
    has reordered the rows of q and k.
    """
    if arch.pairs and ("q_proj" in name or "k_proj" in name):
        pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    if arch.offset and name.endswith("norm.weight"):
        array = array - np.float32(arch.offset)
    return array
