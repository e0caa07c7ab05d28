"""A training step over a base in four and eight bits beside a plain one: seconds and compiled memory, taking turns.

python -m benchmarks.packed_base --json benchmarks/packed_base.json
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from longlora_jax.config import Config, ModelConfig
from longlora_jax.parallel.sharding import make_mesh
from longlora_jax.presets import llama2_7b, longlora
from longlora_jax.training import run
from longlora_jax.training.step import compile_train_step

KINDS = ("none", "nf4", "nf4_double", "int8")


def small() -> ModelConfig:
    """D 512, 8 layers, 8 heads, F 1408, V 2,048."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 2048}
    return dataclasses.replace(llama2_7b(), **sizes, num_attention_heads=8, num_key_value_heads=8, head_dim=64)


def prepared(kind: str, tokens: int):
    """(compiled step, state, frozen, batch) of random weights; codes are zeros, which cost what others cost."""
    config: Config = longlora(small(), init_from="x", seq_len=tokens)
    config = dataclasses.replace(config, base_quantization=kind, batch_size=1, accumulation=1, dtype="float32")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    shapes = run.abstract_state(config, run.build_model(config, mesh), mesh)
    rows = jax.ShapeDtypeStruct((1, tokens), "int32", sharding=run.sharding.batch_sharding(mesh, 1))
    step = compile_train_step(*shapes, rows)
    state, frozen = jax.tree.map(lambda x: jax.device_put(jnp.full(x.shape, 0.01, x.dtype), x.sharding), shapes)
    batch = {name: jnp.ones((1, tokens), jnp.int32) for name in ("tokens", "positions", "loss_mask")}
    return step, state, frozen, jax.device_put(batch, rows.sharding)


def main() -> None:
    """Prints a table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    runs = {kind: prepared(kind, args.tokens) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.steps + 1):
        for kind, (step, state, frozen, batch) in runs.items():
            started = time.perf_counter()
            state, values = step(state, frozen, batch)
            jax.block_until_ready(values)
            runs[kind] = (step, state, frozen, batch)
            if turn:
                seconds[kind].append(time.perf_counter() - started)
    found = {}
    for kind, (step, *_) in runs.items():
        memory = step.memory_analysis()
        ratios = [mine / plain for mine, plain in zip(seconds[kind], seconds["none"], strict=True)]
        found[kind] = {
            "seconds": statistics.median(seconds[kind]),
            "seconds / none": statistics.median(ratios),
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        print(kind, found[kind], flush=True)
    Path(args.json).write_text(
        json.dumps({"tokens": args.tokens, "steps": args.steps, "results": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
