"""Low-rank adapters: y = x W + scale * (x A) B, A random, B zero (arXiv:2106.09685).

An adapter is two leaves beside the `kernel` that it adapts: `lora_a` [.., in, R] and `lora_b` [.., R, out], with
the head axes of the kernel kept apart. Its rank, targets and scale are a LoraConfig.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from longlora_jax.model_config import LoraConfig

INPUT_AXES = {"o_proj": 2}  # o_proj reads [N, H]; every other projection reads one axis


def apply_lora(x, lora_a, lora_b, *, input_axes: int, scale: float):
    """The adapter's share of a projection: scale * (x A) B.

    x: [..., *in]; lora_a: [*in, R]; lora_b: [R, *out]; input_axes: how many axes *in has. Returns [..., *out].
    """
    low: Any = _product(x, lora_a.astype(x.dtype), input_axes)
    y: Any = _product(low, lora_b.astype(x.dtype), 1)
    return y * jnp.asarray(scale, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, weights, input_axes: int):
    """jnp.tensordot, whose gradient of weights has the factor of fewer features first.

    XLA:CPU turns the first factor of such a product round. JAX's own gradient always has d_y first, which of B is the
    larger one by far.
    """
    return jnp.tensordot(x, weights, axes=input_axes)


def _product_forward(x, weights, input_axes: int):
    return _product(x, weights, input_axes), (x, weights)


def _product_backward(input_axes: int, residuals, d_y):
    x, weights = residuals
    outputs = tuple(range(input_axes - weights.ndim, 0))
    batch = tuple(range(x.ndim - input_axes))
    d_x = jnp.tensordot(d_y, weights, axes=(outputs, tuple(range(input_axes, weights.ndim))))
    if math.prod(weights.shape[:input_axes]) < math.prod(weights.shape[input_axes:]):
        return d_x, jnp.tensordot(x, d_y, axes=(batch, batch))
    d_weights = jnp.tensordot(d_y, x, axes=(batch, batch))
    return d_x, jnp.moveaxis(d_weights, range(-input_axes, 0), range(input_axes))


_product.defvjp(_product_forward, _product_backward)


def merge_lora(params, config: LoraConfig):
    """Folds every adapter into its kernel: W + scale * A B, summed in float32 and rounded once to W's dtype.

    params: a tree whose projections may hold lora_a and lora_b, with or without a leading layer axis. Returns a
    new tree without adapter leaves; the given one is not changed.
    """
    if not isinstance(params, dict):
        return params
    return {
        name: _merge_projection(name, child, config) if isinstance(child, dict) and "lora_a" in child
        else merge_lora(child, config)
        for name, child in params.items()
    }  # fmt: skip


def _merge_projection(name: str, weights: dict, config: LoraConfig) -> dict:
    kernel, a, b = weights["kernel"], weights["lora_a"], weights["lora_b"]
    axes = INPUT_AXES.get(name, 1)

    def one(kernel, a, b):
        update = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1)
        return (kernel.astype(jnp.float32) + config.scale * update).astype(kernel.dtype)

    layered = a.ndim == axes + 2
    merged = jax.lax.map(lambda leaf: one(*leaf), (kernel, a, b)) if layered else one(kernel, a, b)
    return {k: v for k, v in weights.items() if k not in ("kernel", "lora_a", "lora_b")} | {"kernel": merged}
