"""Hugging Face folders in and out; transformers is the oracle."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
from hf_folders import edit_json, edit_weights, read_raw, save_tiny, tiny_model
from safetensors.numpy import load_file, save_file

import convert_weights
from longlora_jax.attention.rope import RopeScaling
from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.weights.hf import copy_tokenizer, load_hf, save_hf
from longlora_jax.weights.hf_config import config_to_json, load_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 3.0, 5.0, 7.0],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# One option apart from the default each; dtypes are spread over them.
OPTIONS = {
    "mha": ({}, "float32"),
    "tied": ({"tie_word_embeddings": True}, "bfloat16"),
    "gqa_odd_kv": ({"num_attention_heads": 6, "num_key_value_heads": 3}, "float16"),
    "mqa_head_dim_apart": ({"num_key_value_heads": 1, "head_dim": 12}, "bfloat16"),
    "attention_bias": ({"attention_bias": True, "num_key_value_heads": 2}, "float32"),
    "mlp_bias": ({"mlp_bias": True, "vocab_size": 101}, "float16"),
    "linear": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "float32"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "float32"),
    "yarn": ({"rope_parameters": YARN}, "bfloat16"),
    "llama3": ({"rope_parameters": LLAMA3}, "float32"),
    "longrope": ({"rope_parameters": LONGROPE, "head_dim": 8}, "float32"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_round_trip_is_bit_exact_and_transformers_reloads_it(name, tmp_path):
    """Catches: a transposition, a lost bias, a rope scaling that the exported config forgets."""
    options, dtype = OPTIONS[name]
    model = tiny_model(dtype, **options)
    source = save_tiny(tmp_path / "source", model)
    config, params = load_hf(source)
    save_hf(str(tmp_path / "target"), config, params)
    assert read_raw(tmp_path / "target") == read_raw(source)

    reloaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    # Loaded again, since model.to(dtype) also rounds the frequencies.
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    assert reloaded.dtype == model.dtype
    # Longer than the 64 of the config: dynamic and longrope change there.
    tokens = torch.arange(1, 81)[None] % 64
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reloaded(tokens).logits)


def test_kernels_mean_what_the_module_computes(tmp_path):
    """Catches: a layout that is wrong both ways, which no round trip shows."""
    model = tiny_model(num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True)
    _, params = load_hf(save_tiny(tmp_path / "source", model))
    layers, layer = params["layers"], model.model.layers[1]
    rng = np.random.default_rng(0)
    x, heads = rng.normal(size=24).astype(np.float32), rng.normal(size=(4, 10)).astype(np.float32)

    def torch_linear(module, array):
        with torch.no_grad():
            return module(torch.from_numpy(array.reshape(-1))).numpy()

    def check(ours, theirs):
        # Two sums of at most 40 f32 products in a different order.
        np.testing.assert_allclose(ours.reshape(-1), theirs, rtol=1e-5, atol=1e-5)

    for name in ("q_proj", "k_proj", "v_proj"):
        ours = layers["self_attn"][name]
        product = np.einsum("d,dnh->nh", x, ours["kernel"][1]) + ours["bias"][1]
        check(product, torch_linear(getattr(layer.self_attn, name), x))
    ours = layers["self_attn"]["o_proj"]
    product = np.einsum("nh,nhd->d", heads, ours["kernel"][1]) + ours["bias"][1]
    check(product, torch_linear(layer.self_attn.o_proj, heads))
    gate = layers["mlp"]["gate_proj"]
    check(x @ gate["kernel"][1] + gate["bias"][1], torch_linear(layer.mlp.gate_proj, x))
    check(x @ params["lm_head"]["kernel"], torch_linear(model.lm_head, x))
    norm = model.model.layers[2].post_attention_layernorm.weight.detach().numpy()
    np.testing.assert_array_equal(layers["post_attention_layernorm"]["scale"][2], norm)


def test_sharded_folders_in_and_out(tmp_path):
    """Catches: a tensor lost at a shard boundary, a bad index, files that are private."""
    model = tiny_model()
    source = save_tiny(tmp_path / "source", model, max_shard_size="9KB")
    assert len(os.listdir(source)) > 5
    config, params = load_hf(source)
    target = tmp_path / "target"
    save_hf(str(target), config, params, max_shard_bytes=9000)
    assert read_raw(target) == read_raw(source)
    shards = [file for file in target.iterdir() if file.suffix == ".safetensors"]
    assert {file.stat().st_mode for file in target.iterdir()} == {(target / "config.json").stat().st_mode}
    # The header of a file comes on top of the tensors' bytes.
    assert len(shards) > 3 and max(file.stat().st_size for file in shards) < 9000 + 2000
    reloaded = transformers.LlamaForCausalLM.from_pretrained(target)
    for one, other in zip(model.parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts_round_as_torch_does(dtype, tmp_path):
    """Catches: truncation instead of rounding, a config.json that names another dtype."""
    model = tiny_model()
    config, params = load_hf(save_tiny(tmp_path / "source", model))
    save_hf(str(tmp_path / "target"), config, params, dtype=dtype)
    reloaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "target")
    for one, other in zip(model.to(reloaded.dtype).parameters(), reloaded.parameters(), strict=True):
        assert one.dtype == getattr(torch, dtype) and torch.equal(one, other)
    _, cast = load_hf(str(tmp_path / "source"), dtype=dtype)
    assert cast["norm"]["scale"].dtype.name == dtype
    np.testing.assert_array_equal(cast["norm"]["scale"], params["norm"]["scale"].astype(cast["norm"]["scale"].dtype))


def test_mixed_dtypes_lose_nothing(tmp_path):
    """Catches: layers cast to the dtype of the first one; a reload that rounds the widest."""
    source = tmp_path / "source"
    save_tiny(source, tiny_model("bfloat16"))
    name = "model.layers.1.input_layernorm.weight"
    fine = np.linspace(0.1, 1, 24, dtype=np.float32)
    half = {"model.layers.1.mlp.up_proj.weight": np.full((40, 24), 1 + 2**-10, np.float16)}
    edit_weights(source, **{name: fine}, **half)
    config, params = load_hf(str(source))
    assert params["layers"]["input_layernorm"]["scale"].dtype == np.float32
    np.testing.assert_array_equal(params["layers"]["input_layernorm"]["scale"][1], fine)
    # Neither of bfloat16 and float16 holds the other.
    up_proj = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert up_proj.dtype == np.float32 and np.all(up_proj[1] == 1 + 2**-10)
    assert params["layers"]["mlp"]["down_proj"]["kernel"].dtype == ml_dtypes.bfloat16
    save_hf(str(tmp_path / "target"), config, params)
    reloaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "target")
    np.testing.assert_array_equal(reloaded.get_parameter(name).detach().numpy(), fine)


SCALINGS = [
    None,
    RopeScaling(rope_type="linear", factor=8.0, original_max_position_embeddings=4096),
    RopeScaling(rope_type="dynamic", factor=8.0, original_max_position_embeddings=4096),
    RopeScaling(rope_type="ntk", factor=8.0, original_max_position_embeddings=4096),
    RopeScaling(rope_type="yarn", factor=8.0, original_max_position_embeddings=4096, beta_fast=16.0),
    RopeScaling(
        rope_type="llama3",
        factor=8.0,
        original_max_position_embeddings=4096,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rope_type if s else "default")
def test_config_json_keeps_every_field(scaling, tmp_path):
    """Catches: a field of ModelConfig that is not written, or not read back."""
    config = ModelConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=32768,
        rms_norm_eps=3e-5,
        rope_theta=12345.0,
        tie_word_embeddings=True,
        rope_scaling=scaling,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.01,
        bos_token_id=7,
        eos_token_id=8,
        pad_token_id=9,
    )
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config, "bfloat16")))
    assert load_config(str(tmp_path)) == config


def test_missing_keys_mean_what_transformers_assumes(tmp_path):
    """Catches: LLaMA-1 folders, whose config.json has half of today's keys."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size")
    raw = {key: 96 for key in sizes} | {"num_hidden_layers": 2, "num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **raw}))
    ours, theirs = load_config(str(tmp_path)), transformers.LlamaConfig(**raw)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10000.0
    for key in config_to_json(ours, "float32").keys() & vars(ours).keys() - {"rope_scaling"}:
        assert getattr(ours, key) == getattr(theirs, key, getattr(ours, key)), key


def test_llama3_style_lists_and_old_ids(tmp_path):
    """Catches: a list of eos ids or an id of -1 that reaches the tokenizer as a token."""
    save_tiny(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=[5, 6], pad_token_id=-1)
    config = load_config(str(tmp_path))
    assert (config.eos_token_id, config.pad_token_id) == (5, None)


def test_mistral_is_a_llama_unless_its_window_slides(tmp_path):
    """Catches: full attention where the model was trained with a sliding window, a window where none cuts anything."""
    config = transformers.MistralConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=None,
    )
    model = transformers.MistralForCausalLM(config).eval()
    source = tmp_path / "source"
    save_tiny(source, model)
    save_hf(str(tmp_path / "target"), *load_hf(str(source)))
    reloaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "target")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        # The two classes are written apart, so the order of a sum may differ.
        torch.testing.assert_close(model(tokens).logits, reloaded(tokens).logits, rtol=0, atol=1e-6)
    for window, windows in ((64, (0, 0)), (32, (32, 32))):
        edit_json(source / "config.json", sliding_window=window)
        assert load_config(str(source)).windows == windows


def test_tied_folder_may_store_the_head_if_it_is_equal(tmp_path):
    """Catches: a head that differs from the embedding and would be dropped in silence."""
    model = tiny_model(tie_word_embeddings=True)
    save_tiny(tmp_path, model)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, lm_head__weight=embedding)
    _, params = load_hf(str(tmp_path))
    assert "lm_head" not in params
    edit_weights(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(UserError, match="tie_word_embeddings is true but lm_head.weight"):
        load_hf(str(tmp_path))


def truncate(folder, size=None):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: size if size is not None else -100])


FAULTS = {
    "truncated": (truncate, "model.safetensors is damaged or cut off"),
    "empty": (lambda f: truncate(f, 0), "model.safetensors is damaged or cut off"),
    "bad header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{" * 40),
        "model.safetensors is damaged or cut off",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no weights: neither model.safetensors nor pytorch_model.bin",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (
        lambda f: (f / "config.json").write_text("{\n\n"),
        "config.json cannot be read as JSON",
    ),
    "list as config": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "other architecture": (
        lambda f: edit_json(f / "config.json", model_type="gpt2"),
        "model_type is 'gpt2'",
    ),
    "no size": (
        lambda f: edit_json(f / "config.json", hidden_size=None),
        "hidden_size is None, it must be a whole number",
    ),
    "kv heads": (
        lambda f: edit_json(f / "config.json", num_key_value_heads=3),
        "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
    ),
    "other activation": (
        lambda f: edit_json(f / "config.json", hidden_act="gelu"),
        "hidden_act is 'gelu'",
    ),
    "quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}),
        "quantized",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, model__norm__weight=None),
        "missing tensor model.norm.weight",
    ),
    "unexpected tensor": (
        lambda f: edit_weights(f, model__extra=np.ones(2, np.float32)),
        "unexpected tensor model.extra",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, model__norm__weight=np.ones(23, np.float32)),
        "model.norm.weight has shape [23], it must be [24]",
    ),
    "wrong dtype": (
        lambda f: edit_weights(f, model__norm__weight=np.ones(24, np.int8)),
        "model.norm.weight is stored as I8",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_folder_is_refused_in_one_line(name, tmp_path):
    """Catches: a traceback, or weights that are half right."""
    damage, message = FAULTS[name]
    save_tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        load_hf(str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_faults_are_named_at_once(tmp_path):
    """Catches: one fault a run, ten runs to mend a folder."""
    save_tiny(tmp_path)
    edit_weights(
        tmp_path,
        model__norm__weight=np.ones(23, np.float32),
        lm_head__weight=None,
        model__extra=np.ones(2, np.float32),
    )
    with pytest.raises(UserError, match="(?=.*model.norm.weight)(?=.*lm_head)(?=.*model.extra)"):
        load_hf(str(tmp_path))
    save_file({"nothing": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"and \d+ more$"):
        load_hf(str(tmp_path))


def shard_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_faulty_shards_and_indices_are_refused(tmp_path):
    """Catches: a missing download, an index that reaches outside of its folder."""
    save_tiny(tmp_path, max_shard_size="9KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].rename(tmp_path / "kept")
    shards[1].write_bytes(shards[1].read_bytes()[:-7])
    with pytest.raises(UserError) as caught:
        load_hf(str(tmp_path))
    text = str(caught.value)
    assert f"missing file {shards[0].name}" in text and f"{shards[1].name} is damaged" in text
    assert "missing tensor" not in text

    index = shard_index(tmp_path)
    outside = {**index["weight_map"], "model.norm.weight": "../secret.safetensors"}
    edit_json(tmp_path / "model.safetensors.index.json", weight_map=outside)
    with pytest.raises(UserError, match="must be one beside the index"):
        load_hf(str(tmp_path))
    edit_json(tmp_path / "model.safetensors.index.json", weight_map={})
    with pytest.raises(UserError, match="has no weight_map"):
        load_hf(str(tmp_path))


def test_an_index_that_promises_too_much_is_refused(tmp_path):
    """Catches: a shard of an older revision beside a newer index."""
    save_tiny(tmp_path, max_shard_size="9KB")
    index = shard_index(tmp_path)
    files = sorted(set(index["weight_map"].values()))
    changed = {**index["weight_map"], "model.gone.weight": files[1]}
    edit_json(tmp_path / "model.safetensors.index.json", weight_map=changed)
    with pytest.raises(UserError, match=f"missing tensor model.gone.weight in {files[1]}"):
        load_hf(str(tmp_path))


@pytest.mark.parametrize("shards", ["1GB", "9KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pytorch_folders_are_read_bit_for_bit(dtype, shards, tmp_path):
    """Catches: an old checkpoint that reads other weights than torch does, or only half of its shards."""
    model = tiny_model(dtype, num_key_value_heads=2)
    source = save_tiny(tmp_path / "source", model, max_shard_size=shards)
    bins = tmp_path / "bins"
    bins.mkdir()
    shutil.copy(tmp_path / "source" / "config.json", bins)
    for file in (tmp_path / "source").glob("*.safetensors"):
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(safetensors.torch.load_file(file), bins / name)
    if (tmp_path / "source" / "model.safetensors.index.json").exists():
        weight_map = {
            name: file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            for name, file in shard_index(tmp_path / "source")["weight_map"].items()
        }
        (bins / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_hf(str(tmp_path / "target"), *load_hf(str(bins)))
    assert read_raw(tmp_path / "target") == read_raw(source)


def test_a_missing_folder_is_refused(tmp_path):
    """Catches: a traceback for a mistyped path."""
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_hf(str(tmp_path / "nowhere"))


def test_old_inv_freq_buffers_are_ignored(tmp_path):
    """Catches: LLaMA-1 and 2 folders refused for a buffer that follows from the config."""
    save_tiny(tmp_path)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float64)}
    edit_weights(tmp_path, **buffer)
    load_hf(str(tmp_path))


def test_saving_refuses_what_does_not_fit_and_leaves_nothing(tmp_path):
    """Catches: adapters lost in an export, infinities in float16, half a folder after a fault."""
    source = save_tiny(tmp_path / "source")
    config, params = load_hf(source)
    target = tmp_path / "target"
    unmerged = params | {"norm": params["norm"] | {"lora_a": np.ones((2, 2), np.float32)}}
    with pytest.raises(UserError, match="unexpected norm/lora_a, merge the adapters first"):
        save_hf(str(target), config, unmerged)
    wrong = {"norm": {"scale": np.ones(3, np.float64)}}
    with pytest.raises(UserError, match="missing lm_head/kernel"):
        save_hf(str(target), config, {k: v for k, v in params.items() if k != "lm_head"} | wrong)
    params["lm_head"]["kernel"][0, 0] = 1e6
    with pytest.raises(UserError, match="lm_head.weight has values beyond float16"):
        save_hf(str(target), config, params, dtype="float16", max_shard_bytes=2000)
    assert os.listdir(tmp_path) == ["source"]
    with pytest.raises(UserError, match="exists already"):
        save_hf(source, config, params)


def test_tokenizer_and_generation_config_travel(tmp_path):
    """Catches: an export that cannot be prompted, and Llama 3's second end of turn lost."""
    source = tmp_path / "source"
    save_tiny(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("not copied")
    edit_json(source / "generation_config.json", eos_token_id=[2, 3])
    target = tmp_path / "target"
    save_hf(str(target), *load_hf(str(source)), tokenizer_from=str(source))
    assert (target / "tokenizer.json").read_text() == "{}" and not (target / "README.md").exists()
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert copy_tokenizer(str(source), str(target)) == ["tokenizer.json", "generation_config.json"]


def test_neither_jax_nor_torch_is_imported():
    """Catches: an import that makes every data worker load jax."""
    code = "import sys, longlora_jax.weights.hf; print({'jax', 'torch', 'flax'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def convert(*arguments):
    command = [sys.executable, "convert_weights.py", *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_commands_convert_both_ways(tmp_path):
    """Catches: a command that loses a weight, a rope scaling or the tokenizer on the way."""
    source = tmp_path / "source"
    save_tiny(source, tiny_model("bfloat16", **OPTIONS["llama3"][0]))
    (source / "tokenizer.json").write_text("{}")
    ours, target = tmp_path / "ours", tmp_path / "target"
    for arguments in (("from-hf", source, ours), ("to-hf", ours, target)):
        convert_weights.main([str(argument) for argument in arguments])
    assert read_raw(target) == read_raw(source)
    assert load_config(str(target)) == load_config(str(source))
    assert (target / "tokenizer.json").read_text() == "{}"


@pytest.mark.slow
def test_commands_fail_in_one_line_and_leave_nothing(tmp_path):
    """Catches: a traceback, an output folder that holds half a model, minutes before a refusal."""
    save_tiny(tmp_path / "source")
    truncate(tmp_path / "source")
    done = convert("from-hf", tmp_path / "source", tmp_path / "ours")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["source"]
    done = convert("to-hf", tmp_path / "nowhere", tmp_path / "source")
    assert done.returncode == 2 and "exists already" in done.stderr
