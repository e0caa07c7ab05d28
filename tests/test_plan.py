"""The plan of a run: the paper's FLOPs exactly, what is sent as the formula says, faults in one line."""

import dataclasses
import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import random_batch, random_params, tiny_config

from longlora_jax import costs, plan, presets, run
from longlora_jax.collectives import Collective, collectives, totals
from longlora_jax.config import AttentionConfig, LoraConfig, MeshConfig
from longlora_jax.errors import UserError
from longlora_jax.model import Llama, abstract_params, logical_axes
from longlora_jax.optim import make_optimizer
from longlora_jax.patterns import Pattern
from longlora_jax.sharding import batch_sharding, make_mesh, weight_shardings
from longlora_jax.trainable import partition, trainable_mask
from longlora_jax.trainer import TrainState, jit_train_step

needs_8 = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")

# arXiv:2309.12307, appendix: TFLOPs of a forward pass of the 7B model under full attention and under S2-Attn.
PLANNED = json.loads((Path(__file__).parents[1] / "benchmarks" / "tpu_plans.json").read_text())
PAPER = {
    8_192: (70.9, 35.2, 2.1, 35.2, 143.4, 8.8, 117.0),
    16_384: (141.8, 70.4, 4.3, 140.7, 357.2, 35.2, 251.7),
    32_768: (283.7, 140.7, 8.6, 562.9, 996.0, 140.7, 573.7),
    65_536: (567.3, 281.5, 17.2, 2251.8, 3117.8, 562.9, 1429.0),
}


@pytest.mark.parametrize("seq_len", PAPER)
def test_flops_are_the_papers(seq_len):
    """Catches: a factor of two, a projection that is forgotten, S2 that is not a quarter."""
    config = presets.longlora(presets.llama2_7b(), init_from="x", seq_len=seq_len)
    s2 = costs.forward_flops(config)
    full = costs.forward_flops(dataclasses.replace(config, attention=AttentionConfig(pattern="full")))
    found = [s2[k] for k in ("ffn", "proj", "others")] + [
        full["attention"],
        full["total"],
        s2["attention"],
        s2["total"],
    ]
    assert [round(flops / 1e12, 1) for flops in found] == list(PAPER[seq_len])


@needs_8
def test_what_is_sent_is_counted_as_often_as_its_loop_turns():
    """Catches: a loop's body counted once, the axis of another dimension, an operation that is not seen."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))

    def body(x, _):
        everywhere = jax.lax.all_gather(x, "context", axis=0, tiled=True)  # [2, 4] f32: 32 bytes
        x += jax.lax.psum(everywhere.sum(0, keepdims=True), "tensor")  # 16 bytes
        return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), None  # 16 bytes

    def program(x):
        return jax.lax.psum(jax.lax.scan(body, x, length=5)[0], ("fsdp", "tensor"))  # 16 bytes, once

    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    found = collectives(run.lower(jnp.ones((1, 4))).compile().as_text(), mesh)
    assert {(row["op"], row["axis"], row["bytes"]) for row in totals(found)} == {
        ("all-gather", "context", 5 * 32),
        ("all-reduce", "tensor", 5 * 16),
        ("collective-permute", "fsdp", 5 * 16),
        ("all-reduce", "fsdp+tensor", 16),
    }


def test_groups_are_read_in_every_spelling():
    """Catches: a compiler's way of writing groups that is taken for another axis."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2)) if jax.device_count() == 8 else None
    if mesh is None:
        pytest.skip("needs 8 devices")
    operation = "%a = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add"
    line = f"ENTRY %main (p: f32[4]) -> f32[4] {{{{\n  {operation}\n}}}}"
    for groups in (
        "{{0,2},{1,3},{4,6},{5,7}}",
        "[4,2]<=[2,2,2]T(0,2,1)",
        "mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}",
    ):
        (found,) = collectives(line.format(groups), mesh)
        assert found == Collective("all-reduce", "context", ((4,),), 16, 1), groups


def compiled_step(mesh, pattern, seq_len, **options):
    """The compiled LoRA+ step of a small model on a mesh, one row."""
    config = tiny_config(num_key_value_heads=4, vocab_size=48, num_hidden_layers=3, head_dim=16)
    model = Llama(config, lora=LoraConfig(rank=2), pattern=pattern, remat="block", mesh=mesh, **options)
    params = jax.device_put(random_params(model), weight_shardings(mesh, logical_axes(model), abstract_params(model)))
    trains, frozen = partition(params, trainable_mask(params, "lora_plus"))
    optimizer = make_optimizer(presets.longlora(config, init_from="x", seq_len=seq_len).optim, 10)
    state = TrainState.create(model=model, optimizer=optimizer, trainable=trains, loss_chunk=16)
    state = jax.tree.map(lambda x: x if x.committed else jax.device_put(x, NamedSharding(mesh, P())), state)
    batch = jax.device_put(random_batch(1, seq_len, vocab_size=48), batch_sharding(mesh, 1))
    return config, jit_train_step(state).lower(state, frozen, batch).compile()


@needs_8
@pytest.mark.parametrize("context, group", [(4, 32), (4, 64), (8, 64)], ids=["groups", "one group", "half a group"])
def test_s2_gathers_no_activation_and_sends_what_the_formula_says(context, group):
    """Catches: a constraint that makes XLA gather the sequence; more keys and values sent than half a group's."""
    seq_len = 256
    mesh = make_mesh(MeshConfig(fsdp=1, context=context), jax.devices()[:context])
    config, compiled = compiled_step(mesh, Pattern("s2", group), seq_len)
    found = collectives(compiled.as_text(), mesh)
    # No weight has an axis of that length: whatever is gathered along the sequence shows by it.
    long = [c for c in found if c.op == "all-gather" and any(seq_len in shape for shape in c.shapes)]
    assert all(c.bytes == 4 * seq_len for c in long), long  # the tokens, for the embedding's rows
    # Keys and values, forward, forward again for the backward pass, and their gradients: 6 for each layer.
    half_group = 4 * (group // 2) * (config.num_key_value_heads // 2) * config.head_dim
    sent = sum(c.bytes * c.times for c in found if c.op == "collective-permute" and (1, group // 2, 2, 16) in c.shapes)
    assert sent == config.num_hidden_layers * 6 * half_group


@needs_8
@pytest.mark.parametrize("name", [n for n, row in PLANNED.items() if row["devices"] <= 8])
def test_the_estimate_is_within_a_tenth_of_the_compiler(name):
    """Catches: a share of the weights that is counted whole, an offloaded input that is counted on the chip."""
    row = PLANNED[name]
    words = shlex.split(row["command"])
    flags = [word for word in words if word.startswith("--config.")]
    config = run.read_config(words[words.index("--config") + 1], flags)
    config = dataclasses.replace(config, model=run.extend_model(config.model, config))
    mesh = make_mesh(config.mesh, jax.devices()[: row["devices"]])
    found = costs.estimate(config, mesh)
    assert found["total"] == pytest.approx(row["hbm_bytes_per_device"], rel=0.1)
    # What is held between steps is exact, but for the batch: tokens, positions and mask, 64 rows of int32.
    batch = 3 * 4 * 64 * config.seq_len // row["devices"]
    held = found["weights"] + found["trainables"] + found["optimizer"]
    assert held == pytest.approx(row["memory"]["arguments"] - batch, rel=0.01)


def test_what_cannot_be_planned_is_one_line(tmp_path):
    """Catches: a traceback for a mistyped topology, a flag that is no field, a file that is no config."""
    with pytest.raises(UserError, match="topology 'v9:2x4' is not known: give one such as v5e:2x4"):
        plan.main(["--config", "configs/7b_32k.py", "--topology", "v9:2x4"])
    with pytest.raises(UserError, match="seqlen"):
        plan.main(["--config", "configs/7b_32k.py", "--topology", "v5e:2x4", "--config.seqlen=1"])
    (tmp_path / "config.py").write_text("def get_config():\n    return 3\n")
    with pytest.raises(UserError, match="gives a int: return a Config"):
        run.read_config(str(tmp_path / "config.py"))
    assert run.read_config("configs/7b_32k.py", ["--config.steps=7"]).steps == 7


def test_a_plan_for_tpus_from_here():
    """The whole of it for a small model: needs the package libtpu, and no TPU."""
    pytest.importorskip("libtpu")
    config = presets.longlora(tiny_config(head_dim=16, num_key_value_heads=4), init_from="x", seq_len=1024)
    config = dataclasses.replace(config, batch_size=2, mesh=MeshConfig(fsdp=2, context=2), accumulation=1)
    found = plan.plan(config, "v5e:2x2")
    assert found["fits"] and 0 < found["hbm_bytes_per_device"] < found["hbm_limit_bytes"]
    assert found["exchange"] == "neighbour" and {row["axis"] for row in found["collectives"]} <= {
        "fsdp", "context", "fsdp+context",
    }  # fmt: skip
    assert "fits" in plan.table(found) and np.isfinite(found["hours"])
