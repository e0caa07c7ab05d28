"""Between the names that a family's files have and the ones that every other module works with, which are LLaMA's.

A fused matrix is read part by part as views of its rows, and put together again when it is written. Norms that are
stored head by head are one here.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.families import Family, Fused, family_of
from longlora_jax.weights.rules import Table, weight_rules
from longlora_jax.weights.tensors import Tensor

_IN_LAYER = re.compile(r"(.*layers\.\d+\.)(.+)\.(weight|bias)")


def our_name(family: Family, name: str) -> str:
    """LLaMA's name of a weight that a family's file calls so; a fused one keeps the name of its module."""
    return _renamed(name, {theirs: ours for ours, theirs in family.renames.items()})


def their_name(family: Family, name: str) -> str:
    """What a family's file calls a weight; the inverse of our_name."""
    return _renamed(name, family.renames)


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", lambda match, new=new: match[1] + new, name)
    return name


def to_ours(config: ModelConfig, table: Table) -> tuple[dict[str, Tensor], list[str]]:
    """A family's table under LLaMA's names, fused matrices taken apart; and what of it has a wrong shape."""
    family, faults = family_of(config), []
    table = _heads_together(family, table)
    if not family.renames and not family.fused:
        return dict(table), []
    shapes = {rule.name: rule.hf_shape for rule in weight_rules(config)}
    ours: dict[str, Tensor] = {}
    for name, tensor in table.items():
        match = _IN_LAYER.fullmatch(name)
        fused = next((f for f in family.fused if match and match[2] == f.name), None)
        if match is None or fused is None:
            ours[our_name(family, name)] = tensor
            continue
        before = our_name(family, match[1] + "x").removesuffix("x")
        parts = [f"{part}.{match[3]}" for part in fused.parts]
        known = [shapes.get(f"model.layers.{{}}.{part}") for part in parts]
        if any(shape is None for shape in known):
            ours[name] = tensor  # said as unexpected
            continue
        sizes = [shape[0] for shape in known if shape]
        needed = (sum(sizes), *(known[0] or ())[1:])
        if tensor.shape != needed:
            faults.append(f"{name} has shape {list(tensor.shape)}, it must be {list(needed)}")
            continue
        for i, part in enumerate(parts):
            shape = known[i] or ()

            def read(tensor=tensor, i=i, shape=shape, fused=fused, sizes=sizes):
                return take_rows(tensor.read(), i, sizes, fused, config).reshape(shape)

            ours[before + part] = Tensor(tensor.dtype, shape, read)
    return ours, faults


def take_rows(array: np.ndarray, part: int, sizes: Sequence[int], fused: Fused, config: ModelConfig) -> np.ndarray:
    """The rows of one part of a fused matrix [sum of sizes, ...]."""
    if fused.by_head:
        heads = array.reshape(config.num_attention_heads, len(sizes), -1, *array.shape[1:])
        return heads[:, part].reshape(sizes[part], *array.shape[1:])
    start = sum(sizes[:part])
    return array[start : start + sizes[part]]


def join_rows(arrays: Sequence[np.ndarray], fused: Fused, config: ModelConfig) -> np.ndarray:
    """The fused matrix of its parts; the inverse of take_rows."""
    if fused.by_head:
        heads = [a.reshape(config.num_attention_heads, -1, *a.shape[1:]) for a in arrays]
        return np.stack(heads, axis=1).reshape(-1, *arrays[0].shape[1:])
    return np.concatenate(arrays)


def to_theirs(config: ModelConfig, table: Table) -> dict[str, Tensor]:
    """A table under LLaMA's names in the family's own layout: its names, and fused what its files have fused."""
    family = family_of(config)
    table = _heads_apart(config, family, table)
    if not family.renames and not family.fused:
        return dict(table)
    theirs: dict[str, Tensor] = {}
    for name, tensor in table.items():
        match = _IN_LAYER.fullmatch(name)
        fused = next((f for f in family.fused if match and match[2] in f.parts), None)
        if match is None or fused is None:
            theirs[their_name(family, name)] = tensor
        elif match[2] == fused.parts[0]:
            parts = [table[f"{match[1]}{part}.{match[3]}"] for part in fused.parts]
            shape = (sum(part.shape[0] for part in parts), *tensor.shape[1:])
            kinds = {part.dtype for part in parts}
            dtype = tensor.dtype if len(kinds) == 1 else np.dtype(np.float32)

            def read(parts=parts, fused=fused, dtype=dtype):
                return join_rows([part.read() for part in parts], fused, config).astype(dtype, copy=False)

            before = their_name(family, match[1] + "x").removesuffix("x")
            theirs[f"{before}{fused.name}.{match[3]}"] = Tensor(dtype, shape, read)
    return theirs


def _heads_together(family: Family, table: Table) -> Table:
    """The table with the norms of a family's heads [H] each put together to one [N * H].

    Where a head is missing or has a shape of its own, its tensors stay as they are, to be said as unexpected.
    """
    for ours, theirs in family.each_head.items():
        one_head = re.compile(rf"(.*\.){re.escape(theirs)}\.norms\.\d+\.weight")
        for before in dict.fromkeys(match[1] for name in table if (match := one_head.fullmatch(name))):
            names = [name for name in table if name.startswith(f"{before}{theirs}.norms.")]
            in_order = [f"{before}{theirs}.norms.{i}.weight" for i in range(len(names))]
            tensors = [table[name] for name in in_order if name in table]
            if len(tensors) < len(names) or len({t.shape for t in tensors}) > 1 or len(tensors[0].shape) != 1:
                continue
            kinds = {t.dtype for t in tensors}

            def read(tensors=tensors):
                return np.concatenate([t.read() for t in tensors])

            dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
            joined = Tensor(dtype, (sum(t.shape[0] for t in tensors),), read)
            table = {n: t for n, t in table.items() if n not in names} | {f"{before}{ours}.weight": joined}
    return table


def _heads_apart(config: ModelConfig, family: Family, table: Table) -> Table:
    """The inverse of _heads_together."""
    apart: dict[str, Tensor] = {}
    for name, tensor in table.items():
        match = _IN_LAYER.fullmatch(name)
        if match is None or match[2] not in family.each_head:
            apart[name] = tensor
            continue
        size = config.head_dim
        for i in range(tensor.shape[0] // size):

            def read(tensor=tensor, i=i, size=size):
                return tensor.read()[i * size : (i + 1) * size]

            name = f"{match[1]}{family.each_head[match[2]]}.norms.{i}.weight"
            apart[name] = Tensor(tensor.dtype, (size,), read)
    return apart
