"""Gradients that are written out for the sake of speed: JAX's own of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlora_jax.attention.kernels import compiled_for
from longlora_jax.model.linear import Norm
from longlora_jax.model.lora import apply_lora

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # other orders of sums of at most 60 products in float32


def numbers(*shape, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_same_gradients(f, plain, *args):
    weights = numbers(*jax.eval_shape(plain, *args).shape, seed=9)
    found, wanted = (
        jax.value_and_grad(lambda *args, g=g: jnp.sum(g(*args) * weights), argnums=range(len(args)))(*args)
        for g in (f, plain)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), found, wanted)


@pytest.mark.parametrize(("inputs", "outputs"), [((12,), (5,)), ((3, 4), (12,)), ((2,), (3, 4))], ids=str)
def test_gradients_of_an_adapter(inputs, outputs):
    """Catches: axes that are turned wrongly, of either order of the factors (more features in, more out)."""
    x, a, b = numbers(2, 6, *inputs), numbers(*inputs, 4, seed=1), numbers(4, *outputs, seed=2)

    def plain(x, a, b):
        low = jnp.tensordot(x, a, axes=len(inputs))
        return 0.5 * jnp.tensordot(low, b, axes=1)

    assert_same_gradients(lambda *args: apply_lora(*args, input_axes=len(inputs), scale=0.5), plain, x, a, b)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["rms", "rms_unit_offset", "layer"])
@pytest.mark.parametrize(("shape", "over"), [((12,), None), ((3, 4), None), ((3, 4), 1)], ids=str)
def test_gradients_of_a_norm(shape, over, kind, platform):
    """Catches: a mean over other axes, a lost eps (as large as x here), the other platform's sum gone astray."""
    x, scale, bias = numbers(2, 5, *shape), numbers(*shape, seed=1), numbers(*shape, seed=2)
    axes = tuple(range(-(over or len(shape)), 0))

    def plain(x, scale):
        mean = x.mean(axes, keepdims=True) if kind == "layer" else 0
        x = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 0.7)
        scale, shift = scale + (kind == "rms_unit_offset"), bias if kind == "layer" else jnp.zeros_like(bias)
        return x * scale[None, None] + shift[None, None]

    def norm(x, scale):
        return Norm(scale, bias if kind == "layer" else None, 0.7, kind, over)(x)

    with compiled_for(platform):
        assert_same_gradients(norm, plain, x, scale)
