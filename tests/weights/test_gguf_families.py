"""GGUF files of every family: what they were written from, transformers' own reader, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import make_folder, torch_model
from gguf_families import write_family
from transformers import AutoModelForCausalLM

from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama
from longlora_jax.weights.gguf import load_gguf, open_gguf
from longlora_jax.weights.hf import open_hf
from longlora_jax.weights.layouts import to_theirs
from longlora_jax.weights.rules import build_params

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 40))
# Names of tests/helpers/families.py, with what a GGUF file can hold instead of what it cannot.
SIX_LAYERS = {"num_hidden_layers": 7, "sliding_window_pattern": 6}
WRITTEN = {
    **dict.fromkeys(("qwen2", "qwen2 tied, yarn", "qwen3 biases", "mistral"), {}),
    "qwen3": {"head_dim": 128},  # the only one that transformers' reader knows
    **dict.fromkeys(("phi3", "phi3 128k", "phi4-mini", "smollm3", "olmo2", "olmo2 mha"), {}),
    **dict.fromkeys(("granite", "granite biases", "gemma"), {}),
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {**SIX_LAYERS, "query_pre_attn_scalar": 8},
    "gemma3 scaled": {"max_position_embeddings": 16384},
    **dict.fromkeys(("stablelm", "stablelm plain", "stablelm 12b", "gpt_neox", "gpt_neox in turn"), {}),
}
# Of each family one whose logits are compared: those of the others follow from the same weights and the same config.
COMPUTED = ("qwen2", "qwen3", "mistral", "phi3 128k", "smollm3", "olmo2", "granite", "gemma", "gemma2", "gemma3")
COMPUTED += ("stablelm", "stablelm 12b", "gpt_neox")
# The same tensors and the same config make the same logits (test_families.py): most of these are slow.
QUICK = ("qwen3", "gemma3", "gpt_neox")
# Keys that newer converters, or other programs, write.
KEYS = {"gemma3 scaled": {"attention.sliding_window_pattern": [False, True, True, False]}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(Hugging Face folder, GGUF file) of a name."""
    made = {}

    def get(name: str):
        if name not in made:
            base = tmp_path_factory.mktemp("gguf")
            folder = make_folder(base / "hf", name, **WRITTEN[name])
            made[name] = folder, write_family(base / "m.gguf", folder, KEYS.get(name))
        return made[name]

    return get


def known_by_file(config, name):
    """A config.json's model, less what a GGUF file does not hold."""
    changes = {"initializer_range": 0.02}
    if name == "mistral":
        changes["model_type"] = "llama"
    if name == "phi3 128k":
        factor = float(np.float32(np.sqrt(1.5)))  # sqrt(1 + log 4 / log 16), which config.json leaves to be computed
        changes["rope_scaling"] = dataclasses.replace(
            config.rope_scaling, attention_factor=pytest.approx(factor, rel=1e-6)
        )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        pytest.param(name, computed, id=f"{name}, computed" if computed else name, marks=marks)
        for name in WRITTEN
        for computed, marks in ((name in QUICK, ()), (True, pytest.mark.slow))
        if not marks or name in set(COMPUTED) - set(QUICK)
    ],
)
def test_a_file_is_the_model_it_was_written_from(name, computed, written):
    """Catches: rows of q and k left in the order of llama.cpp, a norm one too large, parts of a fused matrix cut in
    the wrong place, a multiplier, a window or a rotation that is read from the wrong key or not at all."""
    folder, path = written(name)
    config, table, _ = open_gguf(path)
    theirs, expected = open_hf(str(folder))
    assert config == known_by_file(theirs, name)
    assert table.keys() == expected.keys()
    for key, tensor in table.items():
        array = expected[key].read()
        if "gemma" in name and key.endswith("norm.weight"):
            array = (array + np.float32(1)) - np.float32(1)  # as far as float32 gives it back
        np.testing.assert_array_equal(tensor.read(), array, key)
    if not computed:
        return
    params = build_params(config, table)
    got = jax.jit(Llama(config).apply)({"params": params}, jnp.asarray(TOKENS, jnp.int32))
    with torch.no_grad():
        logits = torch_model(folder)(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(got, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "phi3 128k", "stablelm", "gemma2", "gemma3"])
def test_weights_are_those_of_transformers_own_reader(name, written):
    """Catches: an error that our reader and our writer share."""
    folder, path = written(name)
    config, table, _ = open_gguf(path)
    model = AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file="m.gguf", dtype=torch.float32)
    theirs = model.state_dict()
    ours = to_theirs(config, table)
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].numpy(), key)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
        assert getattr(config, key) == getattr(model.config, key)


def test_fused_matrices_of_newer_converters(tmp_path, written):
    """Catches: q and k of --fuse-qkv, which are reordered before they are fused, taken as they lie."""
    import gguf

    folder, path = written("granite biases")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "fused.gguf", "granite")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for layer in range(3):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, table, _ = open_gguf(str(tmp_path / "fused.gguf"))
    plain, expected, _ = open_gguf(path)
    assert config == plain and table.keys() == expected.keys()
    for key, tensor in table.items():
        np.testing.assert_array_equal(tensor.read(), expected[key].read(), key)


def read_config(tmp_path, folder, **keys):
    config, _, _ = open_gguf(
        write_family(tmp_path / "m.gguf", folder, {k.replace("__", "."): v for k, v in keys.items()})
    )
    return config


def test_what_llama_cpp_knows_by_heart(tmp_path):
    """Catches: a default of ours where llama.cpp has another for files that lack the key; the largest Gemmas' scale."""
    folder = make_folder(tmp_path / "g3", "gemma3", **SIX_LAYERS, query_pre_attn_scalar=8)
    assert read_config(tmp_path, folder, rope__freq_base_swa=None).rope_local_base_freq == 10000
    assert read_config(tmp_path, folder).windows == (7, 7, 7, 7, 7, 0, 7)
    assert read_config(tmp_path, folder, attention__sliding_window_pattern=3).windows == (7, 7, 0, 7, 7, 0, 7)
    unwindowed = read_config(tmp_path, folder, attention__sliding_window=0)
    assert unwindowed.windows == (0,) * 7 and unwindowed.ropes == ("global",) * 7
    folder = make_folder(tmp_path / "g2", "gemma2", query_pre_attn_scalar=8)
    config = read_config(tmp_path, folder, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert read_config(tmp_path, folder, attention__sliding_window=None).sliding_window == 4096
    # Gemma 2 27B has 46 layers of 32 heads of 128, in a width of 4608: its scores are scaled by 144 ** -0.5.
    sizes = {"hidden_size": 36, "num_attention_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 18}
    folder = make_folder(tmp_path / "g2 27b", "gemma2", num_hidden_layers=46, **sizes)
    assert read_config(tmp_path, folder).score_scale == pytest.approx(18**-0.5)
    folder = make_folder(tmp_path / "mistral", "mistral")
    config = read_config(tmp_path, folder, attention__sliding_window=9)
    assert (config.model_type, config.windows) == ("mistral", (9, 9, 9))


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("qwen2", {"attention__sliding_window": 9}, "qwen2.attention.sliding_window is 9"),
        ("qwen2", {"rope__dimension_count": 4}, "qwen2.rope.dimension_count is 4, it must be 8"),
        ("qwen3", {"expert_count": 8}, "a mixture of experts"),
        ("qwen3", {"attention__causal": False}, "qwen3.attention.causal is False"),
        ("gemma", {"final_logit_softcapping": 30.0}, "gemma.final_logit_softcapping is 30.0"),
        ("gemma2", {"rope__freq_base_swa": 500.0}, "gemma2.rope.freq_base_swa is 500.0"),
        ("gemma2", {"attention__sliding_window_pattern": [True]}, "layer_types is"),
        ("olmo2", {"attention__sliding_window": 9}, "its window slides"),
        ("granite", {"logit_scale": -1.0}, "granite.logit_scale is -1.0, it must be a number above 0"),
        ("granite", {"rope__scaling__finetuned": False}, "granite.rope.scaling.finetuned is False"),
        ("gpt_neox", {"use_parallel_residual": None}, "gptneox.use_parallel_residual is None"),
        ("stablelm", {"attention__layer_norm_epsilon": None}, "stablelm.attention.layer_norm_epsilon is None"),
        ("phi3", {"rope__dimension_count": 6, "attention__head_count": 8}, "partial_rotary_factor"),
    ],
)
def test_other_models_are_refused_by_the_key(name, keys, said, written, tmp_path):
    """Catches: a model that is read as something else than it is; a message that names another key than the file's."""
    folder, _ = written(name)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path, folder, **keys)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_other_architectures_are_refused_by_name(tmp_path, written):
    """Catches: an architecture that is taken for another one."""
    import gguf

    for name, said in (("qwen3moe", "a mixture of experts"), ("mamba", "it must be one of llama, smollm3")):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=f"general.architecture is '{name}'.*{said}"):
            load_gguf(str(tmp_path / "m.gguf"))
