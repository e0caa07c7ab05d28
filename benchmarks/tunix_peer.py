"""The step of train_step.py by Tunix, Google's library for post-training in JAX: full attention, which is all it has.

Needs google-tunix (tried: 0.1.7); where it is not installed, the benchmark goes without it. Its Llama3 makes all scores
at once.
"""

import functools

from benchmarks.train_step import ALPHA, LEARNING_RATE, RANK, SIZES, process_peak


def tunix_step(seq_len: int, attention: str, remat: str, weights: str):
    """The same step by Tunix's Llama3 with qwix's LoRA: as train_step.our_step."""
    import jax
    import jax.numpy as jnp
    import optax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params

    assert attention == "full"
    # It rotates by a base of 1,000,000, whatever the model's config says.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=10_000)
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    config = llama.ModelConfig(
        num_layers=SIZES["num_hidden_layers"],
        vocab_size=SIZES["vocab_size"],
        embed_dim=SIZES["hidden_size"],
        hidden_dim=SIZES["intermediate_size"],
        num_heads=SIZES["num_attention_heads"],
        num_kv_heads=SIZES["num_key_value_heads"],
        head_dim=SIZES["hidden_size"] // SIZES["num_attention_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        remat_config=llama.RematConfig.DECODER if remat == "block" else llama.RematConfig.NONE,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = params.create_model_from_safe_tensors(weights, config, mesh, dtype)
        lora = qwix.LoraProvider(module_path=".*(q_proj|k_proj|v_proj|o_proj)", rank=RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(model, lora, **model.get_model_input(), rngs=nnx.Rngs(0))

        def trains(path, value) -> bool:
            names = "/".join(map(str, path))
            return isinstance(value, nnx.LoRAParam) or "embedder" in names or "norm" in names

        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=0.0)
        )
        optimizer = nnx.Optimizer(model, optimizer, wrt=trains)
        causal = jnp.tril(jnp.ones((1, seq_len, seq_len), bool))

        def loss_of(model, tokens):
            logits, _ = model(tokens, jnp.arange(seq_len)[None], None, causal)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
            return losses.mean()

        @nnx.jit
        def step(model, optimizer, tokens):
            loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, trains))(model, tokens)
            optimizer.update(model, grads)
            return loss

    def run(tokens) -> float:
        with jax.set_mesh(mesh):
            return float(step(model, optimizer, jnp.asarray(tokens)))

    def peak() -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] if gpu else process_peak()

    return run, peak, {"device": jax.devices()[0].device_kind, "dtype": jnp.dtype(dtype).name}
