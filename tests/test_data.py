"""The data room: what is read, how it is packed and shuffled, and where it resumes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longlora_jax import data
from longlora_jax.config import Config, DataConfig, validate
from longlora_jax.errors import UserError

REPO = Path(__file__).parents[1]
TINY = str(REPO / "models" / "tiny-python-llama")


def write(root: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def names(*args, **kwargs) -> list[str]:
    return [document.name for document in data.read_documents(*args, **kwargs)]


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=REPO, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def held_out() -> list[data.Document]:
    return list(data.read_documents("python", "", only=data.HELD_OUT))


# Sources


def test_a_config_without_a_path_is_refused():
    """Catches: a run that trains on every file of the folder that it happens to be started in."""
    config = Config(seq_len=16, steps=1, init_from="x", data=DataConfig(source="jsonl"))
    with pytest.raises(UserError, match="^data.path is empty"):
        validate(config)
    config.data.path, config.eval.every = "x", 5
    with pytest.raises(UserError, match="^eval.data.path is empty"):
        validate(config)
    config.eval.data.source, config.mixture = "python", (DataConfig(),)
    with pytest.raises(UserError, match=r"^mixture\[0\].path is empty"):
        validate(config)


def test_held_out_modules_and_their_tests_are_never_trained_on(tmp_path):
    """Catches leaks: a held-out file, its test, or a file of its name in another folder."""
    kept = ["a.py", "argparser.py", "test/test_os.py", "z/b.py"]
    held = ["argparse.py", "z/argparse.py", "test/test_argparse.py", "test/test_argparse/x/y.py"]
    root = write(tmp_path, dict.fromkeys([*kept, *held], "x = 1\n"))
    assert names("python", root, hold_out=("argparse.py",)) == kept


def test_standard_library_without_its_held_out_files(held_out):
    """Catches the same on the real corpus, by content as well as by name."""
    assert tuple(d.name for d in held_out) == data.HELD_OUT
    secret = {document.text for document in held_out}
    seen = 0
    for document in data.read_documents("python", "", hold_out=data.HELD_OUT):
        seen += len(document.text)
        parts = document.name.replace(".py", "").split("/")
        for name in data.HELD_OUT:
            assert name.removesuffix(".py") not in parts[-1:]
            assert f"test_{name.removesuffix('.py')}" not in parts
        assert document.text not in secret
        assert not {"site-packages", "dist-packages", "encodings", "pydoc_data"} & set(parts)
    assert seen > 2e6  # the modules alone, where a distribution leaves the tests out


def test_only_reads_relative_paths_and_names_a_missing_one(tmp_path):
    """Catches asyncio/subprocess.py read in the place of subprocess.py."""
    root = write(tmp_path, {"subprocess.py": "a", "asyncio/subprocess.py": "b"})
    assert names("python", root, only=("subprocess.py",)) == ["subprocess.py"]
    with pytest.raises(UserError, match="has no mailbox.py"):
        names("python", root, only=("subprocess.py", "mailbox.py"))


def test_python_sources_are_sorted_and_decoded_as_they_declare(tmp_path):
    """Catches an order that depends on the file system, and a declared encoding ignored."""
    latin = "# coding: latin-1\nname = 'é'\n"
    files = {
        "b/a.py": "b = 1\r\n",
        "b.py": "b = 2\n",
        "latin.py": latin.encode("latin-1"),
        "broken.py": b"x = '\xff'\n",
        "blank.py": "\n\n",
        "notes.txt": "no source",
        "site-packages/x.py": "x = 1",
        "lib2to3/tests/data/x.py": "x = 1",
        "lib2to3/tests/y.py": "y = 1",
        "_sysconfigdata_x.py": "x = 1",
    }
    read = {d.name: d.text for d in data.read_documents("python", write(tmp_path, files))}
    assert list(read) == ["b.py", "b/a.py", "latin.py", "lib2to3/tests/y.py"]
    assert read["latin.py"] == latin and read["b/a.py"] == "b = 1\n"


def test_text_files_by_file_folder_and_glob(tmp_path):
    """Catches a file read twice, in part, or under a name that hold_out cannot match."""
    root = write(tmp_path, {"a.txt": "A\r\n", "b/c.txt": "é", "b/d.md": "D", "blank.txt": " \n"})
    assert list(data.read_documents("text", f"{root}/a.txt")) == [data.Document("a.txt", "A\r\n")]
    assert names("text", root) == ["a.txt", "b/c.txt"]
    assert names("text", f"{root}/**/*.*") == ["a.txt", "b/c.txt", "b/d.md"]
    assert names("text", f"{root}/**/*.*", hold_out=("c.txt",)) == ["a.txt", "b/d.md"]
    assert names("text", f"{root}/b/*") == ["c.txt", "d.md"]


def test_a_hold_out_that_matches_nothing_is_reported(tmp_path, caplog):
    """Catches a misspelt name that would let the held-out file into training unseen."""
    root = write(tmp_path, {"argparse.py": "x = 1"})
    names("python", root, hold_out=("argprase.py",))
    assert "nothing in" in caplog.text and "argprase.py" in caplog.text


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("csv", "", "'csv' is not known: use one of python, text, hf"),
        ("python", "nowhere", "nowhere does not exist"),
        ("python", "texts", "texts' has no text"),
        ("text", "nowhere.txt", "nowhere.txt' does not exist"),
        ("text", "texts/*.rst", "no file matches"),
        ("text", "blank.txt", "blank.txt' has no text"),
        ("text", "texts/latin.txt", "latin.txt: not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_bad_corpora_are_refused_in_one_line(tmp_path, source, path, message):
    """Catches tracebacks, silent replacement of bytes, and runs on nothing at all."""
    write(tmp_path, {"blank.txt": "\n", "texts/latin.txt": "cafés".encode("latin-1")})
    with pytest.raises(UserError, match=message) as caught:
        names(source, str(tmp_path / path))
    assert "\n" not in str(caught.value)


def test_hugging_face_datasets_from_disk(tmp_path, monkeypatch):
    """Catches a saved dataset that is not recognised, a wrong split or column, an empty row."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"body": ["one", None, "", "two"]})
    one, many, lines = (str(tmp_path / name) for name in ("one", "many", "lines"))
    rows.save_to_disk(one)
    datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(many)
    write(tmp_path, {"lines/train.jsonl": '{"body": "three"}\n{"body": "four"}\n'})

    def texts(path, split="train"):
        return [d.text for d in data.read_documents("hf", path, text_key="body", split=split)]

    assert texts(one) == texts(many, "test") == ["one", "two"]
    assert texts(many) == ["one"]
    assert texts(lines) == ["three", "four"]
    with pytest.raises(UserError, match="set text_key to one of body"):
        names("hf", one)
    with pytest.raises(UserError, match="'nobody/nothing', split 'train', cannot be read") as hub:
        names("hf", "nobody/nothing")
    with pytest.raises(UserError, match="split 'dev', cannot be read"):
        texts(many, "dev")
    with pytest.raises(UserError, match="use its split"):
        names("hf", one, hold_out=("a.py",))
    assert "\n" not in str(hub.value)


# The room


def test_the_room_imports_neither_jax_nor_torch(tmp_path):
    """Catches an import that would keep data/ out of a worker process without jax."""
    for file in (REPO / "longlora_jax" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {m.split(".")[0] for m in modules} & {"jax", "jaxlib", "torch"}, file
    root = write(tmp_path, {"a.txt": "one two three four\n" * 20})
    code = f"""
import sys
sys.modules |= dict.fromkeys(("jax", "jaxlib", "torch", "transformers"))
from longlora_jax import data
tokenizer = data.load_tokenizer({TINY!r})
ids = data.tokenize_documents(data.read_documents("text", {root!r}), tokenizer)
windows = data.pack_documents(ids, 8, eos_id=tokenizer.eos_id)
print(next(data.batches(windows, batch_size=2, seed=0))["tokens"].shape)
"""
    done = command("-c", code)
    assert done.stdout.strip() == "(2, 8)", done.stderr
