"""GPUs that are not here: what the step becomes when it is compiled for them, and a process that is as it was."""

import collections
import contextlib
import dataclasses
import logging
import os
import re

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from longlora_jax import presets
from longlora_jax.attention.kernels import device_capability, kernel_name
from longlora_jax.config import MeshConfig
from longlora_jax.model_config import ModelConfig
from longlora_jax.plan import __main__ as command
from longlora_jax.plan import chips, generation, gpus, planner
from longlora_jax.plan.collectives import _computations, collectives, totals
from longlora_jax.training import run
from longlora_jax.training.resolve import extend_model

WHY = gpus.find_gpus("h100", 2**33, 1)[1]
compiles = pytest.mark.skipif(bool(WHY), reason=WHY)
T, LAYERS = 1024, 3
SIZES = {"hidden_size": 192, "intermediate_size": 416, "vocab_size": 640, "num_hidden_layers": LAYERS, "head_dim": 64}


def compiled(heads: int, kv_heads: int, mesh=MeshConfig(), count: int = 1, **options):  # noqa: B008
    """(config, mesh, text) of the step of a small model with that many heads, compiled for H100s."""
    model = ModelConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, max_position_embeddings=256,
        rope_theta=10_000.0, initializer_range=0.02, tie_word_embeddings=False, **SIZES,
    )  # fmt: skip
    config = presets.longlora(model, init_from="x", seq_len=T)
    config = dataclasses.replace(config, batch_size=2, accumulation=1, dtype="bfloat16", mesh=mesh, **options)
    config = dataclasses.replace(config, model=extend_model(model, config))
    topology = chips.find_topology(f"h100:{count}")
    mesh = planner._mesh(config, topology)
    step, _ = planner._compile(config, run.build_model(config, mesh), mesh, topology)
    assert planner.compiled_memory(step)["total"] > 0
    return config, mesh, step.as_text()


def buffers(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of all that a program writes to memory: what is inside of a fusion is not."""
    fused = set(re.findall(r" fusion\(.*?calls=(%[\w.-]+)", text))
    lines = [line for name, lines in _computations(text).items() if name not in fused for line in lines]
    shapes = (re.findall(r"(\w+)\[([\d,]*)\]", line.partition(" = ")[2].split("), ")[0]) for line in lines)
    return {(dtype, tuple(int(n) for n in dims.split(",") if n)) for found in shapes for dtype, dims in found}


@compiles
@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (32, 8)])
def test_s2_is_cudnns_and_copies_neither_keys_nor_weights(heads, kv_heads):
    """Catches: the blockwise kernel in cuDNN's place, keys and values that are gathered where the cut
    of the heads falls inside a kv group (and scattered backward), a frozen weight that is copied to float32."""
    _, _, text = compiled(heads, kv_heads, remat="block")
    calls = collections.Counter(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax(\w*)"', text))
    # Three a layer: the plain half of the heads, the shifted half's whole groups, its two half groups as rows of one;
    # forward, again for the backward pass, and backward.
    assert calls == {"": 6, "Backward": 3}, calls
    assert set(re.findall(r'"mask_type": "(\w+)"', text)) == {"CAUSAL"}
    found = buffers(text)
    # The loss picks its targets, the embedding its rows, and gets their gradients.
    moved = set(re.findall(r"= \w+\[([\d,]*)\]\S* (?:gather|scatter)\(", text))
    assert moved == {"1024,1,1", "2048,1,192", "640,192"}, moved
    wide = {(192, 416), (416, 192), (192, 640), (192, heads * 64), (heads * 64, 192), (192, kv_heads * 64)}
    wide |= {(192, heads, 64), (heads, 64, 192), (192, kv_heads, 64)}
    for shape in (shape for dtype, shape in found if dtype == "f32" and shape != (640, 192)):  # the embedding trains
        kernel = shape[1:] if shape[:1] in ((LAYERS,), (1,)) else shape
        assert kernel not in wide and kernel[::-1] not in wide, shape


@compiles
def test_over_a_mesh_only_the_context_axis_permutes():
    """Catches: a sequence that is gathered, keys and values that are sent to more than one neighbour, operations that
    GPUs join into one and that are counted by their first, a share of all layers' kernels turned to be gathered."""
    config, mesh, text = compiled(16, 8, MeshConfig(fsdp=2, context=4), 8)
    found = collectives(text, mesh)
    turned = [dims.split(",") for dims in re.findall(r"= bf16\[([\d,]+)\]\S* transpose\(", text)]
    assert turned and not [dims for dims in turned if str(LAYERS) in dims], turned
    assert {one.axis for one in found if one.op == "collective-permute"} == {"context"}
    gathered = [shape for one in found if one.op == "all-gather" for shape in one.shapes]
    assert {shape for shape in gathered if {T, T // 4} & set(shape)} == {
        (8, T // 4)
    }  # tokens, for the embedding's rows
    # Half a group of keys and values of the shifted half of the heads: forward, again, and their gradients.
    half_group = 2 * (T // 4 // 2) * (8 // 2) * 64
    sent = sum(
        one.bytes * one.times for one in found if one.op == "collective-permute" and (1, T // 8, 4, 64) in one.shapes
    )
    assert sent == LAYERS * 6 * half_group
    rows = {(row["op"], row["axis"]): row["bytes"] for row in totals(found)}
    kernels = 192 * (2 * 16 + 2 * 8) * 64 + 3 * 192 * 416
    least = 2 * (2 * LAYERS * kernels + 192 * 640)  # of the blocks twice, of lm_head once, in bfloat16
    assert least <= rows["all-gather", "fsdp+context"] <= 1.1 * least


@compiles
def test_the_process_stays_what_it_was():
    """Catches: a variable, a default backend or a check of cuDNN's version that is not put back, an error included."""
    before = dict(os.environ), jax.devices(), jax_cudnn.check_cudnn_version, jax_cudnn.check_compute_capability
    with contextlib.suppress(ZeroDivisionError), gpus.compiled_for_gpu("h100"):
        assert kernel_name(head_dim=256) == "cudnn on gpu" and jax_cudnn.check_compute_capability("9.0")
        raise ZeroDivisionError
    with gpus.compiled_for_gpu("a100-40gb"):
        assert "xla-blockwise" in kernel_name(head_dim=256) and not jax_cudnn.check_compute_capability("9.0")
    found = dict(os.environ), jax.devices(), jax_cudnn.check_cudnn_version, jax_cudnn.check_compute_capability
    assert found == before and device_capability() is None and kernel_name().endswith("on cpu")


@compiles
@pytest.mark.parametrize("kind", gpus.CARDS)
def test_every_card_is_one_to_the_compiler(kind):
    """Catches: a description that XLA does not read, or reads as another card."""
    devices, why = gpus.find_gpus(kind, 2**33, 16)
    assert not why and len(devices) == 16 and {device.process_index for device in devices} == {0, 1}
    card = gpus.CARDS[kind]
    assert (devices[0].device_kind, devices[0].compute_capability) == (card.name, card.capability)


@pytest.mark.parametrize(
    "version, said", [("", 'is not installed: pip install -e ".[gpu-plan]"'), ("0.9.0", "0.9.0 was not tried")]
)
def test_without_the_compiler_one_line_says_so(version, said, monkeypatch, capsys, caplog):
    """Catches: a formula passed off as the compiler's, a traceback of JAX's plugin, advice that is not said."""
    monkeypatch.setattr(gpus, "installed_version", lambda package: version)
    with caplog.at_level(logging.WARNING):
        command.main(["--config", "configs/7b_32k.py", "--topology", "h100:2", "--config.accumulation=32"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(said in line for line in lines) == 1 and not caplog.records
    (memory,) = (i for i, line in enumerate(lines) if line.startswith("memory"))
    assert "by formula" in lines[memory] and said in lines[memory + 1]


def test_cards_are_those_that_can_be_planned_for():
    """Catches: a card without a description, one whose generation is not known."""
    assert set(gpus.CARDS) == set(chips.GPUS)
    for card in gpus.CARDS.values():
        assert card.capability in gpus._GENERATIONS


@compiles
def test_a_token_after_a_long_prompt_copies_no_cache():
    """Catches: values of all layers that are turned for the product of one token's weights, and back, at every step."""
    model = ModelConfig(
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=2**17,
        rope_theta=10_000.0, initializer_range=0.02, tie_word_embeddings=False, **SIZES,
    )  # fmt: skip
    config = presets.longlora(model, init_from="x", seq_len=2**17)
    found = generation.plan_generation(dataclasses.replace(config, dtype="bfloat16"), "h100:1")
    held = found["weights_bytes_per_device"] + found["cache_bytes_per_device"]
    assert found["memory_by"] == "compiler"
    assert found["decode_bytes_per_device"] - held < found["cache_bytes_per_device"] / 8
