"""Kernels that stay packed: what a block holds in place of a kernel, and the kernel that it computes of it.

A packed kernel is the bytes and the scales of bitsandbytes (model/codes.py) turned as kernels are, inputs first. It is
unpacked where it is multiplied, once forward and once backward, and never kept: what is kept is packed, on a mesh a
share of it is, and what is gathered is packed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.model.codes import NESTED_BLOCK, TABLES, Layout, Quantization

KERNEL = "kernel"
# What stays cut when a kernel is gathered.
_OVER_TENSOR: dict[str, tuple[str, ...]] = dict.fromkeys(("heads", "kv_heads", "mlp"), ("tensor",))


class Quantized(flax.struct.PyTreeNode):
    """A kernel [*in, *out] in codes: `parts` as Layout.shapes has them.

    shape: the kernel's; names: logical axes of its inputs and outputs; mesh: where it is cut, None for one device.
    """

    parts: dict[str, jax.Array]
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    input_axes: int = flax.struct.field(pytree_node=False)
    quantization: Quantization = flax.struct.field(pytree_node=False)
    names: tuple[str, str] = flax.struct.field(pytree_node=False, default=("", ""))
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)

    def kernel(self, dtype) -> jax.Array:
        """The kernel in dtype: each number is computed in float32 and rounded once."""
        q, (out, inputs) = self.quantization, hf_shape(self.shape, self.input_axes)
        layout = Layout.of((out, inputs), q)
        parts = self._gathered()
        if q.kind == "int8":
            scale = parts["absmax"] * np.float32(7.874015718698502e-3)
            kernel = (parts["codes"].astype(jnp.float32) * scale).astype(dtype)
            return kernel.reshape(self.shape)
        codes, scales = parts["codes"], _scales(parts, layout, q)
        blocks, groups = scales.shape
        if codes.shape[0] * 2 < blocks * q.block:  # the last block is short
            codes = jnp.pad(codes, ((0, blocks * q.block // 2 - codes.shape[0]), (0, 0)))
        codes = codes.reshape(blocks, q.block // 2, 1, groups)
        both = jnp.concatenate([codes >> 4, codes & 15], axis=2)
        numbers = (_look_up(TABLES[q.kind], both) * scales[:, None, None]).astype(dtype)
        numbers = numbers.reshape(-1, groups)[: layout.size]
        if layout.size != inputs:  # rows of a group lie one after the other
            numbers = numbers.reshape(-1, inputs, groups).transpose(1, 2, 0)
        return numbers.reshape(self.shape)

    def _gathered(self) -> dict[str, jax.Array]:
        """The parts on every device but for a tensor axis, whose share stays where it is."""
        if self.mesh is None or self.mesh.size == 1:
            return self.parts
        shapes = {name: x.shape for name, x in self.parts.items()}
        specs = packed_specs(self.names, shapes, _OVER_TENSOR, self.mesh)
        where = {name: NamedSharding(self.mesh, spec) for name, spec in specs.items()}
        return jax.lax.with_sharding_constraint(self.parts, where)


def hf_shape(shape: Sequence[int], input_axes: int) -> tuple[int, int]:
    """[out, in] of a kernel [*in, *out]."""
    return math.prod(shape[input_axes:]), math.prod(shape[:input_axes])


def declare(shape: Sequence[int], input_axes: int, names: tuple[str, str], q: Quantization):
    """An initializer of a packed kernel for flax: zeros, with logical axes."""
    shapes = Layout.of(hf_shape(shape, input_axes), q).shapes(q)

    def init(key) -> dict[str, Any]:
        return {
            name: nn.LogicallyPartitioned(jnp.zeros(shape, dtype), names if len(shape) == 2 else (None,) * len(shape))
            for name, (shape, dtype) in shapes.items()
        }

    return init


def is_packed(path: Sequence[str]) -> bool:
    """Whether a path of a param tree is that of a part of a packed kernel."""
    return len(path) > 1 and path[-2] == KERNEL


def packed_specs(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], rules: Mapping[str, tuple[str, ...]], mesh
) -> dict[str, P]:
    """Where the parts of a packed kernel lie: {part: spec}; shapes: those of all its parts, without a layer axis.

    An axis of the mesh cuts what it cuts of the plain kernel (parallel/sharding.py) where whole blocks are left, else
    the other side, else nothing: a kernel can be kept packed on every mesh.
    """
    units = shapes["absmax"]  # what can be cut: blocks, and groups of rows
    if units[0] == 1:  # int8, whose rows have one scale
        units = shapes["codes"]
    cut: list[list[str]] = [[], []]
    for place, name in enumerate(names):
        first = 0 if name == "embed" else place
        for axis in rules.get(name, ()):
            for side in (first, 1 - first):
                ways = mesh.shape[axis] * math.prod(mesh.shape[a] for a in cut[side])
                if units[side] % ways == 0:
                    cut[side].append(axis)
                    break
    spec = P(*(tuple(axes) or None for axes in cut))
    whole = {part: P(*(None,) * len(shape)) for part, shape in shapes.items()}
    found = whole | {"codes": spec, "absmax": spec if shapes["absmax"][0] == units[0] else P(None, spec[1])}
    if shapes["codes"][0] % units[0]:  # a last block that is short
        found["codes"] = P(None, spec[1])
    return found


def _scales(parts: Mapping[str, jax.Array], layout: Layout, q: Quantization) -> jax.Array:
    """The largest magnitude of each block: [blocks of a group, groups] float32."""
    absmax = parts["absmax"]
    if not q.nested:
        return absmax
    largest = jnp.repeat(parts["nested_absmax"], NESTED_BLOCK)[: absmax.size].reshape(layout.groups, -1).T
    return jnp.take(parts["nested_map"], absmax.astype(jnp.int32)) * largest + parts["offset"]


def _look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """table[codes] float32, by halves: a table of 16 is four choices, where a gather is slow on every device."""
    bits = [(codes & (1 << i)) != 0 for i in range(4)]
    found: list[Any] = [np.float32(x) for x in table]
    for bit in bits:
        found = [jnp.where(bit, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]
