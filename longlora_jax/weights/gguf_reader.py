"""GGUF files opened with every count checked, and put together where a model was cut into parts.

llama.cpp's gguf-split names the parts NAME-00001-of-00004.gguf and so on; the first holds the keys, each its tensors.
"""

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor

from longlora_jax.errors import UserError
from longlora_jax.files import one_line, refuse_pointer
from longlora_jax.weights.config_faults import refuse

_MOST_VALUES = 2_000_000  # in a header, each some 600 bytes of memory; Llama 3 has 950,000: words, lengths, types
# Types of the values that are used as they are; a key of an architecture stands here without its name.
_WORDS = ("general.architecture", "rope.scaling.type", "tokenizer.ggml.model", "tokenizer.ggml.pre")
_NUMBERS = ("expert_count", "attention.sliding_window", "rope.scale_linear", "rope.freq_base_swa")
_LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
_LONGEST_WORD = 4096
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MOST_PARTS = 10_000


def open_parts(path: str) -> tuple[GGUFReader, list[ReaderTensor]]:
    """Opens a file, or all parts of the model that it is one part of: what holds the keys, and the tensors of all.

    Raises UserError, naming every fault, also if a part is missing or none of this model.
    """
    reader = _open(path)
    count = _number(path, reader, "split.count")
    if count <= 1:
        refuse(path, list(_offset_faults(reader)))
        return reader, reader.tensors
    named = _PART.fullmatch(path)
    if not named or int(named[3]) != count or count > _MOST_PARTS:
        raise UserError(
            f"{path} is one of {count} parts, its name must be as gguf-split gives it, "
            f"such as model-00001-of-{count:05d}.gguf, with the others beside it"
        )
    paths = [f"{named[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    absent = [os.path.basename(part) for part in paths if not os.path.isfile(part)]
    refuse(path, [f"its part {name} is missing" for name in absent])
    readers, faults = [], []
    for number, part in enumerate(paths):
        opened = _open(part)
        if (found := (_number(part, opened, "split.no"), _number(part, opened, "split.count"))) != (number, count):
            raise UserError(f"{part} says that it is part {found[0] + 1} of {found[1]}: fetch the parts again")
        faults += [f"{os.path.basename(part)}: {fault}" for fault in _offset_faults(opened)]
        readers.append(opened)
    tensors = [tensor for opened in readers for tensor in opened.tensors]
    names = [tensor.name for tensor in tensors]
    faults += [f"{name} is in more than one part" for name in sorted({n for n in names if names.count(n) > 1})]
    total = _number(paths[0], readers[0], "split.tensors.count")
    if total and total != len(tensors):
        faults.append(f"its parts have {len(tensors)} tensors, not {total}: fetch them again")
    refuse(path, faults)
    return readers[0], tensors


class Metadata:
    """The keys of a file, each of the type that it promises; raises UserError where one is not."""

    def __init__(self, path: str, reader: GGUFReader) -> None:
        self.path, self._reader = path, reader
        self.architecture: str = self.read("general.architecture", "")

    def key(self, name: str) -> str:
        """The full name of a key of the architecture."""
        return f"{self.architecture}.{name}"

    def own(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture, given without its name."""
        return self.read(self.key(name), default)

    def read(self, key: str, default: Any = None) -> Any:
        """The value of a key given in full."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError:
            value = math.nan
        name = key if key.startswith(("general.", "tokenizer.")) else key.removeprefix(self.key(""))
        if not _fits(name, value):
            refuse(self.path, [f"{key} is of the wrong type, or no text in UTF-8"])
        return value


def _fits(key: str, value: Any) -> bool:
    """Whether a value is of the type that is promised by its key."""
    if key in _WORDS or key == "tokenizer.chat_template":
        return isinstance(value, str)
    if key.startswith("tokenizer.ggml.add_") or key == "use_parallel_residual":
        return isinstance(value, bool)
    if key.endswith("_token_id"):
        return type(value) is int and value >= 0
    if kind := _LISTS.get(key.removeprefix("tokenizer.ggml.")):
        right = isinstance(value, list) and all(type(item) is kind for item in value)
        return right and (kind is not str or max(map(len, value), default=0) <= _LONGEST_WORD)
    if key == "rope.scaling.original_context_length":
        return type(value) is int and value > 0
    if key == "rope.scaling.finetuned":
        return isinstance(value, bool)
    if key == "attention.sliding_window_pattern":
        return type(value) is int and value >= 0 or isinstance(value, list) and {0, 1}.issuperset(value)
    if key in _NUMBERS or key.startswith("rope.scaling."):
        return type(value) in (int, float) and math.isfinite(value)
    return True  # said where it is used


def _number(path: str, reader: GGUFReader, key: str) -> int:
    field = reader.get_field(key)
    value = 0 if field is None else field.contents()
    if type(value) is not int or value < 0:
        raise UserError(f"{path}: {key} is {value!r:.40}, it must be a whole number")
    return value


def _open(path: str) -> GGUFReader:
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: give a GGUF file")
    refuse_pointer(path)
    try:
        with np.errstate(over="ignore"):  # an offset of nearly 2**64
            reader = _Reader(path)
        if reader.byte_order != "I":
            raise ValueError("its numbers are big-endian")
        return reader
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(f"{path} is no GGUF file, damaged or cut off ({one_line(str(error), 200)})") from error


class _Reader(GGUFReader):
    """GGUFReader itself follows any count that it finds, beyond the end of the file and for ever."""

    values = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> np.ndarray:
        found = super()._get(offset, dtype, count, *args, **options)
        self.values += 1
        if len(found) != count or self.values > _MOST_VALUES:
            raise ValueError(f"byte {offset} begins {count} values that it does not have")
        return found


def _offset_faults(reader: GGUFReader) -> Iterator[str]:
    """As in llama.cpp, tensors lie one after the other, from one multiple of the alignment to the next."""
    at = reader.data_offset
    yield from (f"{tensor.name} has no axes" for tensor in reader.tensors if not len(tensor.shape))
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset != at:
            yield f"{tensor.name} starts at byte {tensor.data_offset}, where {at} is expected"
        at = tensor.data_offset + math.ceil(tensor.n_bytes / reader.alignment) * reader.alignment
