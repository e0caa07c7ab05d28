"""Folders as their authors meant them: windows of exports, weights saved by other habits, other architectures' keys."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_folders import edit_json, edit_weights, save_tiny, tiny_model
from safetensors.numpy import load_file, save_file

import convert_weights
from longlora_jax.attention.rope import RopeScaling
from longlora_jax.errors import UserError
from longlora_jax.weights.converted import write_converted
from longlora_jax.weights.hf import load_hf, open_hf, open_tensor_file, save_hf
from longlora_jax.weights.hf_config import load_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = Path(__file__).parents[2] / "models" / "tiny-python-llama"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 499723\n"


def same_params(one, other):
    flat = [dict(_leaves(params)) for params in (one, other)]
    return flat[0].keys() == flat[1].keys() and all(np.array_equal(flat[0][k], flat[1][k]) for k in flat[0])


def _leaves(tree, path=()):
    for key, value in tree.items():
        yield from _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def tokenizer_folder(path, **config):
    source = Path(save_tiny(path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, source)
    edit_json(source / "tokenizer_config.json", model_max_length=64, **config)
    edit_json(source / "generation_config.json", max_length=64)
    return source


def limits(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    generation = transformers.GenerationConfig.from_pretrained(str(folder))
    return tokenizer.model_max_length, generation.max_length


def test_exports_of_an_extended_model_state_the_new_window(tmp_path):
    """Catches: transformers that cuts texts at the old window, or refuses to generate past it."""
    source = tokenizer_folder(tmp_path / "source")
    config, params = load_hf(str(source))
    save_hf(str(tmp_path / "same"), config, params, tokenizer_from=str(source))
    assert limits(tmp_path / "same") == (64, 64)
    assert (tmp_path / "same" / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    config.rope_scaling = RopeScaling(rope_type="linear", factor=4.0, original_max_position_embeddings=64)
    config.max_position_embeddings = 256
    save_hf(str(tmp_path / "longer"), config, params, tokenizer_from=str(source))
    assert limits(tmp_path / "longer") == (256, 256)
    write_converted(str(tmp_path / "ours"), config, open_hf(str(source))[1], tokenizer_from=str(source))
    assert limits(tmp_path / "ours") == (256, 256)
    (source / "generation_config.json").write_text('{"top_p": 0.5}')
    save_hf(str(tmp_path / "no_length"), config, params, tokenizer_from=str(source))
    assert "max_length" not in json.loads((tmp_path / "no_length" / "generation_config.json").read_text())


def rename(folder, change, **tensors):
    table = load_file(folder / "model.safetensors")
    save_file({change(name): array for name, array in table.items()} | tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name.removeprefix('model.')}",
    ],
)
def test_names_of_other_habits(tmp_path, change):
    """Catches: weights of LlamaModel, of a compiled or a wrapped model refused by their names."""
    source = Path(save_tiny(tmp_path / "a"))
    _, before = load_hf(str(source))
    rename(source, change)
    assert same_params(load_hf(str(source))[1], before)


def test_a_tied_matrix_under_its_other_name(tmp_path):
    """Catches: a tied model refused since it was saved with lm_head alone."""
    source = Path(save_tiny(tmp_path / "a", tiny_model(tie_word_embeddings=True)))
    _, before = load_hf(str(source))
    rename(source, lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name)
    assert same_params(load_hf(str(source))[1], before)


def test_a_model_without_its_head_is_named_with_its_cause(tmp_path):
    """Catches: "missing tensor lm_head.weight" where LlamaModel was saved alone."""
    tiny_model().model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"missing tensor lm_head.weight: .*LlamaModel alone") as caught:
        load_hf(str(tmp_path / "a"))
    assert str(caught.value).count("lm_head.weight") == 1


def test_buffers_are_no_weights(tmp_path):
    """Catches: masks and tables of angles, which old versions saved, refused as unexpected tensors."""
    source = Path(save_tiny(tmp_path / "a"))
    _, before = load_hf(str(source))
    attn = "model.layers.0.self_attn"
    buffers = {f"{attn}.rotary_emb.{n}": np.ones(3, np.float32) for n in ("inv_freq", "cos_cached", "sin_cached")}
    buffers |= {f"{attn}.masked_bias": np.float32([-1e4]), f"{attn}.bias": np.ones((1, 1, 8, 8), np.bool_)}
    buffers |= {"model.rotary_emb.inv_freq": np.ones(3, np.float32), "model.causal_mask": np.ones((4, 4), np.bool_)}
    rename(source, lambda name: name, **buffers)
    assert same_params(load_hf(str(source))[1], before)


def test_biases_of_nothing_are_left_out_and_others_named(tmp_path):
    """Catches: a refusal of biases that are all 0, and a config that forgot the others said as unexpected tensors."""
    source = Path(save_tiny(tmp_path / "a"))
    _, before = load_hf(str(source))
    zeros = {f"model.layers.{i}.self_attn.{n}_proj.bias": np.zeros(24, np.float32) for i in range(3) for n in "qkvo"}
    zeros |= {"model.norm.bias": np.zeros(24, np.float32), "lm_head.bias": np.zeros(64, np.float16)}
    rename(source, lambda name: name, **zeros)
    assert same_params(load_hf(str(source))[1], before)
    rename(source, lambda name: name, **{"model.layers.1.self_attn.q_proj.bias": np.ones(24, np.float32)})
    with pytest.raises(UserError, match="q_proj.bias is not 0, but config.json has no attention_bias: set attention_b"):
        load_hf(str(source))


def test_a_bias_that_no_layer_has_is_zero(tmp_path):
    """Catches: Qwen's habit, no bias on o_proj, refused where config.json says attention_bias."""
    source = Path(save_tiny(tmp_path / "a", tiny_model("bfloat16", attention_bias=True)))
    rename(source, lambda name: name)
    edit_weights(source, **{f"model__layers__{i}__self_attn__o_proj__bias": None for i in range(3)})
    config, params = load_hf(str(source))
    bias = params["layers"]["self_attn"]["o_proj"]["bias"]
    assert config.attention_bias and bias.shape == (3, 24) and not bias.any() and str(bias.dtype) == "bfloat16"
    edit_weights(source, model__layers__1__self_attn__q_proj__bias=None)
    with pytest.raises(UserError, match="missing tensor model.layers.1.self_attn.q_proj.bias"):
        load_hf(str(source))


def test_an_index_that_names_another_shard(tmp_path):
    """Catches: a tensor refused as missing that lies in another of the files."""
    source = Path(save_tiny(tmp_path / "a", max_shard_size="9KB"))
    _, before = load_hf(str(source))
    path = source / "model.safetensors.index.json"
    listed = json.loads(path.read_text())["weight_map"]
    files = sorted(set(listed.values()))
    turned = {name: files[files.index(file) - 1] for name, file in listed.items()}
    edit_json(path, weight_map=turned)
    assert same_params(load_hf(str(source))[1], before)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json", "adapter_model.bin"],
)
def test_git_lfs_pointers_are_named(tmp_path, name):
    """Catches: "header would have 2336927755350992246 bytes" for a file that was never fetched."""
    source = Path(save_tiny(tmp_path / "a"))
    if name != "config.json":
        (source / "model.safetensors").unlink()
    (source / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*run `git lfs pull`") as caught:
        open_tensor_file(str(source / name)) if name.startswith("adapter") else open_hf(str(source))
    assert "\n" not in str(caught.value)


FOREIGN = {
    "embedding_multiplier": (12.0, 1.0),
    "residual_multiplier": (0.22, 1),
    "attention_multiplier": (0.015625, 6**-0.5),
    "logits_scaling": (8.0, 1.0),
    "logit_scale": (0.0625, 1.0),
    "scale_emb": (12, 1),
    "scale_depth": (1.4, 3**0.5),
    "dim_model_base": (256, 24),
    "no_rope_layers": ([1, 1, 0], [1, 1, 1]),
    "use_qk_norm": (True, False),
    "qk_norm": (True, None),
    "layer_types": (["full_attention", "sliding_attention"], ["full_attention"] * 3),
    "is_causal": (False, True),
    "final_logit_softcapping": (30.0, None),
    "query_pre_attn_scalar": (224, 6),
    "num_local_experts": (8, 1),
    "n_routed_experts": (64, None),
    "kv_lora_rank": (512, None),
    "attention_chunk_size": (8192, None),
}


@pytest.mark.parametrize("key", FOREIGN)
def test_keys_of_other_architectures_are_refused_by_name(tmp_path, key):
    """Catches: Granite's multipliers or an encoder's mask ignored, and a model that answers nonsense."""
    source = Path(save_tiny(tmp_path))
    foreign, neutral = FOREIGN[key]
    before = load_config(str(source))
    edit_json(source / "config.json", **{key: neutral})
    assert load_config(str(source)) == before
    kind = "a mixture of experts" if "experts" in key else "another architecture"
    for value in (foreign, "x", [[0]]):
        edit_json(source / "config.json", **{key: value})
        with pytest.raises(UserError, match=f"{key} is .*: it makes {kind} of a LLaMA"):
            load_config(str(source))


@pytest.mark.parametrize("own, what", [("params", "a converted checkpoint"), ("checkpoints", "the workdir of a run")])
def test_our_own_folders_where_a_hugging_face_folder_is_needed(own, what, tmp_path):
    """Catches: a converted checkpoint or a workdir as the base of an adapter, told that its weights or its model_type
    are missing; --base that does nothing."""
    from peft_models import adapt

    base = Path(save_tiny(tmp_path / "base"))
    adapt(base, tmp_path / "adapter")
    if own == "params":
        convert_weights.main(["from-hf", str(base), str(tmp_path / "ours")])
    else:
        (tmp_path / "ours" / own).mkdir(parents=True)
        (tmp_path / "ours" / "config.json").write_text('{"seq_len": 64}')
    said = f"ours is {what}, and a Hugging Face folder is needed here: .*to-hf .*ours HF_DIR"
    for command in (["from-hf", "ours"], ["from-peft", "adapter", "--base", str(tmp_path / "ours")]):
        name, source, *flags = command
        with pytest.raises(UserError, match=said):
            convert_weights.main([name, str(tmp_path / source), str(tmp_path / "out"), *flags])
    if own == "params":
        with pytest.raises(
            UserError, match="--base .* is of a run, and .*ours is no workdir of train.py: leave it out"
        ):
            convert_weights.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "out"), "--base", str(base)])
    assert not (tmp_path / "out").exists()
