"""A LLaMA in Flax: the only file that knows flax.linen.

One declaration per weight: its shape, logical axes and initializer stand where the weight is used, and abstract
parameters, shardings and real ones all follow from it (see `abstract_params`, `logical_axes`, `init_params`).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from longlora_jax.config import ModelConfig
from longlora_jax.context_parallel import attend_on_mesh, constrain, embed_on_mesh
from longlora_jax.lora import LoraConfig, apply_lora
from longlora_jax.patterns import FULL, Pattern
from longlora_jax.rope import apply_rope, rope_frequencies, rope_tables

# What is kept of a block for its backward pass; everything else is computed again.
_policies = jax.checkpoint_policies
REMAT = {
    "none": _policies.everything_saveable,
    "attention": _policies.save_only_these_names("qkv", "attention"),
    "block": _policies.nothing_saveable,  # but for the block's input, which is always kept
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rms_norm(x, scale, *, eps: float):
    """x / rms(x) * scale over the last axis, in float32. x: [..., D]; scale: [D]. arXiv:1910.07467."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


def _declare(module: nn.Module, name: str, init_fn, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
    """Declares a weight of a module; param unboxes what the initializer boxes, which flax's annotations miss."""
    boxed = nn.with_logical_partitioning(init_fn, axes)
    return module.param(name, boxed, shape)  # pyright: ignore[reportReturnType]


class RMSNorm(nn.Module):
    """rms_norm with its learned scale [D]."""

    eps: float

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, _declare(self, "scale", nn.initializers.ones, ("norm",), (x.shape[-1],)), eps=self.eps)


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


class Projection(nn.Module):
    """x W (+ bias) (+ scale * (x A) B): a kernel [*in, *out] and, if this projection is a target, its adapter.

    axes: logical names of the kernel's axes, the first `input_axes` of them read; features: sizes of *out.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    stddev: float
    lora: LoraConfig | None
    use_bias: bool = False
    input_axes: int = 1
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x):
        inputs, in_axes, out_axes = (
            x.shape[-self.input_axes :],
            self.axes[: self.input_axes],
            self.axes[self.input_axes :],
        )
        normal = nn.initializers.normal(self.stddev)
        kernel = _declare(self, "kernel", normal, self.axes, (*inputs, *self.features))
        y = project(x, kernel, self.input_axes, merge=self.mesh is None or self.mesh.shape["context"] == 1)
        if self.use_bias:
            bias = _declare(self, "bias", nn.initializers.zeros, out_axes, self.features)
            y += jnp.broadcast_to(bias.astype(x.dtype), y.shape)
        if self.lora is not None and self.name in self.lora.targets:
            y += self._adapter(x, self.lora, inputs, in_axes, out_axes)
        return y

    def _adapter(self, x, lora: LoraConfig, inputs, in_axes, out_axes):
        # Kaiming uniform with a = sqrt(5), as PEFT and the LoRA authors' code: U(-1/sqrt(in), 1/sqrt(in)).
        axes = tuple(range(self.input_axes))
        random = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=axes, out_axis=self.input_axes)
        lora_a = _declare(self, "lora_a", random, (*in_axes, "rank"), (*inputs, lora.rank))
        lora_b = _declare(self, "lora_b", nn.initializers.zeros, ("rank", *out_axes), (lora.rank, *self.features))
        if lora.dropout and self.has_rng("dropout"):
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - lora.dropout, x.shape)
            x = jnp.where(keep, x / (1 - lora.dropout), 0)
        return apply_lora(x, lora_a, lora_b, input_axes=self.input_axes, scale=lora.scale)


class Attention(nn.Module):
    """q, k, v, RoPE at the true positions, attend() under the pattern, o."""

    config: ModelConfig
    lora: LoraConfig | None
    pattern: Pattern
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids):
        c = self.config
        linear = functools.partial(
            Projection, stddev=c.initializer_range, lora=self.lora, use_bias=c.attention_bias, mesh=self.mesh
        )
        heads, kv_heads = (c.num_attention_heads, c.head_dim), (c.num_key_value_heads, c.head_dim)
        with jax.named_scope("qkv"):
            q = linear(heads, ("embed", "heads", "head_dim"), name="q_proj")(x)
            k = linear(kv_heads, ("embed", "kv_heads", "head_dim"), name="k_proj")(x)
            v = linear(kv_heads, ("embed", "kv_heads", "head_dim"), name="v_proj")(x)
        with jax.named_scope("rope"):
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))
        with jax.named_scope("attend"):
            y = attend_on_mesh(q, k, v, self.pattern, self.mesh, segment_ids=segment_ids)
        out_axes = ("heads", "head_dim", "embed")
        return linear((c.hidden_size,), out_axes, input_axes=2, name="o_proj")(y)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). arXiv:2002.05202."""

    config: ModelConfig
    lora: LoraConfig | None
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x):
        c = self.config
        linear = functools.partial(
            Projection, stddev=c.initializer_range, lora=self.lora, use_bias=c.mlp_bias, mesh=self.mesh
        )
        gate = linear((c.intermediate_size,), ("embed", "mlp"), name="gate_proj")(x)
        up = linear((c.intermediate_size,), ("embed", "mlp"), name="up_proj")(x)
        return linear((c.hidden_size,), ("mlp", "embed"), name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm transformer block, in the form that nn.scan wants: (carry, ...) -> (carry, None)."""

    config: ModelConfig
    lora: LoraConfig | None
    pattern: Pattern
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids):
        eps = self.config.rms_norm_eps
        x = checkpoint_name(constrain(x, self.mesh), "block_input")
        normed = RMSNorm(eps, name="input_layernorm")(x)
        attention = Attention(self.config, self.lora, self.pattern, self.mesh, name="self_attn")
        x += attention(normed, cos, sin, segment_ids)
        normed = RMSNorm(eps, name="post_attention_layernorm")(x)
        return constrain(x + MLP(self.config, self.lora, self.mesh, name="mlp")(normed), self.mesh), None


class Llama(nn.Module):
    """A LLaMA with optional adapters, under one attention pattern.

    dtype: of activations and of weights where they are multiplied; remat: a name out of REMAT; mesh: where it runs,
    None for one device. `apply({"params": params}, tokens)` gives logits; `method="hidden"` stops before the output
    projection.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    pattern: Pattern = FULL
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = _Weight("embedding", (c.vocab_size, c.hidden_size), ("vocab", "embed"), normal)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.layers = scan(c, self.lora, self.pattern, self.mesh)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = _Weight("kernel", (c.hidden_size, c.vocab_size), ("embed", "vocab"), normal)

    def hidden(self, tokens, positions=None, segment_ids=None):
        """tokens, positions, segment_ids: [B, T] int32; positions default to 0..T-1. Returns [B, T, D], normed."""
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        with jax.named_scope("embed"):
            x = embed_on_mesh(self.embed_tokens(), tokens, self.mesh, self.dtype)
        frequencies = rope_frequencies(
            head_dim=c.head_dim,
            theta=c.rope_theta,
            scaling=c.rope_scaling,
            seq_len=tokens.shape[1],
        )
        cos, sin = rope_tables(positions, *frequencies)
        x, _ = self.layers(x, cos, sin, segment_ids)
        return self.norm(x)

    def __call__(self, tokens, positions=None, segment_ids=None):
        """As `hidden`, then the output projection: logits [B, T, V] float32."""
        x = self.hidden(tokens, positions, segment_ids)
        kernel = self.embed_tokens().T if self.config.tie_word_embeddings else self.lm_head()
        return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


class _Weight(nn.Module):
    """One bare array."""

    leaf: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init_fn: nn.initializers.Initializer

    @nn.compact
    def __call__(self):
        return _declare(self, self.leaf, self.init_fn, self.axes, self.shape)


def output_kernel(params):
    """The output projection [D, V] of a param tree: lm_head, or the transposed embedding of a tied model."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"].T


def _boxed_init(model: Llama, key):
    return model.clone(mesh=None).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def init_params(model: Llama, key):
    """Random float32 parameters of a model, as nested dicts."""
    return nn.meta.unbox(_boxed_init(model, key))


def abstract_params(model: Llama):
    """Shapes and dtypes of init_params without computing anything: a tree of jax.ShapeDtypeStruct."""
    return nn.meta.unbox(jax.eval_shape(functools.partial(_boxed_init, model), jax.random.key(0)))


def logical_axes(model: Llama):
    """A tree like abstract_params of jax.sharding.PartitionSpec in logical names (see sharding.py)."""
    return nn.get_partition_spec(jax.eval_shape(functools.partial(_boxed_init, model), jax.random.key(0)))
