"""What a run gives away: merged folders that transformers reloads, with the run's own perplexity and window."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from runs import train_here

import convert_weights
from longlora_jax.attention.rope import RopeScaling
from longlora_jax.config_file import read_config
from longlora_jax.data import HELD_OUT, load_tokenizer, read_documents
from longlora_jax.errors import UserError
from longlora_jax.evals import perplexity
from longlora_jax.fields import from_dict
from longlora_jax.weights import hf
from longlora_jax.weights.load import load_model, open_model
from longlora_jax.weights.rules import build_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
BASE = ROOT / "models" / "tiny-python-llama"
LENGTH = 512


def extend(workdir, *flags, base=BASE):
    """Runs configs/quickstart.py with so many flags on little data, under one pattern: one step to compile."""
    little = ("batch_size=1", "data.max_tokens=9000", "attention.full_last=0.0", f"init_from={base}")
    flags = [f"--config.{flag}" for flag in (*flags, *little)]
    train_here(read_config(str(ROOT / "configs" / "quickstart.py"), flags), workdir.parent, workdir)


def convert(*command):
    convert_weights.main([str(word) for word in command])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The shipped LLaMA after a few steps at twice its window: adapters, embedding and norms all moved."""
    folder = tmp_path_factory.mktemp("run")
    extend(folder / "work", f"seq_len={LENGTH}", "steps=4")
    return folder / "work"


@pytest.fixture(scope="module")
def exported(workdir):
    """{dtype: Hugging Face folder} of that run; "" stands for no --dtype."""
    folders = {}
    for dtype in ("", "float32"):
        folders[dtype] = workdir.parent / f"hf{dtype}"
        convert("to-hf", workdir, folders[dtype], *(["--dtype", dtype] if dtype else []))
    return folders


@pytest.fixture(scope="module")
def tokens():
    text = next(iter(read_documents("python", "", only=HELD_OUT[:1]))).text
    return load_tokenizer(str(BASE)).encode(text)[:LENGTH]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("text") / "held_out.py"
    text = next(iter(read_documents("python", "", only=HELD_OUT[:1]))).text
    path.write_text(text)
    return path


@functools.cache
def our_nll(model, text_file):
    out = text_file.parent / f"{model.name}.json"
    flags = ("--seq_len", LENGTH, "--max_windows", 1, "--json", out)
    perplexity.main([str(word) for word in ("--model", model, "--data", text_file, *flags)])
    return json.loads(out.read_text())["results"][0]["nll"]


def their_nll(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = torch.from_numpy(tokens[None].astype(np.int64))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(batch).logits[0, :-1].double(), -1)
    return -log_probs.gather(1, batch[0, 1:, None]).mean().item()


def test_the_exported_model_keeps_the_perplexity_of_the_run(workdir, exported, text_file, tokens):
    """Catches: an adapter, an embedding or a rope scaling that is lost on the way to transformers."""
    ours = our_nll(workdir, text_file)
    # Merged sums and unmerged ones differ by float32 rounding; perplexity is kept to well over 4 digits.
    assert our_nll(exported["float32"], text_file) == pytest.approx(ours, abs=1e-5)
    assert their_nll(exported["float32"], tokens) == pytest.approx(ours, abs=1e-5)
    # bfloat16 as the base: every merged weight is rounded once, by up to 1 in 256.
    rounded = our_nll(exported[""], text_file)
    assert their_nll(exported[""], tokens) == pytest.approx(rounded, abs=1e-5)
    assert rounded == pytest.approx(ours, abs=0.02) and rounded != ours
    assert their_nll(BASE, tokens) > ours + 0.05  # the run had something to lose


def test_an_export_has_the_dtypes_of_its_base_and_the_window_of_its_run(exported):
    """Catches: a bfloat16 model that comes back twice its size, a config that forgets what it was extended to."""
    config, table = hf.open_hf(str(exported[""]))
    assert {str(tensor.dtype) for tensor in table.values()} == {"bfloat16"}
    content = json.loads((exported[""] / "config.json").read_text())
    assert content["dtype"] == "bfloat16" and content["max_position_embeddings"] == LENGTH
    assert config.rope_scaling == RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=256)
    base, _ = hf.open_hf(str(BASE))
    assert base.max_position_embeddings == 256 and base.rope_scaling is None
    names = set(os.listdir(exported[""]))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= names
    assert transformers.AutoTokenizer.from_pretrained(exported[""])("def f")["input_ids"]


def test_merged_equals_unmerged_tensor_by_tensor(workdir):
    """Catches: two ways of merging (read by the tensor, in memory by jax) that part company."""
    lazily = open_model(str(workdir), "float32")
    loaded = load_model(str(workdir))
    import jax

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), loaded.params)
    merged = type(loaded)(loaded.config, params, loaded.lora, loaded.tokenizer_dir).merged()
    found = build_params(lazily.config, lazily.table)
    # One float32 product of rank 8 and one sum, in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), found, merged)
    base = hf.load_hf(str(BASE), "float32")[1]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kernels = (tree["layers"]["self_attn"][name]["kernel"] for tree in (found, base))
        assert np.abs(np.subtract(*kernels)).max() > 1e-5, name


def test_an_adapter_goes_to_peft_and_comes_back(workdir, text_file, tokens, tmp_path):
    """Catches: an adapter saved empty or without its embedding, and the rope that PEFT's files have no place for."""
    peft = pytest.importorskip("peft")
    adapter, back = tmp_path / "adapter", tmp_path / "back"
    convert("to-peft", workdir, adapter)
    # The lines of the adapter's README.
    config = transformers.AutoConfig.from_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(
        settings["base_model_name_or_path"], config=config, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, adapter)
    batch = torch.from_numpy(tokens[None].astype(np.int64))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(batch).logits[0, :-1].double(), -1)
    theirs = -log_probs.gather(1, batch[0, 1:, None]).mean().item()
    assert theirs == pytest.approx(our_nll(workdir, text_file), abs=1e-5)

    convert("from-peft", adapter, back)
    again, straight = open_model(str(back)), open_model(str(workdir))
    assert again.config == straight.config
    for name, tensor in straight.table.items():
        assert again.table[name].dtype == tensor.dtype
        np.testing.assert_array_equal(again.table[name].read(), tensor.read(), err_msg=name)


def test_only_a_run_with_adapters_goes_to_peft(tmp_path):
    """Catches: a folder of nothing for a model that was trained whole."""
    with pytest.raises(UserError, match="tiny-python-llama is not a workdir of train.py"):
        convert("to-peft", BASE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_second_extension_starts_from_the_original_window(workdir, exported, tmp_path):
    """Catches: 256 extended by 2 and by 4 again that is taken for 512 extended by 4."""
    extend(tmp_path / "work", "seq_len=2048", "steps=1", "rope.type=linear", base=exported[""])
    saved = json.loads((tmp_path / "work" / "config.json").read_text())
    assert saved["model"]["max_position_embeddings"] == 2048
    scaling = from_dict(RopeScaling, saved["model"]["rope_scaling"])
    assert (scaling.rope_type, scaling.factor, scaling.original_max_position_embeddings) == ("linear", 8.0, 256)
