"""Tensors in files, read when they are asked for: the safetensors format, both ways.

A model of any size is handled as a table {name: Tensor}: nothing is held but the tensor in hand.
Ours beside the library safetensors, because that copies a tensor of which a host needs a few rows (here it is mapped),
writes from memory alone, and takes a file whose header is 100 MB or has a name twice.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from longlora_jax.files import JSON_LIMIT, parse_json
from longlora_jax.model.codes import Quantization
from longlora_jax.progress import progress_bar

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
BYTES = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}  # of packed weights; no model is in them
SAFETENSORS = {"F32": DTYPES["float32"], "BF16": DTYPES["bfloat16"], "F16": DTYPES["float16"]}
_CODES = {dtype: code for code, dtype in SAFETENSORS.items()}
_LONGEST = 4096  # no name or dtype in a header is longer
_AXES = 32  # no shape has more


class Tensor(NamedTuple):
    """A tensor that is read when it is asked for.

    dtype: a numpy dtype, or the file's own word for one that models are not stored in. read() gives an array of
    this shape and dtype, perhaps a read-only view of the file: then only the parts that are used are read. packed()
    gives a matrix that is quantized on the disk as its flat parts (model/codes.py), which read() dequantizes.
    """

    dtype: np.dtype | str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    packed: Callable[[], dict[str, np.ndarray]] | None = None
    quantization: Quantization | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes, for a dtype that is known."""
        assert isinstance(self.dtype, np.dtype), f"{self.dtype} should have been refused"
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def reading(label: str, tensors: Iterable[Tensor]) -> Iterator[Callable[..., Any]]:
    """Gives read(tensor) -> array, which moves a progress bar over the bytes of all these tensors.

    read(tensor, packed=True) gives the parts of a tensor that has them.
    """
    with progress_bar(sum(tensor.nbytes for tensor in tensors), label=label, unit="B") as bar:

        def read(tensor: Tensor, packed: bool = False) -> Any:
            assert not packed or tensor.packed
            array = tensor.packed() if packed and tensor.packed else tensor.read()
            bar.update(tensor.nbytes)
            return array

        yield read


def mapped(path: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only view, in C order, of a part of a file; the mapping ends with the last view of it.

    Not a plain read: a shard of the tensor costs only its own pages, and no copy is made.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), size + offset - start, offset=start, access=mmap.ACCESS_READ)
    return np.frombuffer(view, dtype, count=size // dtype.itemsize, offset=offset - start).reshape(shape)


def open_safetensors(path: str) -> dict[str, Tensor]:
    """The tensors of a file, its header checked against the format and against the file's size.

    Raises ValueError (what is wrong, in a few words) or OSError. Format: huggingface.co/docs/safetensors.
    """
    header, begin, size = _read_header(path)
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, (start, end) = _entry(name, entry)
        if not 0 <= start <= end <= size - begin:
            raise ValueError(f"{name} lies at bytes {start} to {end} of {size - begin}")
        kind = BYTES.get(dtype) if isinstance(dtype, str) else dtype
        if kind is not None and (end - start) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{name} has {end - start} bytes, not those of {dtype} {list(shape)}")
        ranges.append((start, end, name))
        tensors[name] = Tensor(dtype, shape, _reader(path, begin + start, dtype, shape))
    at = 0
    for start, end, name in sorted(ranges):
        if start != at:
            raise ValueError(f"{name} starts at byte {start}, where {at} is expected")
        at = end
    if at != size - begin:
        raise ValueError(f"{size - begin - at} bytes belong to no tensor")
    return tensors


def _read_header(path: str) -> tuple[dict[str, Any], int, int]:
    """(header, where the data begin, size of the file)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        most = min(size - 8, JSON_LIMIT)
        if not 2 <= length <= most:
            raise ValueError(f"its header would have {length} bytes, at most {most} are possible")
        text = file.read(length)
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + length, size


def _entry(name: str, entry: Any) -> tuple[np.dtype | str, tuple[int, ...], tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    code, shape, span = fields.get("dtype"), _numbers(fields.get("shape")), _numbers(fields.get("data_offsets"))
    if len(name) > _LONGEST or not isinstance(code, str) or len(code) > _LONGEST:
        raise ValueError(f"the entry of {name[:80]} is not one of a tensor")
    if shape is None or span is None or len(span) != 2:
        raise ValueError(f"the entry of {name} has no shape and two data_offsets of whole numbers")
    return SAFETENSORS.get(code, code), shape, (span[0], span[1])


def _numbers(value: Any) -> tuple[int, ...] | None:
    right = isinstance(value, list) and len(value) <= _AXES and all(type(n) is int and 0 <= n < 2**63 for n in value)
    return tuple(value) if right else None


def _reader(path: str, offset: int, dtype: np.dtype | str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        kind = BYTES.get(dtype) if isinstance(dtype, str) else dtype
        assert kind is not None, f"{path} holds {dtype}: refused before it is read"
        return mapped(path, offset, kind, shape)

    return read


def write_safetensors(path: str, tensors: Mapping[str, Tensor], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file whose tensors come one after the other: only the one in hand is held.

    tensors give names, dtypes and shapes; arrays their contents in the same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), array in zip(tensors.items(), arrays, strict=True):
            assert array.shape == tensor.shape and array.dtype == tensor.dtype, name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
