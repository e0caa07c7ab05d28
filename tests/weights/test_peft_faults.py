"""Adapters that something is wrong with: refused in one line that names it."""

import json
import os
import shutil

import pytest
from peft_models import V, adapt, edit_settings, edit_tensors

from longlora_jax.errors import UserError
from longlora_jax.weights.peft import load_peft, open_peft

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")


def set_to(**changes):
    return lambda folder: edit_settings(folder, **changes)


def with_tensors(changes):
    return lambda folder: edit_tensors(folder, **changes)


def shrink(folder, empty=True):
    """What DeepSpeed ZeRO-3 leaves of the weights that other processes hold."""
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({k: torch.empty(0) for k in tensors} if empty else {}, folder / "adapter_model.bin")


def hostile_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": os.system}, folder / "adapter_model.bin")


def quantize(folder):
    shutil.copytree(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"], folder / "q")
    config = json.loads((folder / "q" / "config.json").read_text())
    (folder / "q" / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    edit_settings(folder, base_model_name_or_path=str(folder / "q"))


def other_config(folder):
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = json.loads((open(f"{base}/config.json")).read())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48, "rms_norm_eps": 1.0}))


Q = "layers.0.self_attn.q_proj.lora_"
FAULTS = {
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "broken settings": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "there is neither adapter_model.safetensors nor adapter_model.bin in it",
    ),
    "cut off": (lambda f: os.truncate(f / "adapter_model.safetensors", 900), "adapter_model.safetensors is damaged"),
    "pickle": (hostile_pickle, "adapter_model.bin cannot be read: its pickle asks for"),
    "other kind": (set_to(peft_type="IA3"), "peft_type is 'IA3', it must be LORA"),
    "dora": (
        set_to(use_dora=True),
        "use_dora is set, but model.layers.0",
    ),
    "transposed": (set_to(fan_in_fan_out=True), "fan_in_fan_out is set"),
    "biases": (set_to(bias="some"), "bias is 'some', it must be none, all or lora_only"),
    "pissa": (set_to(init_lora_weights="pissa_niter_4"), "which changes the base as well"),
    "no rank": (set_to(r=None), "r is None, it must be a number"),
    "alpha": (set_to(lora_alpha="16"), "lora_alpha is '16', it must be a number"),
    "dropout": (set_to(lora_dropout=1.5), "lora_dropout is 1.5, it must be at least 0 and below 1"),
    "list as pattern": (set_to(rank_pattern=[1]), "rank_pattern is no table"),
    "pattern of text": (set_to(alpha_pattern={"q_proj": "x"}), "alpha_pattern has 'x' for 'q_proj'"),
    "half a pattern": (set_to(alpha_pattern={"(q_proj": 1}), "alpha_pattern has '(q_proj', which is no simple pattern"),
    "pattern of years": (set_to(alpha_pattern={"(([a-z_]+)*[0-9.]*)*!": 1}), "which is no simple pattern of names"),
    "rank of a pattern": (set_to(rank_pattern={"q_proj": 4}), "and lora_B [32, 3], their rank must be 4"),
    "rank": (with_tensors({Q + "A.weight": torch.ones(2, 24)}), "has lora_A [2, 24] and lora_B [32, 3]"),
    "shape": (with_tensors({Q + "A.weight": torch.ones(3, 23)}), "is adapted as [32, 23], it is [32, 24]"),
    "no matrix": (with_tensors({Q + "A.weight": torch.ones(3)}), "has lora_A [3] and lora_B [32, 3]"),
    "half a pair": (with_tensors({Q + "B.weight": None}), "q_proj.weight has only one of lora_A and lora_B"),
    "integers": (with_tensors({Q + "A.weight": torch.ones(3, 24, dtype=torch.int8)}), "is stored as I8"),
    "embedding": (
        with_tensors({"model.embed_tokens.lora_embedding_A": torch.ones(3, V)}),
        "model.embed_tokens.weight has only one of lora_A and lora_B",
    ),
    "magnitude": (
        with_tensors({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(3)}),
        "q_proj.weight has a lora_magnitude_vector, but use_dora is not set",
    ),
    "other model": (
        with_tensors({"h.0.attn.lora_A.weight": torch.ones(3, 5), "h.0.attn.lora_B.weight": torch.ones(5, 3)}),
        "h.0.attn.weight is adapted, but no projection of the base model",
    ),
    "adapted norm": (
        with_tensors({"model.norm.lora_A.weight": torch.ones(3, 5), "model.norm.lora_B.weight": torch.ones(5, 3)}),
        "model.norm.weight is adapted, but no projection of the base model",
    ),
    "unknown whole": (with_tensors({"score.weight": torch.ones(3)}), "score.weight is no weight of the base model"),
    "whole shape": (
        with_tensors({"model.norm.weight": torch.ones(23)}),
        "model.norm.weight has shape [23], it must be [24]",
    ),
    "fewer rows": (
        with_tensors({"model.embed_tokens.weight": torch.ones(V - 1, 24)}),
        f"model.embed_tokens.weight has shape [{V - 1}, 24], it must be [{V}, 24]",
    ),
    "rows of the head alone": (
        with_tensors({"lm_head.weight": torch.ones(V + 1, 24)}),
        f"lm_head.weight has shape [{V + 1}, 24], it must be [{V}, 24]",
    ),
    "flat embedding": (with_tensors({"model.embed_tokens.weight": torch.ones(V + 9)}), f"has shape [{V + 9}]"),
    "zero3": (shrink, "it was saved empty, as under DeepSpeed ZeRO-3: save it again with the weights gathered"),
    "nothing": (lambda f: shrink(f, empty=False), "it was saved empty"),
    "one of zero3": (with_tensors({Q + "A.weight": torch.empty(0)}), "it was saved empty"),
    "quantized base": (quantize, "the weights are quantized"),
    "other config": (other_config, "config.json is of another model than the base: other hidden_size, rms_norm_eps"),
}


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """An adapter that nothing is wrong with, to be damaged in a copy."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    adapt(bases["untied"], folder)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_adapter_is_refused_in_one_line(name, adapter, tmp_path):
    """Catches: a traceback, an adapter of which half is merged in silence, a file that runs code or never ends."""
    damage, message = FAULTS[name]
    shutil.copytree(adapter, tmp_path / "a")
    damage(tmp_path / "a")
    for read in (open_peft, load_peft):
        with pytest.raises(UserError) as caught:
            read(str(tmp_path / "a"))
        text = str(caught.value)
        assert message in text and text.startswith(str(tmp_path)) and "\n" not in text and len(text) < 900


def test_all_faults_of_an_adapter_are_named_at_once(adapter, tmp_path):
    """Catches: one fault a run, ten runs to mend a folder."""
    shutil.copytree(adapter, tmp_path / "a")
    edit_tensors(tmp_path / "a", **{Q + "B.weight": None, "score.weight": torch.ones(3), "x": torch.ones(3)})
    other_config(tmp_path / "a")
    with pytest.raises(UserError, match="(?=.*only one of)(?=.*score.weight)(?=.*x is no weight)(?=.*another model)"):
        open_peft(str(tmp_path / "a"))
    edit_settings(tmp_path / "a", use_qalora=True, r=0, base_model_name_or_path="/gone")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="(?=.*use_qalora)(?=.*r is 0)(?=.*neither adapter_model)(?=.*/gone is not)"):
        open_peft(str(tmp_path / "a"))
