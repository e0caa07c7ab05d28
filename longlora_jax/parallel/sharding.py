"""Where everything lives: the mesh, one table of logical axes, and the shardings that follow from it."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.config import MeshConfig, ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.model.codes import Layout, Quantization, quantize
from longlora_jax.model.quantized import is_packed, packed_specs
from longlora_jax.weights.rules import Params, Rule, Table, get_leaf, set_leaf, weight_rules
from longlora_jax.weights.tensors import Tensor, reading

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis of a weight -> mesh axes. Axes that are not named here stay whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "context"),  # a context axis holds weights as well: they are gathered layer by layer
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
BATCH = P(("data", "fsdp"), "context")


def make_mesh(config: MeshConfig | None = None, devices=None) -> Mesh:
    """A mesh with axes data, fsdp, context, tensor over all devices (or those given); one axis may be -1, the rest.

    Sizes without a -1 may take fewer devices than there are: then the first ones are used, and the log says so.
    Raises UserError if the sizes ask for more devices, do not divide those for the rest, or leave a process of the run
    without any.
    """
    hosts = range(jax.process_count() if devices is None else 0)
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config or MeshConfig(), len(devices))
    used = math.prod(sizes)
    if idle := sorted(set(hosts) - {device.process_index for device in devices[:used]}):
        raise UserError(
            f"the mesh takes {used} of {len(devices)} devices, none of processes {', '.join(map(str, idle))}: "
            "set one of its axes to -1, or start fewer processes"
        )
    if used < len(devices):
        log.warning("the mesh takes %d of %d devices: set one of its axes to -1 to take all", used, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """make_mesh's mesh of so many devices that are not here: it says who holds what, and runs nothing."""
    return AbstractMesh(tuple(_sizes(config, count)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config: MeshConfig, count: int) -> list[int]:
    """Devices along each axis, out of so many; the axis that is -1 takes the rest."""
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) > count:
        shape = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"{shape} does not fit {count} devices: the sizes must multiply to no more, one may be -1, the rest"
        )
    return sizes


def weight_shardings(mesh: Mesh, logical_axes, shapes):
    """NamedShardings for a param tree from its logical axes (trees of PartitionSpec and of shapes).

    An axis that its mesh axis does not divide raises UserError; all of them in one message. Packed kernels are cut as
    far as their blocks allow.
    """
    faults = []

    def one(path, axes, shape):
        if is_packed(names := [key.key for key in path]):
            parts = get_leaf(shapes, names[:-1])
            layered = {name: x.shape[1:] for name, x in parts.items()}
            sides = get_leaf(logical_axes, names[:-1])["codes"][1:]
            return NamedSharding(mesh, P(None, *packed_specs(sides, layered, RULES, mesh)[names[-1]]))
        spec = _cuts(axes, shape.shape, mesh)
        for size, logical, cut_over in zip(shape.shape, axes, spec, strict=True):
            cuts = {a: mesh.shape[a] for a in cut_over if mesh.shape[a] > 1}
            if size % math.prod(cuts.values()):
                name = "/".join(key.key for key in path)
                cut = " x ".join(f"mesh.{a}={ways}" for a, ways in cuts.items())
                faults.append(f"{name}: axis {logical} of {size} by {cut}")
        return NamedSharding(mesh, P(*(cut_over or None for cut_over in spec)))

    specs = jax.tree_util.tree_map_with_path(one, logical_axes, shapes, is_leaf=lambda x: isinstance(x, P))
    if faults:
        raise UserError(f"the mesh does not divide {'; '.join(faults)}: choose a smaller mesh axis")
    return specs


def _cuts(axes, sizes, mesh: Mesh) -> list[tuple[str, ...]]:
    """The axes of the mesh that each axis of a weight is cut over.

    Of a kernel that writes the hidden size (o_proj, down_proj) the axis that it reads is cut in place of that one,
    where it is a multiple. To gather shares of a last axis, GPUs would turn them first: those of all layers at once,
    which were then held twice.
    """
    spec = [RULES.get(axis, ()) for axis in axes]
    if len(axes) > 2 and axes[0] == "layers" and axes[-1] == "embed" and spec[1]:
        both = (*spec[1], *spec[-1])
        if sizes[1] % math.prod(mesh.shape[axis] for axis in both) == 0:
            spec[1], spec[-1] = both, ()
    return spec


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """The sharding of a batch [B, ...]: rows over data and fsdp."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(
            f"{batch_size} rows a step cannot be cut over data x fsdp = {ways} devices: "
            "make batch_size / accumulation a multiple, or use fewer devices (mesh.data, mesh.fsdp)"
        )
    return NamedSharding(mesh, BATCH)


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> np.ndarray:
    """The rows of a batch [B, T] that the devices of this process hold, or a part of, in rising order."""
    rows, length = shape
    if length % (context := sharding.mesh.shape["context"]):
        raise UserError(f"seq_len={length} is not a multiple of mesh.context={context}: choose another of the two")
    held = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(rows)[index[0]] for index in held if index]))


def place_batch(batch, sharding: NamedSharding, rows: np.ndarray, batch_size: int):
    """Puts a batch on the mesh: leaves [B, T], of which this process has its local_rows, [len(rows), T] each."""

    def place(x):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start, index[1]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def place_weights(
    config: ModelConfig, table: Table, shardings, dtypes, quantization: Quantization | None = None
) -> Params:
    """Reads a model straight onto the mesh: a param tree of arrays in these shardings and dtypes (trees of both).

    quantization: how kernels are packed whose shardings are those of packed ones: as they are read, each host its rows
    of a tensor (with double quantization whole tensors, whose scales have a common mean).
    A host holds one tensor at a time, or rather its own rows of it: every device is given a share of the rows, cut
    over all axes of the mesh as far as they divide them, and passes on to the others what is theirs. So the hosts
    together read each tensor once, in whole rows, however it is sharded in the end.
    """
    params: Params = {}
    with reading("reading weights", table.values()) as read:
        for rule in weight_rules(config):
            sharding, dtype = get_leaf(shardings, rule.path), get_leaf(dtypes, rule.path)
            if isinstance(sharding, dict):
                assert quantization is not None
                leaf = _place_packed(config, table, rule, sharding, quantization, read)
                set_leaf(params, rule.path, leaf)
                continue
            rows = NamedSharding(sharding.mesh, _row_spec(rule, sharding.mesh))
            shape = (config.num_hidden_layers,) * rule.layered + rule.shape
            leaf, put = _place_for(shape, dtype, sharding)
            for i, name in enumerate(rule.names(config.num_hidden_layers)):
                leaf = put(leaf, _read_block(table[name], rule, rows, read), i)
                leaf.block_until_ready()  # else tensors that wait for their transfer pile up on the host
            set_leaf(params, rule.path, leaf)
    return params


def _place_packed(config: ModelConfig, table: Table, rule: Rule, shardings, q: Quantization, read) -> Params:
    """The parts of one packed kernel, all layers: as the table has them, or quantized."""
    layout = Layout.of(rule.hf_shape, q)
    leaves, puts = {}, {}
    for part, (shape, dtype) in layout.shapes(q).items():
        leaves[part], puts[part] = _place_for((config.num_hidden_layers, *shape), dtype, shardings[part])
    for i, name in enumerate(rule.names(config.num_hidden_layers)):
        for part, block in _read_packed(table[name], layout, q, shardings["codes"].mesh, read).items():
            leaves[part] = puts[part](leaves[part], block, i)
            leaves[part].block_until_ready()
    return leaves


def _read_packed(tensor: Tensor, layout: Layout, q: Quantization, mesh: Mesh, read) -> dict[str, jax.Array]:
    """The parts of one tensor, cut over its rows as far as the mesh divides them."""
    ways, axes = 1, []
    for name, size in mesh.shape.items():
        if layout.groups % (ways * size) == 0:
            ways, axes = ways * size, [*axes, name]
    assert tensor.quantization in (None, q), "bnb.agreed has refused what would be quantized twice"
    array = None if tensor.packed else read(tensor)
    whole = read(tensor, packed=True) if array is None else quantize(array, q) if q.nested else None

    @functools.cache
    def rows(start: int, stop: int) -> dict[str, np.ndarray]:
        """The parts of some groups of rows, those that are cut."""
        if whole is not None:
            ours = layout.to_ours(whole, q)
            return {part: ours[part][:, start:stop] for part in ("codes", "absmax")}
        assert array is not None
        count = len(array) // layout.groups
        return Layout(stop - start, layout.size).to_ours(quantize(array[start * count : stop * count], q), q)

    def part(name: str, shape: tuple[int, ...]) -> jax.Array:
        def cut(index):
            return rows(*index[1].indices(layout.groups)[:2])[name]

        def all_of_it(index):
            assert whole is not None
            return layout.to_ours(whole, q)[name]

        spec, get = (P(None, tuple(axes)), cut) if len(shape) == 2 else (P(), all_of_it)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), get)

    return {name: part(name, shape) for name, (shape, _) in layout.shapes(q).items()}


def _row_spec(rule: Rule, mesh: Mesh) -> P:
    """Hugging Face's first axis over as many axes of the mesh as divide it."""
    axis, ways, axes = rule.axes_in_hf_order()[0], 1, []
    for name, size in mesh.shape.items():
        if rule.shape[axis] % (ways * size) == 0:
            ways, axes = ways * size, [*axes, name]
    return P(*[None] * axis, tuple(axes))


def _read_block(tensor: Tensor, rule: Rule, sharding: NamedSharding, read) -> jax.Array:
    array = rule.to_ours(read(tensor))  # a view: what no device here asks for is not read
    return jax.make_array_from_callback(rule.shape, sharding, lambda index: array[index])


def _place_for(shape: tuple[int, ...], dtype, sharding: NamedSharding):
    """(a leaf of zeros, what writes block i into it)."""
    zeros, put = _placing(shape, jnp.dtype(dtype), sharding)
    return zeros(), put


@functools.lru_cache(maxsize=256)
def _placing(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding):
    """The two programs of _place_for: who reads several models of one shape, or one several times, compiles once."""
    zeros = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)
    return zeros, jax.jit(_put, donate_argnums=0, out_shardings=sharding)


def _put(leaf, block, i):
    start = (0,) * block.ndim if block.ndim == leaf.ndim else (i, *(0,) * block.ndim)
    block = block.astype(leaf.dtype).reshape((1,) * (leaf.ndim - block.ndim) + block.shape)
    return jax.lax.dynamic_update_slice(leaf, block, start)
