"""Tokenizers in GGUF files of families besides LLaMA: Gemma's, Phi-3's and Qwen's."""

import random

import numpy as np
import pytest
import tokenizers
import transformers
from gguf_files import D, random_tensors, write_gguf
from test_gguf import TEXT, byte_level_vocab, sentencepiece_ids, spm_vocab

from longlora_jax.weights.gguf import load_gguf


def tokenizer_of(tmp_path, keys=None, **tokenizer):
    """Ours for a file with these tokenizer.ggml keys, as the tokenizers library reads it."""
    size = (len(tokenizer["tokens"]), D)
    tensors = random_tensors() | {name: np.zeros(size, np.float32) for name in ("token_embd.weight", "output.weight")}
    _, _, files = load_gguf(write_gguf(tmp_path / "t.gguf", tensors, keys=keys, tokenizer=tokenizer))
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"])


def test_qwens_is_transformers(tmp_path):
    """Catches: digits cut in threes, as Llama 3 does it, and letters that are left decomposed."""
    tokens, merges = byte_level_vocab()
    ours = tokenizer_of(tmp_path, model="gpt2", pre="qwen2", tokens=tokens, merges=merges)
    reference = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges]
    )
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices([*TEXT.split(" "), " ", "\n", "123", "e\u0301", "DON'T"], k=12))
        assert ours.encode(text).ids == reference(text).input_ids, text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-4o", ["camel", "Case", "ĠXMLHttp's", "Ġ", "123", "4"]),
        ("tekken", ["camel", "Case", "ĠXMLHttp", "'s", "Ġ", "1", "2", "3", "4"]),
        ("smollm", ["camelCase", "ĠXMLHttp", "'s", "Ġ", "1", "2", "3", "4"]),
        ("stablelm2", ["camelCase", "ĠXMLHttp", "'s", "Ġ", "1", "2", "3", "4"]),
        ("dbrx", ["camelCase", "ĠXMLHttp", "'s", "Ġ", "123", "4"]),
    ],
)
def test_words_are_cut_as_the_models_own_tokenizers_cut_them(pre, expected, tmp_path):
    """Catches: a class of letters that is cut otherwise than by the expression in the model's tokenizer.json."""
    tokens, merges = byte_level_vocab()
    ours = tokenizer_of(tmp_path, model="gpt2", pre=pre, tokens=tokens, merges=merges)
    assert [word for word, _ in ours.pre_tokenizer.pre_tokenize_str("camelCase XMLHttp's 1234")] == expected


def test_gemmas_takes_runs_of_spaces_whole_and_adds_none(tmp_path):
    """Catches: a space put before the text, runs of spaces and lines merged piece by piece, a first token left out."""
    tokens, scores, types = spm_vocab()
    runs = ["\n\n", "  ", "   "]
    keys = {"tokens": tokens + runs, "scores": scores + [-1000.0] * 3, "token_type": types + [4] * 3}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    ours = tokenizer_of(tmp_path, model="llama", add_space_prefix=False, **keys, **ids)

    def expected(text):
        for run in ("   ", "  ", "\n\n"):  # the longest first
            before, found, after = text.partition(run)
            if found:
                return expected(before) + [len(tokens) + runs.index(run)] + expected(after)
        # Without the space that SentencePiece puts before a text otherwise.
        return sentencepiece_ids(text, tokens, scores, prefix="") if text else []

    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices(["The", " quick", "fox", "12", "  ", "   ", "\n\n", "ж", "\U0001f600"], k=8))
        if "    " in text or "\n\n\n" in text:
            continue  # either way of cutting them is right
        assert ours.encode(text).ids == [1, *expected(text)], text
        assert ours.decode(ours.encode(text).ids) == text


def test_phi3s_special_tokens_swallow_spaces(tmp_path):
    """Catches: a chat prompt of Phi-3 with a space more than it was trained on, which the file does not say."""
    tokens, scores, types = spm_vocab()
    keys = {"tokens": [*tokens, "<|user|>"], "scores": [*scores, 0.0], "token_type": [*types, 3]}
    last = len(tokens)
    for architecture, pieces in (("phi3", 1), ("llama", 2)):
        files = load_tokenizer_of(tmp_path, architecture, keys)
        ids = tokenizers.Tokenizer.from_str(files["tokenizer.json"]).encode("<|user|> ", add_special_tokens=False).ids
        assert ids[0] == last and len(ids) == pieces


def load_tokenizer_of(tmp_path, architecture, keys):
    """The files of a tokenizer alone: the reader of a whole Phi-3 is tested elsewhere."""
    from types import SimpleNamespace

    from longlora_jax.weights.gguf_tokenizer import tokenizer_files

    values = {f"tokenizer.ggml.{key}": value for key, value in ({"model": "llama"} | keys).items()}
    values["general.architecture"] = architecture
    config = SimpleNamespace(vocab_size=len(keys["tokens"]), max_position_embeddings=64)
    return tokenizer_files("m.gguf", lambda key, default=None: values.get(key, default), config)
