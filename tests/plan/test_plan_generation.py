"""The plan of a prompt: bytes and FLOPs counted another way, and the very step of a session compiled for TPUs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, tiny_config

from longlora_jax import presets
from longlora_jax.attention.kernels import compiled_for
from longlora_jax.errors import UserError
from longlora_jax.generate.session import Session, as_read, trace_step
from longlora_jax.model.cache import abstract_cache, new_cache
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.plan import __main__ as command
from longlora_jax.plan import gpus
from longlora_jax.plan.generation import STEP, plan_generation, reading_flops, table


def test_the_cache_that_is_planned_is_the_one_that_is_made():
    """Catches: an abstract cache of other shapes, dtypes or fields than the real one."""
    how = {"dtype": jnp.bfloat16, "chunk": 32}
    config = tiny_config(sliding_window=11, layer_types=("sliding_attention", "full_attention"))
    made, planned = new_cache(config, 2, 700, **how), abstract_cache(config, 2, 700, **how)
    assert jax.tree.structure(made) == jax.tree.structure(planned)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(planned), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 11, "layer_types": ("sliding_attention", "full_attention")}]
)
def test_flops_of_a_prompt_are_those_of_its_tokens(options):
    """Catches: pairs that are counted as if attention were not causal, a window forgotten, a token counted twice."""
    c = tiny_config(**options)
    logits = 2 * 16 * 37
    tokens = [reading_flops(c, before, 1) - logits for before in range(50)]
    assert sum(tokens) == reading_flops(c, 0, 50) - logits
    assert sum(tokens[20:]) == reading_flops(c, 20, 30) - logits
    matrices = 16 * (2 * 24 + 2 * 12 + 3 * 28)
    seen = [min(41, window or 41) for window in c.windows]
    assert tokens[40] == 2 * 2 * matrices + 4 * 24 * sum(seen)


def test_what_fits_a_card_by_formula(monkeypatch):
    """Catches: a cache counted once for keys and values together, weights that are not cut, heads that are."""
    monkeypatch.setattr(gpus, "installed_version", lambda package: "")
    config = presets.longlora(presets.qwen25_7b(), init_from="x", seq_len=1_048_576)
    found = plan_generation(config, "h100:8")
    assert found["cache_cut"] == {"heads": 4, "sequence": 2} and found["fits"] and found["memory_by"] == "formula"
    token = 2 * 28 * 4 * 128 * 2
    assert found["cache_bytes_per_device"] == pytest.approx(token * 1_048_576 / 8, rel=0.02)  # in whole blocks
    assert found["weights_bytes_per_device"] == pytest.approx(7_615_616_512 * 2 / 8, rel=0.001)
    one = dataclasses.replace(config, seq_len=32_768, base_quantization="nf4")
    longest = plan_generation(one, "rtx4090:1", longest=True)
    assert longest["fits"] and longest["tokens"] % STEP == 0
    more = plan_generation(dataclasses.replace(one, seq_len=longest["tokens"] + 2 * STEP), "rtx4090:1")
    assert not more["fits"] and "DOES NOT FIT" in table(more) and "base in nf4" in table(more)
    with pytest.raises(UserError, match="l4:1 holds no prompt of 8192 tokens"):
        plan_generation(presets.longlora(presets.llama2_70b(), init_from="x", seq_len=8192), "l4:1", longest=True)


def test_the_command(tmp_path, capsys):
    """Catches: flags that do not reach the plan, a chunk that training is given."""
    flags = ("--config", "configs/qwen25_7b_128k.py", "--topology", "h100:8")
    command.main([*flags, "--generate", "--chunk", "2048", "--json", str(tmp_path / "plan.json")])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["tokens"], found["chunk"]) == (131_072, 2048) and found["fits"]
    assert capsys.readouterr().out.startswith("prompt      131,072 tokens in chunks of 2,048")
    for wrong, said in {
        ("--chunk", "2048"): "--chunk is of reading a prompt",
        ("--generate", "--mfu", "0.5"): "--mfu is of the time of training",
        ("--generate", "--config.dtype=foo"): "dtype='foo' is unknown: use one of",
        ("--generate", "--config.seq_len=0"): "seq_len=0 must be 1 or more",
        ("--generate", "--json", str(tmp_path / "none" / "plan.json")): "cannot be written: give a file",
        ("--json", str(tmp_path / "none" / "plan.json")): "cannot be written: give a file",
    }.items():
        with pytest.raises(UserError, match=said):
            command.main([*flags, *wrong])
    assert not capsys.readouterr().out


def test_a_prompt_is_planned_in_the_chunks_it_is_read_in(monkeypatch):
    """Catches: a chunk larger than the prompt, with FLOPs below zero and memory that nobody takes; a last chunk counted
    as a whole one; a length refused because training could not cut it into groups."""
    monkeypatch.setattr(gpus, "installed_version", lambda package: "")
    model = tiny_config()
    config = presets.longlora(model, init_from="x", seq_len=40)
    short, plain = (plan_generation(config, "h100:1", chunk=chunk) for chunk in (4096, 64))
    assert short == plain and short["chunk"] == 64 and short["chunk_flops"] == short["prompt_flops"] > 0
    several = plan_generation(config, "h100:1", chunk=16)
    assert several["chunk"] == 16 and several["chunk_flops"] == reading_flops(model, 32, 8)
    whole = plan_generation(dataclasses.replace(config, seq_len=48), "h100:1", chunk=16)
    assert whole["chunk_flops"] == reading_flops(model, 32, 16)
    assert plan_generation(dataclasses.replace(config, seq_len=100_001), "h100:1")["tokens"] == 100_001


def test_windows_in_all_layers_end_the_search(monkeypatch):
    """Catches: a search for ever, as the cache stops growing; a prompt without bounds where one layer sees all."""
    monkeypatch.setattr(gpus, "installed_version", lambda package: "")
    model = tiny_config(sliding_window=20_000, layer_types=("sliding_attention",) * 2)
    config = presets.longlora(model, init_from="x", seq_len=1_000_000)
    found = plan_generation(config, "h100:1", longest=True)
    assert (found["tokens"], found["fits"], found["cache_grows"]) == (1_000_000, True, False)
    assert table(found).endswith("memory does not bound the prompt")
    least = plan_generation(dataclasses.replace(config, seq_len=64), "h100:1", longest=True)
    assert least["tokens"] == 4 * STEP and least["cache_bytes_per_device"] == found["cache_bytes_per_device"]
    mixed = dataclasses.replace(model, layer_types=("sliding_attention", "full_attention"))
    bound = plan_generation(dataclasses.replace(config, model=mixed), "l4:1", longest=True)
    assert bound["cache_grows"] and bound["tokens"] > 1_000_000 and "does not bound" not in table(bound)
    large = tiny_config(
        sliding_window=2**24, layer_types=("sliding_attention",) * 2, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128,
    )  # fmt: skip
    with_limit = plan_generation(dataclasses.replace(config, model=large), "l4:1", longest=True)
    assert with_limit["tokens"] < 2**24 and with_limit["fits"]


def test_a_chunk_on_a_tpu_runs_splash_and_a_token_does_not():
    """Catches: a prompt that a TPU reads by blocks of scores, a token that pays for a kernel's block of queries."""
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2, head_dim=128)
    model = as_read(Llama(config, dtype=jnp.bfloat16))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract_params(model))
    kernels = []
    with compiled_for("tpu"):
        cache = abstract_cache(config, 1, 20_000, dtype=jnp.bfloat16, chunk=512)
        for t in (512, 1):
            traced = trace_step(model, params, cache, t).lower(lowering_platforms=("tpu",)).as_text()
            kernels.append(traced.count("splash_mha_fwd"))
    assert kernels[0] >= 2 and kernels[1] == 0


def test_a_step_that_is_lowered_is_the_one_that_a_session_runs():
    """Catches: a plan of another program than the one that reads."""
    model = Llama(tiny_config())
    session = Session(model, random_params(model), 1, 64, chunk=16)
    planned = trace_step(session.model, session._params, session._cache, 16).lower().as_text()
    from longlora_jax.generate import session as module

    args = (session._cache, np.zeros((1, 16), np.int32), np.zeros(1, np.int32), session._logits)
    assert module._advance.lower(session.model, session._params, *args).as_text() == planned


def test_a_prompt_for_tpus_from_here():
    """The whole of it for a small model: needs the package libtpu, and no TPU. Catches a cache that is copied."""
    pytest.importorskip("libtpu")
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 40}
    config = presets.longlora(tiny_config(**sizes), init_from="x", seq_len=131_072)
    found = plan_generation(config, "v5e:2x2")
    assert found["cache_cut"] == {"heads": 2, "sequence": 2} and found["memory_by"] == "compiler"
    cache = found["cache_bytes_per_device"]
    assert cache >= 2 * 2 * 2 * 128 * 2 * 131_072 / 4
    assert cache < found["hbm_bytes_per_device"] < 1.2 * cache
