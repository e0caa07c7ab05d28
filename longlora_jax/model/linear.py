"""What a block computes with its weights, as values that can be cut and handed on; and a block's work in chunks.

A model computes a block's attention over all heads and its MLP over the whole sequence at once. Of a very long
sequence neither fits: then heads come a few at a time, the sequence a piece at a time, and each chunk's forward pass
is computed once more in its backward pass.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.attention.context_parallel import row_axes
from longlora_jax.attention.kernels import platform
from longlora_jax.errors import UserError
from longlora_jax.model.lora import apply_lora
from longlora_jax.model.quantized import Quantized


def project(x, kernel, input_axes: int = 1, *, merge: bool = True):
    """x W: x [..., *in], kernel [*in, *out] with input_axes axes *in, in x's dtype. Returns [..., *out].

    merge: compute with one axis of rows and one of features, which is not possible where the sequence is cut.
    """
    if not merge:
        return jnp.tensordot(x, kernel.astype(x.dtype), axes=input_axes)
    batch, inputs = x.shape[: x.ndim - input_axes], math.prod(kernel.shape[:input_axes])
    # XLA:CPU computes the gradient of W twice as fast so.
    y = x.reshape(-1, inputs) @ kernel.astype(x.dtype).reshape(inputs, -1)
    return y.reshape(*batch, *kernel.shape[input_axes:])


class Norm(flax.struct.PyTreeNode):
    """A normalization of the last axes, computed in float32. scale: [D] or [N, D]; bias: likewise.

    over: how many of the last axes are normalized together, all of scale's for None.

    kind: rms, x / rms(x) * scale (arXiv:1910.07467); rms_unit_offset, times 1 + scale, rounded once (Gemma's); layer,
    (x - mean) / std * scale + bias (arXiv:1607.06450).
    """

    scale: jax.Array
    bias: jax.Array | None
    eps: float = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False)
    over: int | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, x):
        """x: [..., *scale.shape]."""
        over = self.over or self.scale.ndim
        x32: Any = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 -= jnp.mean(x32, axis=tuple(range(-over, 0)), keepdims=True)
        x32 = _by_rms(x32, over, self.eps)
        if self.kind == "rms":
            return x32.astype(x.dtype) * jnp.broadcast_to(self.scale.astype(x.dtype), x.shape)
        scale = self.scale.astype(jnp.float32) + (1 if self.kind == "rms_unit_offset" else 0)
        x32 *= jnp.broadcast_to(scale, x.shape)
        if self.bias is not None:
            x32 += jnp.broadcast_to(self.bias.astype(jnp.float32), x.shape)
        return x32.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_rms(x, over: int, eps: float):
    """x / sqrt(mean of x^2 over the last axes, so many, + eps): [...] float32."""
    return _by_rms_forward(x, over, eps)[0]


def _by_rms_forward(x, over: int, eps: float):
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=tuple(range(-over, 0)), keepdims=True) + eps)
    return x * inverse, (x, inverse)


def _by_rms_backward(over: int, eps: float, residuals, d_y):
    x, inverse = residuals
    axes = tuple(range(x.ndim - over, x.ndim))
    if platform() == "cpu":
        # The sum of a product takes twenty times as long there where the batch is one row.
        dims = tuple(range(x.ndim))
        along = jnp.expand_dims(jnp.einsum(x, dims, d_y, dims, dims[: x.ndim - over]), axes)
    else:
        along = jnp.sum(x * d_y, axis=axes, keepdims=True)
    return ((d_y - x * (along * inverse**2 / math.prod(x.shape[-over:]))) * inverse,)


_by_rms.defvjp(_by_rms_forward, _by_rms_backward)


class Linear(flax.struct.PyTreeNode):
    """x -> x W (+ bias) (+ scale * (x A) B): kernel [*in, *out], bias [*out], lora_a [*in, R], lora_b [R, *out].

    kernel: perhaps packed; dropout_key: of the adapter's input, None without dropout.
    """

    kernel: jax.Array | Quantized
    bias: jax.Array | None
    lora_a: jax.Array | None
    lora_b: jax.Array | None
    dropout_key: jax.Array | None
    input_axes: int = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False)
    merge: bool = flax.struct.field(pytree_node=False)

    def __call__(self, x):
        """x: [..., *in]. Returns [..., *out] in x's dtype."""
        y = self._product(x)
        if self.bias is not None:
            y += jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)
        if self.lora_a is not None:
            if self.dropout_key is not None:
                keep = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.dropout), 0)
            y += apply_lora(x, self.lora_a, self.lora_b, input_axes=self.input_axes, scale=self.scale)
        return checkpoint_name(y, "product")

    def _product(self, x):
        kernel, how = self.kernel, {"input_axes": self.input_axes, "merge": self.merge}
        if not isinstance(kernel, Quantized):
            return project(x, kernel, **how)
        # What its backward pass is left with are codes: it unpacks them again.
        product = jax.checkpoint(lambda x, packed: project(x, packed.kernel(x.dtype), **how), prevent_cse=False)
        return product(x, kernel)

    def unpacked(self, dtype) -> "Linear":
        """The same with a kernel that is not packed, in dtype."""
        return self.replace(kernel=self.kernel.kernel(dtype)) if isinstance(self.kernel, Quantized) else self

    def split_heads(self, chunks: int, parts: int) -> "Linear":
        """The output's heads shared out: leaves get a leading axis [chunks], with heads of every part in each chunk.

        parts: halves of the heads that attention treats alike within, 1 or 2.
        """

        def split(x, axis: int):
            if x is None:
                return None
            n, before = x.shape[axis], x.shape[:axis]
            x = x.reshape(*before, parts, chunks, n // parts // chunks, *x.shape[axis + 1 :])
            x = jnp.moveaxis(x, axis + 1, 0)
            return x.reshape(chunks, *before, n // chunks, *x.shape[axis + 3 :])

        def repeat(x):
            return None if x is None else jnp.broadcast_to(x, (chunks, *x.shape))

        keys = None if self.dropout_key is None else jax.random.split(self.dropout_key, chunks)
        return self.replace(
            kernel=split(self.kernel, 1),
            bias=split(self.bias, 0),
            lora_a=repeat(self.lora_a),
            lora_b=split(self.lora_b, 1),
            dropout_key=keys,
        )


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class FeedForward(flax.struct.PyTreeNode):
    """down(act(gate x) * up x) (arXiv:2002.05202), or down(act(up x)) without a gate; act: out of ACTIVATIONS."""

    gate: Linear | None
    up: Linear
    down: Linear
    act: str = flax.struct.field(pytree_node=False)

    def __call__(self, x):
        """x: [..., D]."""
        act = ACTIVATIONS[self.act]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


def over_heads(attend_heads, q: Linear, k: Linear, v: Linear, x, *, mesh: Mesh | None, chunks: int, parts: int):
    """attend_heads(q, k, v, x) -> [B, T, n, H], for a share of the heads at a time: [B, T, N, H] of all."""
    if chunks == 1:
        return attend_heads(q, k, v, x)
    chunk = jax.checkpoint(lambda weights: attend_heads(*weights, x))

    def one(out, index_and_weights):
        index, weights = index_and_weights
        y = chunk(weights)
        y = y.reshape(*y.shape[:2], parts, 1, -1, y.shape[-1])
        return jax.lax.dynamic_update_slice_in_dim(out, y, index, axis=3), None

    # Every chunk writes where its heads belong: stacked chunks would be as large again when they are put in order.
    n, h = q.kernel.shape[1:]
    out = jnp.zeros((*x.shape[:2], parts, chunks, n // parts // chunks, h), x.dtype)
    weights = tuple(w.split_heads(chunks, parts) for w in _gathered((q, k, v), mesh, x.dtype))
    out, _ = jax.lax.scan(one, out, (jnp.arange(chunks), weights))
    return out.reshape(*x.shape[:2], n, h)


def over_sequence(f, weights, *arrays, mesh: Mesh | None, chunks: int):
    """f(weights, *arrays) for a share of every device's tokens at a time; arrays: [B, T, ...], as f's result.

    f treats every token by itself. weights: a tree of Linear and Norm.
    """
    if chunks == 1:
        return f(weights, *arrays)
    b, t = arrays[0].shape[:2]
    context = 1 if mesh is None else mesh.shape["context"]
    if t % (context * chunks):
        raise UserError(
            f"{t // context} tokens a device are not a multiple of chunks={chunks}: set chunks to a divisor of them"
        )

    def held(x, *where):
        if mesh is None or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*where)))

    def cut(x):
        x = jnp.moveaxis(x.reshape(b, context, chunks, t // context // chunks, *x.shape[2:]), 2, 0)
        return held(x, None, rows, "context", *(P.UNCONSTRAINED,) * (x.ndim - 3))

    def one(index_and_pieces):
        index, pieces = index_and_pieces
        y = f(_of_chunk(weights, index), *(x.reshape(b, -1, *x.shape[3:]) for x in pieces))
        return y.reshape(*pieces[0].shape[:3], *y.shape[2:])

    rows = () if mesh is None else row_axes(b, mesh)
    weights = _gathered(weights, mesh, arrays[0].dtype)
    out = jax.lax.map(jax.checkpoint(one), (jnp.arange(chunks), tuple(map(cut, arrays))))
    return jnp.moveaxis(held(out, None, rows, "context"), 0, 2).reshape(b, t, *out.shape[4:])


def _gathered(weights, mesh: Mesh | None, dtype):
    """Weights on every device, so that they are gathered, and unpacked to dtype, once and not by every chunk.

    Features over a tensor axis stay where they are.
    """
    weights = jax.tree.map(
        lambda w: w.unpacked(dtype) if isinstance(w, Linear) else w, weights, is_leaf=lambda w: isinstance(w, Linear)
    )
    if mesh is None or mesh.size == 1 or mesh.shape["tensor"] > 1:
        return weights
    return jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))


def _of_chunk(weights, index):
    """The same weights, with dropout of its own for a chunk."""

    def one(w):
        if isinstance(w, Linear) and w.dropout_key is not None:
            return w.replace(dropout_key=jax.random.fold_in(w.dropout_key, index))
        return w

    return jax.tree.map(one, weights, is_leaf=lambda w: isinstance(w, Linear))


def head_chunks(wanted: int, num_heads: int, num_kv_heads: int, parts: int, shares: int) -> int:
    """The most chunks up to `wanted` that cut every part's heads evenly, each chunk a multiple of `shares` heads."""

    def fits(chunks: int) -> bool:
        return all(n % (parts * chunks) == 0 and n // chunks % shares == 0 for n in (num_heads, num_kv_heads))

    return next((c for c in range(wanted, 1, -1) if fits(c)), 1)
