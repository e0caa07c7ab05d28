"""Sources: what is read and in which order, what is held out, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest

from longlora_jax import data
from longlora_jax.data.formats import Reading
from longlora_jax.data.source import Corpus, read_rows
from longlora_jax.errors import UserError


def write(root: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def names(*args, **kwargs) -> list[str]:
    return [document.name for document in data.read_documents(*args, **kwargs)]


@pytest.fixture(scope="module")
def held_out() -> list[data.Document]:
    return list(data.read_documents("python", "", only=data.HELD_OUT))


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
        ("xml", "", "'xml' is not known: use one of python, text, hf, jsonl, csv, parquet"),
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
    with pytest.raises(UserError, match="has no split 'dev', it has train, test"):
        texts(many, "dev")
    with pytest.raises(UserError, match="use its split"):
        names("hf", one, hold_out=("a.py",))
    assert "\n" not in str(hub.value)


def test_a_dataset_by_streaming_by_config_and_as_rows(tmp_path, monkeypatch):
    """Catches: a stream that is downloaded whole or loses rows, a config's name taken for part of the path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = write(tmp_path, {"lines/train.jsonl": '{"text": "three"}\n{"text": "four"}\n'})
    reading = Reading()
    for streaming in (True, False):
        corpus = Corpus("hf", f"{root}/lines", streaming=streaming)
        reading = Reading()
        assert [d.text for d in corpus.documents(reading)] == ["three", "four"]
        assert corpus.size == (None if streaming else 2) and reading.position == 2
    (first, _) = read_rows(f"{root}/lines", source="hf")
    assert (first.where, first.value) == (f"{root}/lines/train/0", {"text": "three"})
    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: seen.append(args) or [])
    Corpus("hf", "some/set:a-config", streaming=True)
    Corpus("hf", "some/set", streaming=True)
    assert seen == [("some/set", "a-config"), ("some/set", None)]


def test_a_dataset_of_a_loading_script_is_to_be_downloaded(monkeypatch):
    """Catches: a sample of RedPajama that cannot be read, and nothing said of how its files can be."""
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found Sample.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    said = r"scripts are no longer supported.*hf download --repo-type dataset some/set --local-dir DIR\).*=jsonl or"
    with pytest.raises(UserError, match=said):
        Corpus("hf", "some/set:a-config")


def test_rows_by_file_folder_and_glob(tmp_path):
    """Catches: a packed file that a folder hides, a file of another kind read, rows out of the order of the names."""
    row = '{"text": "%s", "body": "B"}\n'
    files = {
        "b.jsonl": row % "b",
        "a/a.json": f"[{row % 'a1'}, {row % 'a2'}]",
        "c.jsonl.gz": gzip.compress((row % "c").encode()),
        "notes.txt": "no rows",
    }
    root = write(tmp_path, files)
    assert [row.value["text"] for row in read_rows(root)] == ["a1", "a2", "b", "c"]
    assert [row.value["text"] for row in read_rows(f"{root}/*.jsonl*")] == ["b", "c"]
    documents = list(data.read_documents("jsonl", root))
    assert [d.text for d in documents] == ["a1", "a2", "b", "c"] and documents[2].name == f"{root}/b.jsonl, line 1"
    assert {d.text for d in data.read_documents("jsonl", root, text_key="body", hold_out=("c.jsonl.gz",))} == {"B"}
    corpus = Corpus("jsonl", root)
    assert corpus.size == sum(Path(root, name).stat().st_size for name in ("a/a.json", "b.jsonl", "c.jsonl.gz"))
    with pytest.raises(UserError, match="has no rows: use jsonl, parquet or hf"):
        list(read_rows(root, source="text"))


def test_bad_rows_of_a_corpus(tmp_path):
    """Catches: a bad row that stops a run which skips them, and a corpus of bad rows alone taken for an empty one."""
    root = write(tmp_path, {"a.jsonl": '{"text": "a"}\n{"text": 5}\n{"txt": "a"}\n{"text": null}\n'})
    with pytest.raises(UserError, match=r"a.jsonl, line 2: no text but a number in the field 'text'; mend it, or"):
        names("jsonl", root)
    reading = Reading("skip")
    assert [d.text for d in data.read_documents("jsonl", root, reading=reading)] == ["a"] and reading.skipped == 2
    with pytest.raises(UserError, match="has no text, 4 rows of it are left out as bad: name another"):
        list(data.read_documents("jsonl", root, text_key="body", reading=Reading("skip")))


def test_parquet_and_packed_texts(tmp_path):
    """Catches: a column not asked for that is read, a text file that is read only unpacked."""
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.table({"text": ["x", "y", None], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert [d.text for d in data.read_documents("parquet", str(tmp_path))] == ["x", "y"]
    rows = list(Corpus("parquet", str(tmp_path)).rows(Reading(), ["text"]))
    assert [json.dumps(row.value) for row in rows] == ['{"text": "x"}', '{"text": "y"}', '{"text": null}']
    assert list(data.read_documents("text", str(tmp_path))) == [data.Document("b.txt.gz", "packed")]
