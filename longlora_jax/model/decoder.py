"""The decoder in Flax, a LLaMA and what its relatives change in it.

What a family of models does otherwise are fields of ModelConfig, a LLaMA's values their defaults. Each weight is
declared once (declared.py), where it is used here; abstract parameters, shardings and real ones all follow from that
(see `abstract_params`, `logical_axes`, `init_params`).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from longlora_jax.attention.context_parallel import HEADS, attend_on_mesh, constrain, exchange
from longlora_jax.attention.kernels import compiled_for, keeps_cudnn
from longlora_jax.attention.patterns import ABLATIONS, ALIKE, FULL, Pattern
from longlora_jax.attention.rope import apply_rope
from longlora_jax.model.cache import Cache, attend_to_cache, cache_tables
from longlora_jax.model.codes import Quantization
from longlora_jax.model.declared import NormWeights, Projection, Weight
from longlora_jax.model.layers import Kinds, frequencies_of, kinds_of, patterns_of, tables_of
from longlora_jax.model.linear import FeedForward, Norm, head_chunks, over_heads, over_sequence
from longlora_jax.model.losses import output_logits
from longlora_jax.model.on_mesh import embed_on_mesh, neftune_noise
from longlora_jax.model_config import LoraConfig, ModelConfig

# What is kept of a block for its backward pass; everything else is computed again.
_policies = jax.checkpoint_policies
REMAT = {
    "none": _policies.everything_saveable,
    "attention": _policies.save_from_both_policies(_policies.save_only_these_names("qkv", "attention"), keeps_cudnn),
    "dots": _policies.save_from_both_policies(_policies.save_only_these_names("product", "attention"), keeps_cudnn),
    "block": _policies.nothing_saveable,  # but for the block's input, which is always kept
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Attention(nn.Module):
    """q, k, v, RoPE at the true positions, attend() under the layer's pattern; what o_proj reads, and its weights."""

    config: ModelConfig
    lora: LoraConfig | None
    pattern: Pattern
    mesh: Mesh | None
    chunks: int
    quantization: Quantization | None = None

    @nn.compact
    def __call__(self, x, norm: Norm | None, kinds: Kinds | None, cos, sin, segment_ids, cache: Cache | None = None):
        """x: [B, T, D], before its norm. Returns (y [B, T, N, H], o_proj, cache)."""
        c, d = self.config, x.shape[-1]
        how = {"lora": self.lora, "mesh": self.mesh, "quantization": self.quantization}
        linear = functools.partial(Projection, stddev=c.initializer_range, **how)
        heads, kv_heads = (c.num_attention_heads, c.head_dim), (c.num_key_value_heads, c.head_dim)
        bias = c.attention_bias or c.qkv_bias
        q = linear(heads, ("embed", "heads", "head_dim"), use_bias=bias, name="q_proj")(d)
        k = linear(kv_heads, ("embed", "kv_heads", "head_dim"), use_bias=bias, name="k_proj")(d)
        v = linear(kv_heads, ("embed", "kv_heads", "head_dim"), use_bias=bias, name="v_proj")(d)
        q_norm = k_norm = lambda x: x
        if c.qk_norm:
            shapes = (heads[1:], kv_heads[1:]) if c.qk_norm == "head" else (heads, kv_heads)
            of = functools.partial(NormWeights, c, c.qk_norm == "own_head")
            q_norm, k_norm = (of(name=f"{x}_norm")(*shape) for x, shape in zip("qk", shapes, strict=True))
        rescale = c.score_scale * c.head_dim**0.5  # kernels scale by 1 / sqrt(H)

        def project(q, k, v, x):
            with jax.named_scope("qkv"):
                x = norm(x) if norm else x
                q, k, v = q_norm(q(x)), k_norm(k(x)), v(x)
                return q if abs(rescale - 1) < 1e-6 else q * jnp.asarray(rescale, q.dtype), k, v

        def attend_heads(q, k, v, x):
            q, k, v = project(q, k, v, x)
            with jax.named_scope("rope"):
                q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
            q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))
            with jax.named_scope("attend"):
                under = [
                    functools.partial(attend_on_mesh, pattern=one, mesh=self.mesh, segment_ids=segment_ids)
                    for one in patterns_of(c, self.pattern)
                ]
                return under[0](q, k, v) if kinds is None else jax.lax.switch(kinds.window, under, q, k, v)

        if cache is None:
            y = over_heads(attend_heads, q, k, v, x, mesh=self.mesh, **self._head_chunks(x.shape[1]))
        else:
            q, k, v = project(q, k, v, x)
            with jax.named_scope("attend"):
                y, cache = attend_to_cache(q, k, v, cos, sin, cache, self.mesh)
        o = linear((d,), ("heads", "head_dim", "embed"), use_bias=c.attention_bias, input_axes=2, name="o_proj")
        return y, o(*heads), cache

    def _head_chunks(self, t: int) -> dict[str, int]:
        """{chunks, parts} of over_heads."""
        c, mesh = self.config, self.mesh
        parts = 1 if self.pattern.name in ALIKE else 2
        whole = self.pattern.name in ABLATIONS or c.qk_norm in ("projection", "own_head")
        if self.chunks == 1 or whole or (mesh and mesh.shape["tensor"] > 1):
            return {"chunks": 1, "parts": parts}
        context = mesh.shape["context"] if mesh else 1
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        how = {exchange(pattern, t, heads, kv_heads, context) for pattern in patterns_of(c, self.pattern)}
        shares = context if HEADS in how else 1
        return {"chunks": head_chunks(self.chunks, heads, kv_heads, parts, shares), "parts": parts}


class MLP(nn.Module):
    """The weights of a FeedForward."""

    config: ModelConfig
    lora: LoraConfig | None
    mesh: Mesh | None
    quantization: Quantization | None = None

    @nn.compact
    def __call__(self) -> FeedForward:
        c = self.config
        d, f = c.hidden_size, c.intermediate_size
        how = {"lora": self.lora, "mesh": self.mesh, "quantization": self.quantization}
        linear = functools.partial(Projection, stddev=c.initializer_range, use_bias=c.mlp_bias, **how)
        gate = linear((f,), ("embed", "mlp"), name="gate_proj")(d) if c.gated_mlp else None
        up = linear((f,), ("embed", "mlp"), name="up_proj")(d)
        return FeedForward(gate, up, linear((d,), ("mlp", "embed"), name="down_proj")(f), act=c.hidden_act)


class Block(nn.Module):
    """One transformer block, in the form that nn.scan wants: ((x, cache), kinds, ...) -> ((x, cache), None).

    kinds: the numbers of this layer (model/layers.py), None where all layers are alike.
    """

    config: ModelConfig
    lora: LoraConfig | None
    pattern: Pattern
    mesh: Mesh | None
    chunks: int
    quantization: Quantization | None = None

    @nn.compact
    def __call__(self, carry, kinds: Kinds | None, cos, sin, segment_ids):
        x, cache = carry
        c = self.config
        pre, post = c.norm_placement != "post", c.norm_placement != "pre"

        def norm(name: str, there: bool) -> Norm | None:
            return NormWeights(c, name=name)(c.hidden_size) if there else None

        if kinds is not None and cos.ndim == 4:
            cos, sin = cos[kinds.rope], sin[kinds.rope]
        x = checkpoint_name(constrain(x, self.mesh), "block_input")
        how = (c, self.lora, self.pattern, self.mesh, self.chunks, self.quantization)
        attention = Attention(*how, name="self_attn")
        before_attention = norm("input_layernorm", pre)
        y, o, cache = attention(x, before_attention, kinds, cos, sin, segment_ids, cache)
        after_attention = norm("post_attention_layernorm", post)
        before_mlp = before_attention
        if not c.shared_norm:
            before_mlp = norm("pre_feedforward_layernorm" if post else "post_attention_layernorm", pre)
        mlp = MLP(c, self.lora, self.mesh, self.quantization, name="mlp")()

        def add(x, y, norm: Norm | None):
            y = norm(y) if norm else y
            return x + (y if c.residual_multiplier == 1 else y * jnp.asarray(c.residual_multiplier, y.dtype))

        def rest(weights, x, y):
            o, after_attention, before_mlp, mlp, after_mlp = weights
            out = add(x, o(y), after_attention)
            read = x if c.use_parallel_residual else out
            return add(out, mlp(before_mlp(read) if before_mlp else read), after_mlp)

        weights = o, after_attention, before_mlp, mlp, norm("post_feedforward_layernorm", post)
        x = over_sequence(rest, weights, x, y, mesh=self.mesh, chunks=self.chunks)
        return (constrain(x, self.mesh), cache), None


class Llama(nn.Module):
    """A model with optional adapters, its full layers under one attention pattern.

    dtype: of activations and of weights where they are multiplied; remat: a name out of REMAT; mesh: where it runs,
    None for one device; chunks: a block's heads and tokens come in so many chunks (model/linear.py); neftune_alpha:
    noise on the embeddings where a dropout key is given, as in training alone; quantization: how the blocks' kernels
    are packed (model/quantized.py), None for plain ones.
    `apply({"params": params}, tokens)` gives logits; `method="hidden"` stops before the output projection.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    pattern: Pattern = FULL
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    mesh: Mesh | None = None
    chunks: int = 1
    neftune_alpha: float = 0.0
    quantization: Quantization | None = None

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = Weight("embedding", (c.vocab_size, c.hidden_size), ("vocab", "embed"), normal)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # nothing is broadcast out of the loop; the check traces the block twice
        )
        self.layers = scan(c, self.lora, self.pattern, self.mesh, self.chunks, self.quantization)
        self.norm = NormWeights(c)
        if not c.tie_word_embeddings:
            self.lm_head = Weight("kernel", (c.hidden_size, c.vocab_size), ("embed", "vocab"), normal)

    def hidden(self, tokens, positions=None, segment_ids=None, cache: Cache | None = None, *, rope=None):
        """tokens, positions, segment_ids: [B, T] int32; positions default to 0..T-1. Returns [B, T, D], normed (and
        scaled, where the model scales its logits).

        rope: what frequencies_of gives, as arrays, for one compiled program of models that differ in it alone; None:
        the config's, compiled in.

        With a cache the tokens follow what it holds, positions and segment_ids are not read, attention is full, and
        (x, cache) is returned; the caller says how far its lengths go on.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        with jax.named_scope("embed"):
            x = embed_on_mesh(self.embed_tokens(), tokens, self.mesh, self.dtype, chunks=self.chunks)
            if c.embedding_multiplier != 1:
                x *= jnp.asarray(c.embedding_multiplier, x.dtype)
            if self.neftune_alpha and self.has_rng("dropout"):
                x += constrain(neftune_noise(self.make_rng("dropout"), x, self.neftune_alpha, segment_ids), self.mesh)
        if cache is None:
            frequencies, factors = rope or frequencies_of(c, tokens.shape[1])
            cos, sin = tables_of(frequencies, factors, positions)
        else:
            cos, sin = cache_tables(cache, tokens.shape[1])
        (x, cache), _ = self.layers((x, cache), kinds_of(c), cos, sin, segment_ids)
        x = self.norm(c.hidden_size)(x)
        if c.logits_scaling != 1:
            x /= jnp.asarray(c.logits_scaling, x.dtype)
        return x if cache is None else (x, cache)

    def __call__(self, tokens, positions=None, segment_ids=None, cache: Cache | None = None):
        """As `hidden`, then the output projection: logits [B, T, V] float32, or (logits, cache)."""
        x = self.hidden(tokens, positions, segment_ids, cache)
        x, cache = x if isinstance(x, tuple) else (x, None)
        kernel = self.embed_tokens().T if self.config.tie_word_embeddings else self.lm_head()
        logits = output_logits(x, kernel, self.config.final_logit_softcapping)
        return logits if cache is None else (logits, cache)


def _boxed_init(model: Llama, key):
    return model.clone(mesh=None, chunks=1).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def init_params(model: Llama, key):
    """Random float32 parameters of a model, as nested dicts."""
    return nn.meta.unbox(_boxed_init(model, key))


def abstract_params(model: Llama):
    """Shapes and dtypes of init_params without computing anything: a tree of jax.ShapeDtypeStruct."""
    return nn.meta.unbox(_abstract_weights(model))


def logical_axes(model: Llama):
    """A tree like abstract_params of jax.sharding.PartitionSpec in logical names (see parallel/sharding.py)."""
    return nn.get_partition_spec(_abstract_weights(model))


def _abstract_weights(model: Llama):
    # Tracing takes a second, and a planner asks for many windows: what weights do not depend on is left out.
    config = dataclasses.replace(model.config, rope_scaling=None, max_position_embeddings=1, layer_types=())
    bare = Llama(config, model.lora and dataclasses.replace(model.lora), quantization=model.quantization)
    return _traced_weights(bare)  # pyright: ignore[reportArgumentType]: modules have a hash


@functools.lru_cache(maxsize=16)
def _traced_weights(model: Llama):
    with compiled_for("cpu"):  # shapes are those of every platform, and nothing is to be said about a kernel
        return jax.eval_shape(functools.partial(_boxed_init, model), jax.random.key(0))
