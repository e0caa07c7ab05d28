"""Files that torch.save wrote, read without torch: nothing of theirs is run, no weight is read before it is used.

Ours because torch is no dependency (gigabytes, for a format that safetensors replaces), and pickle runs what it reads.
A file is a zip archive of stored entries: FOLDER/data/KEY, the bytes of a storage, and FOLDER/data.pkl, a pickle, whose
few names the interpreter below knows; it calls none. Format: torch/serialization.py, torch/_utils.py of 1.6 to 2.13.
"""

import io
import math
import os
import pickletools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from longlora_jax.errors import UserError
from longlora_jax.weights.tensors import DTYPES, Tensor, mapped
from longlora_jax.weights.torch_archive import TORCH_AGAIN, Bounded, Entry, OtherForm, content_of, entries_of, shown

# A tensor takes some 250 bytes of pickle: 16,000 of them, where a LLaMA of 405 B has 1,137. An object takes up to
# 100 times the bytes of the opcode that makes it: a hostile pickle ends within 400 MB and some seconds.
_PICKLE_LIMIT = 4_000_000
_ABSURD = 2**48  # elements
_LATEST_VERSION = 10  # kMaxSupportedFileFormatVersion in PyTorch's caffe2/serialize/versions.h
_ALONE = "save the table of tensors alone, as state_dict() gives it"


class _Kind(NamedTuple):
    """What a storage class of torch holds."""

    dtype: str
    itemsize: int


class _Storage(NamedTuple):
    key: str
    kind: _Kind
    start: int
    numel: int


class _Function(NamedTuple):
    name: str  # of ours, in _Machine.result


class _Ordered(dict):
    """A collections.OrderedDict of the file."""


_CLASSES = "Float Half BFloat16 Double Byte Char Short Int Long Bool ComplexFloat ComplexDouble".split()
_WORDS = "float32 float16 bfloat16 float64 uint8 int8 int16 int32 int64 bool complex64 complex128".split()
_KINDS = [_Kind(word, np.dtype(DTYPES.get(word, word)).itemsize) for word in _WORDS]
_GLOBALS = {
    "collections OrderedDict": _Function("OrderedDict"),
    "torch._utils _rebuild_tensor_v2": _Function("tensor"),
    "torch._utils _rebuild_parameter": _Function("parameter"),
    **{f"torch {name}Storage": kind for name, kind in zip(_CLASSES, _KINDS, strict=True)},
}
_NOT_PLAIN = {
    "torch._utils _rebuild_tensor_v3": "a tensor of 8-bit floats or of unsigned integers",
    "torch._utils _rebuild_qtensor": "a quantized tensor",
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_meta_tensor_no_storage": "a tensor without values",
    "torch._utils _rebuild_parameter_with_state": f"a parameter with attributes: {TORCH_AGAIN}",
    "torch._tensor _rebuild_from_type_v2": f"a tensor with attributes: {TORCH_AGAIN}",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def open_torch(path: str) -> dict[str, Tensor]:
    """The tensors of a state dict in a file of torch.save, all checked against the file.

    A dtype that models are not stored in stays a word, such as "int64". A tensor with more elements than its storage
    (an expanded one) is refused, so that none is larger than the file.
    Raises ValueError (what is wrong, in a few words; OtherForm if nothing is damaged) or OSError.
    """
    with Bounded(path) as file:
        entries = entries_of(file, os.path.getsize(path))
        version = content_of(file, entries, "version", 20).strip()
        if not version.isdigit() or not 1 <= int(version) <= _LATEST_VERSION:
            raise OtherForm(f"its version is {shown(ascii(version))}, not 1 to {_LATEST_VERSION}")
        if "byteorder" in entries and content_of(file, entries, "byteorder", 20) != b"little":
            raise OtherForm("its weights are not little-endian")
        program = content_of(file, entries, "data.pkl", _PICKLE_LIMIT)
    table = _Machine(path, entries).run(program)
    if not isinstance(table, dict):
        raise OtherForm("it holds no table of tensors")
    for name, value in table.items():
        if not isinstance(value, Tensor):
            raise OtherForm(f"{name} in it is no tensor: {_ALONE}")
    return dict(table)


def _opcodes(program: bytes) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each opcode before STOP, which no byte may follow."""
    stream, frame_end = io.BytesIO(program), 0
    try:
        for opcode, arg, at in pickletools.genops(stream):
            # Frames only tell how far to read ahead, but pickle goes astray where they cut an opcode.
            if (at or 0) < frame_end and (stream.tell() > frame_end or opcode.name == "FRAME"):
                raise ValueError("an opcode passes the end of its frame")
            if opcode.name == "FRAME":
                frame_end = stream.tell() + int(arg or 0)
            elif opcode.name != "STOP":
                yield opcode.name, arg
        if not frame_end <= stream.tell() == len(program):
            raise ValueError("its end is not where its bytes end")
    except (ValueError, Warning) as error:  # Python may warn of an opcode's odd text, and warnings may be errors
        raise ValueError(f"its pickle is damaged: {shown(str(error))}") from None


class _Machine:
    """A pickle's program on a stack. Each opcode takes bounded time and memory, and none goes back: it always ends."""

    def __init__(self, path: str, entries: dict[str, Entry]):
        self.path = path
        self.entries = entries
        self.storages: dict[str, _Storage] = {}
        self.checked: set[str] = set()  # the storages whose checksums are right
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each MARK
        self.memo: list[Any] = []

    def run(self, program: bytes) -> Any:
        """What the program describes: a tensor, or tables and tuples of words, numbers and tensors."""
        opcodes = _opcodes(program)
        name, protocol = next(opcodes, ("STOP", 0))
        if name != "PROTO" or not 2 <= protocol <= 5:
            raise OtherForm("its pickle is not of protocol 2 to 5")
        for name, arg in opcodes:
            self.step(name, arg)
        if self.below or len(self.stack) != 1:
            raise ValueError("its pickle is damaged: it does not end with one value")
        return self.stack[0]

    def step(self, name: str, arg: Any) -> None:
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                self.stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                self.stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.pop(int(name[-1]))))
            case "TUPLE":
                items = self.pop_mark()  # changes self.stack
                self.stack.append(tuple(items))
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                # Every pickler counts up: so no note is ever changed.
                if arg not in (None, len(self.memo)):
                    raise ValueError("its pickle is damaged: its notes are not in order")
                self.memo += self.pop(1)
                self.stack.append(self.memo[-1])
            case "BINGET" | "LONG_BINGET":
                if arg >= len(self.memo):
                    raise ValueError("its pickle is damaged: it takes up what it never noted")
                self.stack.append(self.memo[arg])
            case "SETITEM" | "SETITEMS":
                self.set_items(self.pop(2) if name == "SETITEM" else self.pop_mark())
            case "GLOBAL":
                self.stack.append(_meaning(arg))
            case "STACK_GLOBAL":
                module, attribute = self.pop(2)
                self.stack.append(_meaning(f"{_word(module)} {_word(attribute)}"))
            case "BINPERSID":
                self.stack.append(self.storage(*self.pop(1)))
            case "REDUCE":
                function, args = self.pop(2)
                self.stack.append(self.result(function, args))
            case "BUILD":
                # The only state of a table is its _metadata, versions of modules: no weights.
                target, state = self.pop(2)
                if type(target) is not _Ordered or type(state) is not dict:
                    raise OtherForm("its pickle sets the state of what is no table: refused")
                self.stack.append(target)
            case _:
                raise OtherForm(f"its pickle uses {name}, which no table of tensors needs: {_ALONE}")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("its pickle is damaged: it takes more values than there are")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError("its pickle is damaged: it lacks a mark")
        values, self.stack = self.stack, self.below.pop()
        return values

    def set_items(self, items: list[Any]) -> None:
        (table,) = self.pop(1)
        if not isinstance(table, dict) or len(items) % 2:
            raise ValueError("its pickle is damaged: it puts items into what is no table")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _word(key) in table:
                raise ValueError(f"{key} is in it twice")
            table[key] = value
        self.stack.append(table)

    def storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id ("storage", class, key, device, elements)."""
        match identity:
            case "storage", _Kind() as kind, str(key), str(), numel if _whole(numel):
                entry = self.entries.get(f"data/{_word(key)}")
            case _:
                raise OtherForm("its pickle asks for something that is no storage")
        if entry is None:
            raise ValueError(f"its storage {key} is missing")
        if entry.size // kind.itemsize != numel:
            raise ValueError(f"its storage {key} has {entry.size} bytes, not those of {numel} {kind.dtype}")
        storage = self.storages.setdefault(key, _Storage(key, kind, entry.start, numel))
        if storage.kind != kind:
            raise ValueError(f"its storage {key} is {storage.kind.dtype} and {kind.dtype}")
        return storage

    def result(self, function: Any, args: Any) -> Any:
        """What torch's function would give."""
        match function, args:
            case _Function("OrderedDict"), ():
                return _Ordered()
            case _Function("tensor"), (_Storage() as storage, offset, tuple(shape), tuple(strides), bool(), _Ordered()):
                return self.tensor(storage, offset, shape, strides)
            case _Function("parameter"), (Tensor() as tensor, bool(), _Ordered()):
                return tensor
        # A seventh argument of a tensor says that its values are to be negated or conjugated.
        raise OtherForm("its pickle describes a tensor in an unknown way: refused")

    def tensor(self, storage: _Storage, offset: Any, shape: tuple, strides: tuple) -> Tensor:
        """A view of a storage; offset and strides count elements."""
        whole = len(shape) == len(strides) <= 32 and all(map(_whole, (offset, *shape, *strides)))
        if not whole or math.prod(n or 1 for n in shape) >= _ABSURD:
            raise ValueError("a tensor in it has an absurd shape, stride or offset")
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        stored = f"the {storage.numel} elements of its storage {storage.key}"
        if 0 not in shape and offset + span > storage.numel:
            raise ValueError(f"a tensor {list(shape)} in it ends at {offset + span} of {stored}")
        if math.prod(shape) > storage.numel:
            raise OtherForm(f"a tensor {list(shape)} in it repeats {stored}: clone() it before torch.save")
        dtype = DTYPES.get(storage.kind.dtype, storage.kind.dtype)
        start, path = storage.start + offset * storage.kind.itemsize, self.path

        def read() -> np.ndarray:
            assert isinstance(dtype, np.dtype), f"{path} holds {dtype}: refused before it is read"
            if 0 in shape:
                return np.empty(shape, dtype)
            self.check(storage.key)
            steps = [stride * dtype.itemsize for stride in strides]
            return np.lib.stride_tricks.as_strided(mapped(path, start, dtype, (span,)), shape, steps, writeable=False)

        return Tensor(dtype, shape, read)

    def check(self, key: str) -> None:
        """Compares a storage with its checksum when it is read for the first time. Raises UserError."""
        if key not in self.checked:
            try:
                self.entries[f"data/{key}"].check(self.path, f"storage {key}")
            except ValueError as error:
                raise UserError(f"{self.path} is damaged, fetch it again ({error})") from None
            self.checked.add(key)


def _meaning(name: str) -> _Function | _Kind:
    """name: module and attribute with a space between."""
    if name not in _GLOBALS:
        what = f" ({_NOT_PLAIN[name]})" if name in _NOT_PLAIN else ""
        raise OtherForm(f"its pickle asks for {shown(name.replace(' ', '.'))}{what}: refused")
    return _GLOBALS[name]


def _word(value: Any) -> str:
    if type(value) is not str or len(value) > 4096 or not value.isprintable():
        raise OtherForm(f"its pickle has something else where a name is needed: {_ALONE}")
    return value


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < _ABSURD
