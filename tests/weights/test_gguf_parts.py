"""GGUF models in parts, more ways of cutting text into words, and keys that make another architecture of a LLaMA."""

import json
import os
import shutil

import gguf
import numpy as np
import pytest
import regex
import tokenizers
from gguf_files import TEXT, V, random_tensors, write_gguf

from longlora_jax.errors import UserError
from longlora_jax.weights.gguf import load_gguf, open_gguf
from longlora_jax.weights.gguf_tokenizer import tokenizer_files


def write_parts(folder, sizes, name="model", **changes):
    """A model cut as gguf-split cuts it: parts with so many tensors each, the keys in the first."""
    tensors, paths = list(random_tensors().items()), []
    whole = gguf.GGUFReader(write_gguf(folder / "whole.gguf"))
    for number, size in enumerate(sizes):
        path = folder / f"{name}-{number + 1:05d}-of-{len(sizes):05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, field in whole.fields.items():
                if key.startswith(("llama.", "tokenizer.")):
                    kinds = [field.types[0], field.types[-1] if len(field.types) > 1 else None]
                    writer.add_key_value(key, field.contents(), *kinds)
        given = {"no": number, "count": len(sizes), "tensors.count": len(random_tensors())} | changes
        writer.add_uint16("split.no", given["no"])
        writer.add_uint16("split.count", given["count"])
        writer.add_int32("split.tensors.count", given["tensors.count"])
        for tensor, array in tensors[:size]:
            writer.add_tensor(tensor, array)
        del tensors[:size]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(str(path))
    (folder / "whole.gguf").rename(folder / "whole")
    return str(folder / "whole"), paths


SIZES = [0, 5, 9, len(random_tensors()) - 14]  # gguf-split's --no-tensor-first-split leaves the first empty


def test_a_model_in_parts_from_any_of_them(tmp_path):
    """Catches: "missing tensors", or the tokenizer lost, for a model in parts."""
    whole, paths = write_parts(tmp_path, SIZES)
    config, params, files = load_gguf(whole)
    for path in paths:
        ours, others, found = load_gguf(path)
        assert (ours, found) == (config, files)
        assert np.array_equal(others["lm_head"]["kernel"], params["lm_head"]["kernel"])
        layer, expected = (tree["layers"]["mlp"]["down_proj"]["kernel"] for tree in (others, params))
        assert np.array_equal(layer, expected)


def test_parts_that_do_not_go_together_are_named(tmp_path):
    """Catches: half a model, or two halves of different ones, read as one."""
    _, paths = write_parts(tmp_path, SIZES)
    shutil.copy(paths[1], tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match="is one of 4 parts, its name must be as gguf-split gives it"):
        open_gguf(str(tmp_path / "renamed.gguf"))
    os.rename(paths[2], tmp_path / "aside")
    with pytest.raises(UserError, match="its part model-00003-of-00004.gguf is missing"):
        open_gguf(paths[0])
    shutil.copy(paths[1], paths[2])
    with pytest.raises(UserError, match="00003-of-00004.gguf says that it is part 2 of 4"):
        open_gguf(paths[0])
    (tmp_path / "b").mkdir()
    _, short = write_parts(tmp_path / "b", SIZES, **{"tensors.count": 99})
    with pytest.raises(UserError, match=f"its parts have {sum(SIZES)} tensors, not 99"):
        open_gguf(short[1])
    with open(short[3], "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match="00004-of-00004.gguf is no GGUF file, damaged or cut off") as caught:
        open_gguf(short[0])
    assert "\n" not in str(caught.value)


# As llama.cpp cuts, by another regular expression engine; letters by their Unicode properties.
CUTS = {
    "deepseek-llm": [
        *(r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"),
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        *(r"\s+$", r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}+"),
    ],
    "deepseek-coder": [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ],
    "falcon3": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
TEXTS = [TEXT, "Привет, Ωμέγα ﬁ ÀÉ  x=1234;  \t\r\n\n 한국어123 ！？ “a”… f(x)+y  ", "a  b   c\n    d", "  "]


def cut(text, expressions):
    pieces = [text]
    for expression in expressions:
        pieces = [part for piece in pieces for part in regex.split(f"({expression})", piece) if part]
    return pieces


@pytest.mark.parametrize("kind", CUTS)
def test_text_is_cut_as_llama_cpp_cuts(kind, tmp_path):
    """Catches: a kind that is refused, or cut by another one's expressions."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    given = {"model": "gpt2", "pre": kind, "tokens": alphabet, "merges": ["a b"], "bos_token_id": 40}
    config = load_gguf(write_gguf(tmp_path / "a.gguf"))[0]
    config.vocab_size = len(alphabet)
    read = {f"tokenizer.ggml.{key}": value for key, value in given.items() if key != "merges"}
    files = tokenizer_files("a.gguf", lambda key, default=None: read.get(key, default), config)
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    decoder = tokenizers.decoders.ByteLevel()
    for text in TEXTS:
        pieces = [decoder.decode([piece]) for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == cut(text, CUTS[kind]), text
        assert decoder.decode(backend.encode(text, add_special_tokens=False).tokens) == text
    adds = len(backend.encode("").ids) == 1
    assert adds == (kind == "falcon3") and json.loads(files["tokenizer_config.json"])["bos_token"] == alphabet[40]


@pytest.mark.parametrize(
    ("key", "foreign", "neutral"),
    [
        ("logit_scale", 0.0625, 1.0),
        ("residual_scale", 0.22, 1.0),
        ("embedding_scale", 12.0, 1.0),
        ("attention.scale", 0.015625, 0.125),
        ("attention.causal", False, True),
        ("final_logit_softcapping", 30.0, 0.0),
    ],
)
def test_keys_of_other_architectures_are_refused_by_name(tmp_path, key, foreign, neutral):
    """Catches: a scaled model read as a plain LLaMA, since its file says llama."""
    plain = load_gguf(write_gguf(tmp_path / "plain.gguf"))[0]
    assert load_gguf(write_gguf(tmp_path / "a.gguf", keys={f"llama.{key}": neutral}))[0] == plain
    with pytest.raises(UserError, match=f"llama.{key} is .*: it makes another architecture of a llama, which"):
        open_gguf(write_gguf(tmp_path / "b.gguf", keys={f"llama.{key}": foreign}))
    assert plain.vocab_size == V


def test_a_git_lfs_pointer_is_named(tmp_path):
    """Catches: "no GGUF file, damaged or cut off" for a file that was never fetched."""
    (tmp_path / "a.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n")
    with pytest.raises(UserError, match="a.gguf is a Git LFS pointer.*git lfs pull"):
        open_gguf(str(tmp_path / "a.gguf"))
