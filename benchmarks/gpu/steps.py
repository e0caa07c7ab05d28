"""LoRA training steps of one row: tokens a second, MFU, peak memory as the device, the compiler and the planner say it.

MFU counts useful FLOPs (plan/costs.step_flops): a frozen matrix once forward and once for the gradient of its input,
attention's pairs as causality and groups leave them, nothing that remat computes again; over the card's dense peak in
16 bits. Weights are random, filled leaf by leaf, so that no more than the model is ever held. Steps come in the order
of their planned memory, so that the device's peak after each is its own.
"""

import functools
import statistics
import time

from benchmarks.gpu.part import Part, jax_device, memory_limit, random_leaves


def filled(config, model, mesh):
    """(state, frozen): random leaves of a small scale, adapters' B zero."""
    import jax
    import jax.numpy as jnp

    from longlora_jax.training import run

    state, frozen = run.abstract_state(config, model, mesh)

    def zeros(x):
        return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)

    trained = jax.tree_util.tree_map_with_path(
        lambda path, x: zeros(x) if path[-1].key == "lora_b" else x, random_leaves(state.trainable)
    )
    state = jax.tree.map(zeros, state.replace(trainable=None)).replace(trainable=trained)
    return state, random_leaves(frozen)


def main() -> None:
    """Every step of sizes.steps_for."""
    part = Part(__doc__)
    import jax
    import jax.numpy as jnp

    from benchmarks.attention import step_flops
    from benchmarks.gpu.sizes import TINY, Step, config_of, planned, steps_for
    from longlora_jax.config import MeshConfig
    from longlora_jax.parallel import sharding
    from longlora_jax.plan import costs
    from longlora_jax.training import run
    from longlora_jax.training.step import compile_train_step

    device, limit = jax.devices()[0], memory_limit()
    mesh = sharding.make_mesh(MeshConfig(), [device])
    dtype = "float32" if part.tiny else "bfloat16"
    part.head = jax_device() | {"dtype": dtype, "limit_gib": limit / 2**30}
    part.head["mfu"] = "useful FLOPs (frozen matrices twice, causal pairs, nothing twice by remat) over the 16-bit peak"
    peak = part.head.get("peak_tflops")
    steps = TINY if part.tiny else sorted(steps_for(limit, [device]), key=lambda step: planned(step, [device]))
    held: dict[str, tuple] = {}

    def measure(case: Step):
        config = config_of(case, dtype)
        model, t = run.build_model(config, mesh), case.seq_len
        if case.model not in held:
            held.clear()
            held[case.model] = filled(config, model, mesh)
        state, frozen = held.pop(case.model)  # the state is donated: what fails leaves nothing behind
        where = sharding.batch_sharding(mesh, 1)
        began = time.perf_counter()
        shape = jax.ShapeDtypeStruct((1, t), "int32", sharding=where)
        step = compile_train_step(state.replace(model=model), frozen, shape, segmented=case.packed)
        found = {"compile_seconds": time.perf_counter() - began}
        m = step.memory_analysis()
        bytes_ = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        found |= {"compiled_gib": bytes_ / 2**30, "planned_gib": costs.estimate(config, mesh)["total"] / 2**30}
        tokens = jax.random.randint(jax.random.key(1), (1, t), 0, config.model.vocab_size)
        batch = {"tokens": tokens, "positions": jnp.arange(t)[None], "loss_mask": jnp.ones_like(tokens)}
        if case.packed:
            document = -(-t // 8)
            batch["segment_ids"] = 1 + batch["positions"] // document
            batch["positions"] %= document
        batch = jax.device_put(batch, where)
        losses, seconds = [], []
        state = state.replace(model=model)
        for _ in range(2 if part.tiny else 4):
            began = time.perf_counter()
            state, values = step(state, frozen, batch)
            losses.append(float(values["loss"]))
            seconds.append(time.perf_counter() - began)
        held[case.model] = state, frozen
        s = statistics.median(seconds[1:])
        found |= {"first_seconds": seconds[0], "seconds": s, "tokens_per_second": t / s, "losses": losses}
        if not case.packed:  # the pairs of documents in shifted groups are nobody's formula
            found["tflops"] = step_flops(config, model.pattern) / s / 1e12
            found |= {"mfu": found["tflops"] / peak} if peak else {}
        if told := (device.memory_stats() or {}).get("peak_bytes_in_use"):
            found["peak_gib"] = told / 2**30
        return found

    for case in steps:
        part.run({"library": "ours"} | case._asdict(), functools.partial(measure, case))
    part.save()


if __name__ == "__main__":
    main()
