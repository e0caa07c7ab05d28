"""Folders that bitsandbytes quantized, read as they are; bases quantized twice, or in a way that is not read."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny import random_batch, random_params, tiny_config

from longlora_jax.config import Config, LoraConfig, validate
from longlora_jax.errors import UserError
from longlora_jax.generate.generation import load_for_generation
from longlora_jax.model.codes import Quantization
from longlora_jax.model.decoder import Llama
from longlora_jax.parallel.sharding import make_mesh
from longlora_jax.plan import planner
from longlora_jax.training import run
from longlora_jax.weights import base, bnb
from longlora_jax.weights.hf import load_hf, open_hf, save_hf
from longlora_jax.weights.load import open_model

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "vocab_size": 40}
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{plain and every kind: a folder}: one model, quantized by transformers and bitsandbytes."""
    home = tmp_path_factory.mktemp("bnb")
    config = tiny_config(**SHAPE)
    save_hf(str(home / "plain"), config, random_params(Llama(config)))
    for kind, settings in SETTINGS.items():
        wanted = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
        options = {"quantization_config": wanted, "dtype": torch.float32}
        model = transformers.AutoModelForCausalLM.from_pretrained(home / "plain", **options)
        model.save_pretrained(home / kind)
    return {kind: home / kind for kind in ("plain", *SETTINGS)}


def transformers_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", SETTINGS)
def test_matrices_are_what_transformers_dequantizes(folders, kind):
    """Catches: another table, scales of the wrong block, a double quantization that loses its mean."""
    theirs = transformers_model(folders[kind]).dequantize().state_dict()
    config, table = open_hf(str(folders[kind]))
    assert bnb.of_table(config, table) == (Quantization.of(kind), True)
    for name, tensor in table.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].float().numpy(), err_msg=name)


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()


@pytest.mark.parametrize(
    "kind, folder",
    [("nf4", "plain"), *(pytest.param(kind, kind, marks=pytest.mark.slow) for kind in ("nf4_double", "fp4"))],
)
def test_logits_are_those_of_transformers_and_bitsandbytes(folders, kind, folder):
    """Catches: a base that is quantized otherwise than bitsandbytes would, a kernel that is turned on its way in."""
    # Dequantized first: on CPUs with AVX-512 for bfloat16 bitsandbytes multiplies by its codes in bfloat16.
    theirs = transformers_model(folders[kind]).dequantize().float()
    opened = open_model(str(folders[folder]))
    opened = opened._replace(quantization=bnb.agreed(opened.config, opened.table, kind, folder))
    llama, params = load_for_generation(opened)
    assert params["layers"]["mlp"]["up_proj"]["kernel"]["codes"].dtype == jnp.uint8
    tokens = random_batch(2, 24, vocab_size=40)["tokens"]
    ours = jax.jit(llama.apply)({"params": params}, tokens)
    np.testing.assert_allclose(ours, logits(theirs, tokens), atol=1e-4)


def config_of(folder, **changes) -> Config:
    """A resolved run from a folder."""
    shape = tiny_config(**SHAPE)
    config = Config(seq_len=32, steps=2, init_from=str(folder), model=shape, dtype="float32", remat="block")
    return dataclasses.replace(config, lora=LoraConfig(rank=2), **changes)


def test_gradients_are_those_of_arithmetic_on_the_same_codes(folders):
    """Catches: a gradient that goes through codes, or past them. Against the plain decoder on dequantized weights."""
    config = config_of(folders["nf4"], base_quantization="nf4")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batch = random_batch(1, 32, vocab_size=40)
    found = []
    for kind in ("nf4", "none"):
        config = dataclasses.replace(config, base_quantization=kind)
        state, frozen = run.initial_state(config, run.build_model(config, mesh), mesh)
        trainable = jax.tree.map(lambda x: x + 0.01, state.trainable)  # B is zero: A would have no gradient
        model = state.model

        def loss(trainable, model=model, frozen=frozen):
            params = run.trainable.combine(trainable, frozen)
            return jax.nn.logsumexp(model.apply({"params": params}, batch["tokens"])).sum()

        found.append(jax.jit(jax.grad(loss))(trainable))
    assert "kernel" not in str(jax.tree.structure(found[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), *found)


def test_a_run_keeps_a_quantized_base_as_it_is(folders):
    """Catches: a base that is quantized twice, in silence or otherwise."""
    for kind in SETTINGS:
        assert base.kept_as(config_of(folders[kind])) == kind
        assert base.kept_as(config_of(folders[kind], base_quantization=kind)) == kind
    assert base.kept_as(config_of(folders["plain"], base_quantization="nf4_double")) == "nf4_double"
    with pytest.raises(UserError, match=r"quantized already \(nf4\), and int8 would quantize it twice: ask for nf4"):
        base.kept_as(config_of(folders["nf4"], base_quantization="int8"))
    with pytest.raises(UserError, match="not quantized, and fp4 is only read"):
        base.kept_as(config_of(folders["plain"], base_quantization="fp4"))
    with pytest.raises(UserError, match=r"mode='full' trains every weight; set mode to longlora"):
        base.kept_as(config_of(folders["nf4"], mode="full"))
    with pytest.raises(UserError, match="twice"):
        open_model(str(folders["int8"]), quantize="nf4")


def test_a_plan_counts_a_quantized_folder_as_it_is(folders):
    """Catches: a plan of full matrices for a folder whose codes a run would keep."""
    given = config_of(folders["nf4"])
    assert given.base_quantization == "none"
    found = planner.with_base(given)
    assert found.base_quantization == "nf4" and found.model is not None
    assert planner.with_base(config_of(folders["plain"])).base_quantization == "none"
    with pytest.raises(UserError, match="is quantized"):
        planner.with_base(dataclasses.replace(given, mode="full"))


def test_a_quantized_base_cannot_train(folders):
    """Catches: a base in four bits with mode=full, which would train nothing of it."""
    with pytest.raises(UserError, match="base_quantization=nf4 keeps the base as codes, which have no gradient"):
        validate(dataclasses.replace(config_of(folders["plain"]), base_quantization="nf4", mode="full"))
    with pytest.raises(UserError, match="chunks=2 with remat='none' would keep every layer's matrices unpacked"):
        validate(dataclasses.replace(config_of(folders["plain"]), base_quantization="nf4", chunks=2, remat="none"))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
def test_other_methods_are_refused_by_name(folders, tmp_path, method):
    """Catches: codes of another method that are taken for weights."""
    content = json.loads((folders["plain"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=f"quantized by '{method}'.*made of"):
        load_hf(str(tmp_path))


NAME = "model.layers.0.mlp.up_proj.weight"
DAMAGE = {
    "no scales": ({f"{NAME}.absmax": None}, "has no"),
    "short scales": ({f"{NAME}.absmax": np.zeros(3, np.float32)}, "not 192 of float32"),
    "short codes": ({NAME: np.zeros((5, 1), np.uint8)}, "5 bytes of codes, not 6144"),
    "no JSON": ({f"{NAME}.quant_state.bitsandbytes__nf4": np.frombuffer(b"[1", np.uint8).copy()}, "damaged"),
    "JSON that is no object": ({f"{NAME}.quant_state.bitsandbytes__nf4": np.frombuffer(b"7", np.uint8).copy()}, "dam"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_codes_are_named(folders, tmp_path, damage):
    """Catches: a crash, or numbers, out of a file that is not whole."""
    shutil.copytree(folders["nf4"], tmp_path / "q")
    changes, words = DAMAGE[damage]
    tensors = load_file(tmp_path / "q" / "model.safetensors") | changes
    save_file({k: x for k, x in tensors.items() if x is not None}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(UserError, match=words) as fault:
        open_hf(str(tmp_path / "q"))
    assert NAME in str(fault.value)
