"""The weights of a model as Flax declares them: each once, with its shape, logical axes and initializer.

decoder.py puts them together; these two and quantized.py alone know flax.linen.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from longlora_jax.model import quantized
from longlora_jax.model.codes import Quantization
from longlora_jax.model.linear import Linear, Norm
from longlora_jax.model_config import LoraConfig, ModelConfig


def _declare(module: nn.Module, name: str, init_fn, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
    """Declares a weight of a module; param unboxes what the initializer boxes, which flax's annotations miss."""
    boxed = nn.with_logical_partitioning(init_fn, axes)
    return module.param(name, boxed, shape)  # pyright: ignore[reportReturnType]


class NormWeights(nn.Module):
    """The weights of a Norm: a scale and, of a LayerNorm, a bias; each_head: a scale [N, H], and heads one by one."""

    config: ModelConfig
    each_head: bool = False

    @nn.compact
    def __call__(self, *features: int) -> Norm:
        c, axes = self.config, ("norm",) * len(features)
        neutral = nn.initializers.zeros if c.norm == "rms_unit_offset" else nn.initializers.ones
        scale = _declare(self, "scale", neutral, axes, features)
        has_bias = c.norm == "layer" and not self.each_head
        bias = _declare(self, "bias", nn.initializers.zeros, axes, features) if has_bias else None
        return Norm(scale, bias, eps=c.rms_norm_eps, kind=c.norm, over=1 if self.each_head else None)


class Projection(nn.Module):
    """The weights of a Linear: a kernel [*in, *out] and, if this projection is a target, its adapter.

    axes: logical names of the kernel's axes, the first `input_axes` of them read; features: sizes of *out;
    quantization: how the kernel is packed.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    stddev: float
    lora: LoraConfig | None
    use_bias: bool = False
    input_axes: int = 1
    mesh: Mesh | None = None
    quantization: Quantization | None = None

    @nn.compact
    def __call__(self, *inputs: int) -> Linear:
        """inputs: sizes of *in."""
        in_axes, out_axes, lora = self.axes[: self.input_axes], self.axes[self.input_axes :], self.lora
        declare, key = functools.partial(_declare, self), None
        shape = (*inputs, *self.features)
        if self.quantization is None:
            kernel = declare("kernel", nn.initializers.normal(self.stddev), self.axes, shape)
        else:
            kernel = self._packed(shape, (in_axes[0], out_axes[0]))
        bias = declare("bias", nn.initializers.zeros, out_axes, self.features) if self.use_bias else None
        lora_a = lora_b = None
        if lora is not None and self.name in lora.targets:
            # Kaiming uniform with a = sqrt(5), as PEFT and the LoRA authors' code: U(-1/sqrt(in), 1/sqrt(in)).
            read = tuple(range(self.input_axes))
            random = nn.initializers.variance_scaling(
                1 / 3, "fan_in", "uniform", in_axis=read, out_axis=self.input_axes
            )
            lora_a = declare("lora_a", random, (*in_axes, "rank"), (*inputs, lora.rank))
            lora_b = declare("lora_b", nn.initializers.zeros, ("rank", *out_axes), (lora.rank, *self.features))
            key = self.make_rng("dropout") if lora.dropout and self.has_rng("dropout") else None
        return Linear(
            kernel,
            bias,
            lora_a,
            lora_b,
            key,
            input_axes=self.input_axes,
            scale=lora.scale if lora else 0.0,
            dropout=lora.dropout if lora else 0.0,
            merge=self.mesh is None or self.mesh.shape["context"] == 1,
        )

    def _packed(self, shape: tuple[int, ...], names: tuple[str, str]) -> quantized.Quantized:
        assert self.quantization is not None
        parts: Any = self.param("kernel", quantized.declare(shape, self.input_axes, names, self.quantization))
        return quantized.Quantized(parts, shape, self.input_axes, self.quantization, names, self.mesh)


class Weight(nn.Module):
    """One bare array."""

    leaf: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init_fn: nn.initializers.Initializer

    @nn.compact
    def __call__(self):
        return _declare(self, self.leaf, self.init_fn, self.axes, self.shape)
