"""Folders that bitsandbytes quantized, as transformers saves them: their matrices in codes, read as matrices.

A matrix in four bits is `X.weight` (codes), `X.weight.absmax`, `X.weight.quant_map`, with double quantization
`X.weight.nested_absmax` and `X.weight.nested_quant_map`, and JSON in `X.weight.quant_state.bitsandbytes__nf4`; one in
eight bits is `X.weight` (int8) and `X.SCB`. Imports neither jax nor torch.
"""

import math

import numpy as np

from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.files import one_line, parse_json
from longlora_jax.model.codes import NESTED_BLOCK, Parts, Quantization, dequantize
from longlora_jax.weights.rules import Table, weight_rules
from longlora_jax.weights.tensors import DTYPES, Tensor

_STATE = ".quant_state.bitsandbytes__"
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def unpacked(table: Table) -> tuple[dict[str, Tensor], list[str]]:
    """The table with matrices in place of codes and scales, and what is wrong with them.

    A matrix is read in the dtype that bitsandbytes dequantizes it to, to the bit: the one that it was quantized from in
    four bits, float32 in eight. Tensor.packed gives its codes.
    """
    rest, found, faults = dict(table), {}, []
    for key in table:
        name, mark, kind = key.partition(_STATE)
        is_rows = key.endswith(".SCB")
        if not mark and not is_rows:
            continue
        name = f"{key.removesuffix('.SCB')}.weight" if is_rows else name
        try:
            found[name] = _rows(table, name) if is_rows else _blocks(table, name, kind)
        except (KeyError, TypeError, ValueError) as error:
            fault = f"has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            faults.append(f"{name} is quantized and damaged, fetch it again ({one_line(fault, 150)})")
        extra = (key, f"{name}_format") if is_rows else (key, *(f"{name}.{part}" for part in _PARTS))
        for used in (*extra, *((name,) if name not in found else ())):
            rest.pop(used, None)
    return rest | found, faults


def _blocks(table: Table, name: str, kind: str) -> Tensor:
    """A matrix in four bits."""
    state = parse_json(_bytes(table[f"{name}{_STATE}{kind}"]))
    if kind not in ("nf4", "fp4") or state["quant_type"] != kind:
        raise ValueError(f"it is of a kind {kind!r}, neither nf4 nor fp4")
    block, shape, dtype = state["blocksize"], tuple(state["shape"]), DTYPES.get(state["dtype"])
    if block not in _BLOCKS or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape) or dtype is None:
        raise ValueError(f"blocksize {block}, shape {state['shape']}, dtype {state['dtype']}")
    q = Quantization(kind, f"{name}.nested_absmax" in table, block)
    numbers = math.prod(shape)
    blocks = -(-numbers // block)
    scales = _of(table, f"{name}.absmax", np.uint8 if q.nested else np.float32, blocks)
    sources = {"codes": table[name], "absmax": scales}
    if q.nested:
        if state["nested_blocksize"] != NESTED_BLOCK:
            raise ValueError(f"nested_blocksize is {state['nested_blocksize']}, it must be {NESTED_BLOCK}")
        sources["nested_absmax"] = _of(table, f"{name}.nested_absmax", np.float32, -(-blocks // NESTED_BLOCK))
        sources["nested_map"] = _of(table, f"{name}.nested_quant_map", np.float32, 256)
        offset = np.array([float(state["nested_offset"])], np.float32)
        sources["offset"] = Tensor(offset.dtype, (1,), lambda: offset)
    _bytes(table[name], -(-numbers // 2))

    def packed() -> Parts:
        parts = {part: tensor.read().reshape(-1) for part, tensor in sources.items()}
        return parts | {"codes": parts["codes"].view(np.uint8)}  # quant_storage may be any dtype

    def read() -> np.ndarray:
        return dequantize(packed(), shape, q).astype(dtype)

    return Tensor(dtype, shape, read, packed, q)


def _rows(table: Table, name: str) -> Tensor:
    """A matrix in eight bits."""
    codes, q = table[name], Quantization("int8")
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise ValueError(f"it is {codes.dtype} {list(codes.shape)}, not I8 [out, in]")
    if f"{name}_format" in table and any(_bytes(table[f"{name}_format"])):
        raise ValueError(f"{name}_format is not that of rows: save it again with bitsandbytes 0.45 or later")
    scales = _of(table, f"{name.removesuffix('.weight')}.SCB", np.float32, codes.shape[0])

    def packed() -> Parts:
        return {"codes": codes.read().reshape(-1), "absmax": scales.read().reshape(-1)}

    def read() -> np.ndarray:
        return dequantize(packed(), codes.shape, q)

    return Tensor(DTYPES["float32"], codes.shape, read, packed, q)


def _of(table: Table, name: str, dtype: type, size: int) -> Tensor:
    """The tensor of a name, which must have so many elements of a dtype."""
    tensor = table[name]
    kinds = {np.uint8: "U8", np.float32: DTYPES["float32"]}
    if tensor.dtype != kinds[dtype] or math.prod(tensor.shape) != size:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {size} of {np.dtype(dtype)}")
    return tensor


def _bytes(tensor: Tensor, size: int | None = None) -> bytes:
    """The bytes of a small tensor; with a size, only whether it has so many."""
    if tensor.dtype != "U8" and not isinstance(tensor.dtype, np.dtype):
        raise ValueError(f"it is stored as {tensor.dtype}")
    width = 1 if tensor.dtype == "U8" else np.dtype(tensor.dtype).itemsize
    have = math.prod(tensor.shape) * width
    if size is not None:
        if have != size and not (width > 1 and 0 < have - size < width):
            raise ValueError(f"it has {have} bytes of codes, not {size}")
        return b""
    if have > 1 << 16:
        raise ValueError(f"{have} bytes describe it")
    return tensor.read().tobytes()


def of_table(config: ModelConfig, table: Table) -> tuple[Quantization | None, bool]:
    """(how the blocks' matrices are kept, whether all are kept so); (None, True) for plain ones."""
    names = [
        name
        for rule in weight_rules(config)
        if rule.input_axes and rule.layered
        for name in rule.names(config.num_hidden_layers)
    ]
    kinds = {table[name].quantization for name in names}
    found = next(iter(kinds - {None}), None)
    return found, len(kinds) == 1


def agreed(config: ModelConfig, table: Table, wanted: str, where: str) -> Quantization | None:
    """How a base is to be kept in a run or a command that asks for `wanted` (config.base_quantization).

    Raises UserError where it is quantized on the disk and something else is asked for.
    """
    asked = Quantization.of(wanted)
    found, all_of_them = of_table(config, table)
    if asked is None or found is None:
        if asked and asked.kind == "fp4":
            raise UserError(f"{where} is not quantized, and {wanted} is only read: use nf4, or none")
        return asked or (found if all_of_them else None)
    if asked == found and all_of_them:
        return asked
    kept = str(found) if all_of_them else f"{found} in part"
    raise UserError(
        f"{where} is quantized already ({kept}), and {wanted} would quantize it twice: ask for "
        f"{found if all_of_them else 'none'}, or give the folder in 16 or 32 bits that it was made of"
    )


def name_of(q: Quantization | None) -> str:
    """The name of a quantization in a config; "none" for None and for blocks of another size than a config's."""
    return str(q) if q is not None and q == Quantization.of(q.kind + "_double" * q.nested) else "none"
