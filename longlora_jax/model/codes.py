"""Weights in four and eight bits, as bitsandbytes has them: codes and scales of one matrix, in numpy.

NF4 and FP4 (arXiv:2305.14314) cut a matrix [out, in], flat in C order, into blocks; a block is its largest magnitude
and a code of four bits for each number, two in a byte, the first in the high half. Double quantization keeps those
magnitudes in eight bits. int8 is LLM.int8's (arXiv:2208.07339): a scale for each row. Numbers are those that
bitsandbytes 0.50 computes on a CPU, to the bit; what the files of its other backends hold is read as it is.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

BLOCK, NESTED_BLOCK = 64, 256
_AT_ONCE = 1 << 20  # numbers: what a thread works on stays in its cache
_NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FLOAT = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # of three bits, in twelfths; the fourth is the sign
TABLES = {
    "nf4": np.array(_NORMAL, np.float32),
    "fp4": np.array([*_FLOAT, *(-x for x in _FLOAT)], np.float32) / np.float32(12),
}
Parts = dict[str, np.ndarray]


class Quantization(NamedTuple):
    """How matrices are kept. kind: nf4, fp4 or int8; nested: double quantization; block: numbers of a block."""

    kind: str
    nested: bool = False
    block: int = BLOCK

    @classmethod
    def of(cls, name: str) -> "Quantization | None":
        """That of a name as configs have it: nf4, nf4_double, fp4, fp4_double, int8; None for none."""
        kind, _, nested = name.partition("_")
        return None if kind == "none" else cls(kind, bool(nested))

    def __str__(self) -> str:
        return self.kind + "_double" * self.nested + (f" in blocks of {self.block}" if self.block != BLOCK else "")


class Layout(NamedTuple):
    """A matrix [out, in] as groups of rows that are whole blocks: [groups, size], size numbers each.

    One row is a group where blocks divide it. A matrix that blocks do not divide is one group, its last block short.
    """

    groups: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], q: Quantization) -> "Layout":
        """That of a matrix of shape [out, in]."""
        out, inputs = shape
        rows = 1 if q.kind == "int8" else q.block // math.gcd(q.block, inputs)
        return cls(1, out * inputs) if out % rows else cls(out // rows, rows * inputs)

    def shapes(self, q: Quantization) -> dict[str, tuple[tuple[int, ...], type]]:
        """{part: (shape, dtype)} of a matrix as devices hold it, the groups last, as kernels have their outputs."""
        if q.kind == "int8":
            return {"codes": ((self.size, self.groups), np.int8), "absmax": ((1, self.groups), np.float32)}
        blocks = -(-self.size // q.block)
        found = {"codes": ((-(-self.size // 2), self.groups), np.uint8), "absmax": ((blocks, self.groups), np.float32)}
        if q.nested:
            nested = -(-blocks * self.groups // NESTED_BLOCK)
            found |= {"absmax": ((blocks, self.groups), np.uint8), "nested_absmax": ((nested,), np.float32)}
            found |= {"nested_map": ((256,), np.float32), "offset": ((), np.float32)}
        return found

    def to_ours(self, parts: Parts, q: Quantization) -> Parts:
        """Flat parts, in the order of the files, in the shapes of devices: views."""
        shapes = self.shapes(q)
        turned = {name: parts[name].reshape(self.groups, -1).T for name in ("codes", "absmax")}
        return {name: turned[name] if name in turned else parts[name].reshape(shapes[name][0]) for name in shapes}


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 numbers of bitsandbytes' signed dynamic code, rising: [256] float32. arXiv:1511.04561."""
    low, high, found = np.float32(0.1), np.float32(1), [0.0, 1.0]
    for i in range(7):
        n = 2**i + 1
        step, j = np.float64((high - low) / np.float32(n - 1)), np.arange(n)
        # As torch.linspace: from both ends, each number rounded once.
        bounds = np.where(j < n // 2, np.float64(low) + step * j, np.float64(high) - step * (n - 1 - j))
        bounds = bounds.astype(np.float32)
        means = np.float32(10 ** (i - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        found += [*means, *-means]
    return np.sort(np.array(found, np.float32))


@functools.cache
def _nearest() -> np.ndarray:
    """The code of each of 65,536 numbers from -1 to 1, by which the CPU build finds it: [65536] uint8."""
    grid = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    return np.abs(grid[:, None] - dynamic_map()).argmin(1).astype(np.uint8)


def quantize(matrix: np.ndarray, q: Quantization) -> Parts:
    """The flat parts of a matrix [out, in] of any floating dtype (`Layout.shapes` has their names and dtypes)."""
    if q.kind == "int8":
        return _quantize_rows(matrix)
    table = TABLES[q.kind]
    order = np.argsort(table, kind="stable").astype(np.uint8)
    bounds = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    flat = np.ascontiguousarray(matrix).reshape(-1)
    codes = np.empty(-(-flat.size // 2), np.uint8)
    absmax = np.empty(-(-flat.size // q.block), np.float32)

    def some(start: int, stop: int) -> None:
        piece = flat[start:stop].astype(np.float32)
        whole = piece.size // q.block * q.block
        blocks, scales = piece[:whole].reshape(-1, q.block), absmax[start // q.block : -(-stop // q.block)]
        np.abs(blocks).max(1, out=scales[: len(blocks)])
        blocks *= (np.float32(1) / np.maximum(scales[: len(blocks)], np.float32(1e-38)))[:, None]
        if whole < piece.size:  # the last block of a matrix that blocks do not divide
            scales[-1] = max(np.abs(piece[whole:]).max(), np.float32(1e-38))
            piece[whole:] /= scales[-1]
        np.clip(piece, -1, 1, out=piece)
        found = np.zeros(piece.size + piece.size % 2, np.uint8)
        if piece.size % 2:
            found[-1] = (bounds < 0).sum()  # the code of 0, which fills the last byte
        for bound in bounds:
            found[: piece.size] += piece > bound
        if q.kind != "nf4":
            found = order[found]
        codes[start // 2 : -(-stop // 2)] = found[::2] << 4 | found[1::2]

    _in_pieces(flat.size, some)
    return {"codes": codes, "absmax": absmax} | (_quantize_scales(absmax) if q.nested else {})


def _quantize_scales(absmax: np.ndarray) -> Parts:
    """Double quantization of scales: less their mean, in blocks of 256, each number the nearest of 256."""
    # torch sums in an order that depends on its threads: this is the sum that all of them approach.
    offset = np.float32(absmax.mean(dtype=np.float64))
    blocks = -(-absmax.size // NESTED_BLOCK)
    values = np.zeros(blocks * NESTED_BLOCK, np.float32)
    values[: absmax.size] = absmax - offset
    values = values.reshape(blocks, NESTED_BLOCK)
    largest = np.abs(values).max(1)
    values = values / np.where(largest > 0, largest, np.float32(1))[:, None]
    index = ((values + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)).astype(np.int32)
    codes = np.where(largest[:, None] > 0, _nearest()[index], np.uint8(0)).reshape(-1)[: absmax.size]
    return {"absmax": codes, "nested_absmax": largest, "nested_map": dynamic_map(), "offset": np.array([offset])}


def _quantize_rows(matrix: np.ndarray) -> Parts:
    """LLM.int8's codes and the largest magnitude of each row, of the matrix in float16."""
    codes, absmax = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    rows = max(_AT_ONCE // matrix.shape[1], 1)

    def some(start: int, stop: int) -> None:
        with np.errstate(over="ignore"):
            piece = matrix[start:stop].astype(np.float16).astype(np.float32)
        np.abs(piece).max(1, out=absmax[start:stop])
        # torch divides a number by a tensor so: rounded twice.
        scales = np.float32(1) / np.where(absmax[start:stop] > 0, absmax[start:stop], np.float32(1)) * np.float32(127)
        codes[start:stop] = np.rint(piece * scales[:, None])

    _in_pieces(len(matrix), some, rows)
    return {"codes": codes.reshape(-1), "absmax": absmax}


def dequantize(parts: Parts, shape: tuple[int, ...], q: Quantization) -> np.ndarray:
    """The matrix [out, in] float32 of flat parts."""
    out = np.empty(math.prod(shape), np.float32)
    if q.kind == "int8":
        codes, absmax = parts["codes"].reshape(shape), parts["absmax"].reshape(-1)[:, None]
        rows = out.reshape(shape)

        def some_rows(start: int, stop: int) -> None:
            rows[start:stop] = codes[start:stop] * absmax[start:stop] * np.float32(7.874015718698502e-3)

        _in_pieces(len(rows), some_rows, max(_AT_ONCE // shape[1], 1))
        return rows
    codes, absmax, table = parts["codes"].reshape(-1), scales(parts, q), TABLES[q.kind]

    def some(start: int, stop: int) -> None:
        bytes_ = codes[start // 2 : -(-stop // 2)]
        piece = table[np.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(-1)[: stop - start]]
        out[start:stop] = piece * np.repeat(absmax[start // q.block : -(-stop // q.block)], q.block)[: stop - start]

    _in_pieces(out.size, some)
    return out.reshape(shape)


def scales(parts: Parts, q: Quantization) -> np.ndarray:
    """The largest magnitude of each block, [blocks] float32, out of flat parts."""
    absmax = parts["absmax"].reshape(-1)
    if not q.nested:
        return absmax
    largest = np.repeat(parts["nested_absmax"].reshape(-1), NESTED_BLOCK)[: absmax.size]
    return parts["nested_map"][absmax] * largest + parts["offset"].reshape(())


def _in_pieces(size: int, some: Callable[[int, int], None], step: int = _AT_ONCE) -> None:
    """some(start, stop) over 0 to size by steps, on all cores; a step of _AT_ONCE is whole blocks."""
    starts = range(0, size, step)
    if len(starts) < 2:
        return some(0, size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda start: some(start, min(start + step, size)), starts):
            pass
