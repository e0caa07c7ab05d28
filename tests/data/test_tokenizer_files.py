"""A tokenizer out of all files of its folder: SentencePiece's own ids, and the added tokens of transformers."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken

from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat_template import load_chat_template
from longlora_jax.data.prepare import Job, prepare
from longlora_jax.data.stream import TextStream
from longlora_jax.data.train_tokenizer import save_tokenizer, train_tokenizer
from longlora_jax.errors import UserError

TEXT = Path(json.__file__).read_text() + "  \t\n   x = f(  a,  b)\n\n\n        return aaaa aaa aa\n"
HARD = [
    *(
        "a  b",
        " a",
        "",
        " ",
        "   ",
        "a\n\n\n    b",
        "aaaaaaa aaaaa",
        "é漢🙂\x00",
        "def f(x):\n    return  x",
        "\u2581x",
    ),
    *("tokenizer  of  all       files", "x" * 40 + " " * 23 + "y" * 7),
]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 499723\n"


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    given = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "normalization_rule_name": "identity"}
    given |= {"remove_extra_whitespaces": False, "split_by_whitespace": False, "max_sentencepiece_length": 16}
    lines = iter(TEXT.splitlines(keepends=False))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, minloglevel=2, **(given | options)
    )
    return model.getvalue()


MODELS = {
    "llama": {},
    "suffix": {"treat_whitespace_as_suffix": True},
    "no prefix": {"add_dummy_prefix": False},
    "symbols": {"user_defined_symbols": ["<ud>", "    "]},
    "unigram": {"model_type": "unigram", "vocab_size": 420, "split_by_whitespace": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}


@pytest.fixture(scope="module")
def llama() -> bytes:
    return sentencepiece_model()


def folder_of(path: Path, model: bytes, **files) -> str:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("kind", MODELS)
def test_sentencepiece_reads_its_own_models(tmp_path, kind):
    """Catches: merges in the order of ids, a lost or doubled space, another kind of model read as BPE."""
    model = sentencepiece_model(**MODELS[kind])
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(folder_of(tmp_path, model))
    for text in [TEXT, *HARD, *TEXT.splitlines()]:
        ids = tokenizer.encode(text).tolist()
        assert ids == [oracle.bos_id(), *oracle.encode(text)], text
        if kind != "suffix":  # SentencePiece drops a space before such a text, though it put one after it
            assert tokenizer.decode(ids, skip_special_tokens=True) == oracle.decode(oracle.encode(text)), text
    assert [i.tolist() for i in tokenizer.encode_batch(HARD, add_bos=False)] == [oracle.encode(t) for t in HARD]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (oracle.bos_id(), oracle.eos_id(), None)
    assert tokenizer.vocab_size == tokenizer.max_id + 1 == oracle.vocab_size()


def test_sentencepiece_text_comes_as_it_is_streamed(tmp_path, llama):
    """Catches: a space lost, or half a character shown, where an answer is shown token by token."""
    tokenizer = load_tokenizer(folder_of(tmp_path, llama))
    for text in HARD:
        ids = tokenizer.encode_batch([text], add_bos=False)[0]
        stream = TextStream(tokenizer)
        shown = [*(stream.push(i) for i in ids), stream.finish()]
        assert "".join(shown) == stream.text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"bos_token": None}, [], []),
    ],
)
def test_what_encoding_adds_to_a_sentencepiece_model(tmp_path, llama, config, before, after):
    """Catches: BOS where tokenizer_config.json refuses it, which nothing else says beside a tokenizer.model."""
    tokenizer = load_tokenizer(folder_of(tmp_path, llama, tokenizer_config=config))
    plain = sentencepiece.SentencePieceProcessor(model_proto=llama).encode("a  b")
    assert tokenizer.encode("a  b").tolist() == [*before, *plain, *after]


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json", "special_tokens_map.json"])
def test_tokens_beside_a_sentencepiece_model(tmp_path, llama, where):
    """Catches: an added token in pieces, or the space before a text put after it as well."""
    size = 500
    files: dict[str, dict] = {
        "added_tokens_decoder": {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    str(size): {"content": "<|im_end|>", "special": True, "normalized": False},
                    str(size + 3): {"content": "<tool>", "lstrip": True},
                },
                "eos_token": "<|im_end|>",
            }
        },
        "added_tokens.json": {
            "added_tokens": {"<|im_end|>": size, "<tool>": size + 3},
            "special_tokens_map": {"eos_token": {"content": "<|im_end|>"}},
        },
        "special_tokens_map.json": {
            "special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<tool>"]},
        },
    }[where]
    tool = size + (1 if where == "special_tokens_map.json" else 3)
    tokenizer = load_tokenizer(folder_of(tmp_path, llama, **files))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=llama)
    goes_on = sentencepiece.SentencePieceProcessor(model_proto=llama + b"\x1a\x02\x18\x00")  # no space before it
    space = [] if where == "added_tokens_decoder" else goes_on.encode(" ")  # lstrip
    expected = [1, *oracle.encode("hi"), size, *goes_on.encode("\na"), *space, tool, *goes_on.encode("b"), 2]
    assert tokenizer.encode("hi<|im_end|>\na <tool>b</s>").tolist() == expected
    assert (tokenizer.eos_id, tokenizer.max_id) == (size, tool)
    assert tokenizer.vocab_size == size + 2
    assert "<|im_end|>" in tokenizer.special_tokens()
    assert tokenizer.decode([size, *oracle.encode("a"), 9999], skip_special_tokens=True) == "a"
    jinja = tmp_path / "chat_template.jinja"
    jinja.write_text("{{ bos_token }}{{ eos_token }}")
    assert load_chat_template(str(tmp_path)).render([]) == "<s><|im_end|>"


def test_legacy_spaces_after_added_tokens(tmp_path, llama):
    """Catches: `legacy: true`, by which a space goes before what follows an added token too."""
    tokenizer = load_tokenizer(folder_of(tmp_path, llama, tokenizer_config={"legacy": True}))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=llama)
    assert tokenizer.encode("a</s>b").tolist() == [1, *oracle.encode("a"), 2, *oracle.encode("b")]


JSON_CASES = {
    "decoder": {
        "tokenizer_config": {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "300": {"content": "<|im_end|>", "special": True, "normalized": False},
                "301": {"content": "<tool>", "rstrip": True, "special": False},
            },
        }
    },
    "added_tokens": {
        "tokenizer_config": {"eos_token": "</s>"},
        "added_tokens": {"<|im_end|>": 300, "<tool>": 301},
        "special_tokens_map": {"eos_token": {"content": "<|im_end|>"}, "pad_token": "[PAD]"},
    },
    "map": {"special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<tool>"]}},
    "decoder over map": {
        "tokenizer_config": {
            "eos_token": "</s>",
            "added_tokens_decoder": {"300": {"content": "</s>", "special": True, "normalized": False}},
        },
        "added_tokens": {"<tool>": 301},
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    },
    "a piece becomes special": {"tokenizer_config": {"eos_token": "return", "pad_token": "return"}},
    "config": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<tool>"}, "bos_token": "<|im_end|>"}},
}


@pytest.mark.parametrize("case", JSON_CASES)
def test_tokens_beside_a_tokenizer_json_as_in_transformers(tmp_path, case):
    """Catches: tokens that only another file than tokenizer.json knows in pieces, the wrong file's eos."""
    transformers = pytest.importorskip("transformers")
    backend = train_tokenizer([TEXT], 300)
    save_tokenizer(backend, str(tmp_path / "tokenizer"), model_max_length=64)
    folder = tmp_path / "tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    plain = load_tokenizer(str(folder)).fingerprint
    for name, content in JSON_CASES[case].items():
        if name == "tokenizer_config":
            content = {"tokenizer_class": "PreTrainedTokenizerFast", **content}
        (folder / f"{name}.json").write_text(json.dumps(content))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(str(folder))
    for text in ("return x<|im_end|>\nreturn", "a <tool>  b</s>", "[PAD]", "<|im_end|><tool>"):
        assert ours.encode(text).tolist() == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids)
        skipped = ours.decode(ours.encode(text), skip_special_tokens=True)
        assert skipped == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.vocab_size, ours.max_id) == (len(theirs), max(theirs.get_vocab().values()))
    assert ours.fingerprint != plain


def test_files_that_say_nothing_new_leave_the_fingerprint(tmp_path):
    """Catches: prepared corpora refused because a config repeats what tokenizer.json says."""
    backend = train_tokenizer([TEXT], 300)
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    save_tokenizer(backend, str(tmp_path / "t"), model_max_length=64)
    before = load_tokenizer(str(tmp_path / "t")).fingerprint
    config = {"bos_token": "<s>", "added_tokens_decoder": {"300": {"content": "<s>", "special": True}}}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    again = load_tokenizer(str(tmp_path / "t"))
    assert (again.fingerprint, again.bos_id) == (before, 300)


def test_the_class_names_roles_that_no_file_does(tmp_path):
    """Catches: no end of text in a folder of LlamaTokenizer, whose </s> goes without saying."""
    backend = train_tokenizer([TEXT], 300)
    backend.add_special_tokens(["<s>", "</s>"])
    save_tokenizer(backend, str(tmp_path / "t"), model_max_length=64)
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (300, 301)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": POINTER}, "tokenizer.model is a Git LFS pointer.*git lfs pull"),
        ({"tokenizer.json": POINTER}, "tokenizer.json is a Git LFS pointer"),
        ({"tokenizer_config.json": POINTER, "tokenizer.json": "{}"}, "tokenizer.json cannot be read"),
        ({"tokenizer.model": ""}, "tokenizer.model cannot be read as a SentencePiece model .it is empty"),
        ({"tokenizer.model": "no model\n"}, "tokenizer.model cannot be read as a SentencePiece model"),
        ({"vocab.json": POINTER, "merges.txt": ""}, "vocab.json is a Git LFS pointer"),
        (
            {"tokenizer.model": "IQ== 0\nIg== 1\n"},
            "has no tokenizer.json, and transformers cannot read its tokenizer.mod",
        ),
    ],
)
def test_vocabularies_that_cannot_be_read_are_named(tmp_path, files, message):
    """Catches: the wrong reason, such as a missing package, for a file that is not there or not one."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": [1]}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"-1": {"content": "a"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"3": "a"}}},
        {"tokenizer_config": {"added_tokens_decoder": {"3": {"content": 5}}}},
        {"tokenizer_config": {"additional_special_tokens": [5]}},
        {"added_tokens": {"<a>": "5"}},
        {"added_tokens": {"<a>": 2**40}},
        {"special_tokens_map": {"eos_token": 5}},
    ],
)
def test_bad_tables_of_tokens_are_refused(tmp_path, llama, files):
    """Catches: tracebacks out of files that anyone may have written, with either kind of vocabulary."""
    folder = folder_of(tmp_path, llama, **files)
    with pytest.raises(UserError, match="decoder has|must be the token's id|is no text"):
        load_tokenizer(folder)
    save_tokenizer(train_tokenizer([TEXT], 300), str(tmp_path / "t"), model_max_length=64)
    shutil.copy(tmp_path / "t" / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="decoder has|must be the token's id|is no text"):
        load_tokenizer(folder)


def test_ids_beyond_the_number_of_tokens_are_kept(tmp_path):
    """Catches: ids of a tokenizer with a hole stored in 16 bits, since it has fewer tokens than that."""
    backend = train_tokenizer([TEXT], 300)
    save_tokenizer(backend, str(tmp_path / "t"), model_max_length=64)
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 70_000
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert (tokenizer.vocab_size, tokenizer.max_id, tokenizer.rows) == (300, 70_000, 70_001)
    (tmp_path / "corpus.txt").write_text(tokenizer.decode([70_000, 5, 70_000]) * 20)
    prepare(Job("text", str(tmp_path / "corpus.txt"), str(tmp_path / "t")), str(tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["encoding"], manifest["vocab_size"]) == ("uint32", 70_001)
