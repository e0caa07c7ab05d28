"""Corpora prepared on disk: the same tokens as in memory, after any kill, and nothing damaged or foreign is read."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longlora_jax import data
from longlora_jax.config import DataConfig
from longlora_jax.data import prepare as command
from longlora_jax.data import prepared
from longlora_jax.data.documents import open_documents
from longlora_jax.data.prepare import Job, prepare
from longlora_jax.data.prepared import Prepared
from longlora_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "models" / "tiny-python-llama")
TEXTS = [f"def f_{n}(x):\n    return x + {n}\n" * (n * n % 37 + 1) for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.load_tokenizer(TINY)


@pytest.fixture
def job(tmp_path) -> Job:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(rows[:25]))
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(rows[25:]))
    return Job("jsonl", str(tmp_path / "in"), TINY, shard_characters=8000)


def whole(documents) -> list[list[int]]:
    return [documents.read(i, 0, int(n))[0].tolist() for i, n in enumerate(documents.lengths)]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_prepared_equals_in_memory(tmp_path, job, tokenizer):
    """Catches: a token lost or moved on the way to the disk, a manifest whose counts or digests are not the data's."""
    out = str(tmp_path / "out")
    manifest = prepare(job, out)
    documents = open_documents(DataConfig(source="arrayrecord", path=out), tokenizer)
    memory = open_documents(DataConfig(source="jsonl", path=job.path), tokenizer)
    assert whole(documents) == whole(memory) and documents.eos_id == memory.eos_id == manifest["eos_id"]
    assert manifest == json.loads(Path(out, "manifest.json").read_text()) and len(manifest["shards"]) > 3
    assert set(contents(out)) == {
        "manifest.json",
        "index.npy",
        "sources.json",
        *(s["file"] for s in manifest["shards"]),
    }
    lengths = memory.lengths.tolist()
    assert (manifest["documents"], manifest["tokens"]) == (60, sum(lengths)) and manifest["skipped_rows"] == 0
    expected = {str(2**k): sum(2**k <= n < 2 ** (k + 1) for n in lengths) for k in range(16)}
    assert manifest["lengths"] == {name: count for name, count in expected.items() if count}
    fingerprint = hashlib.sha256(Path(TINY, "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer"]["fingerprint"] == fingerprint and manifest["vocab_size"] == 4096
    sources = json.loads(Path(out, "sources.json").read_text())
    for source in sources:
        content = Path(source["file"]).read_bytes()
        assert (source["bytes"], source["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert [Path(source["file"]).name for source in sources] == ["a.jsonl", "b.jsonl"]
    prepare(job, str(tmp_path / "again"))
    assert contents(out) == contents(tmp_path / "again")


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
@example([16, 17, 32, 33, 1], None)
def test_parts_of_long_documents_are_read_alone(tmp_path_factory, lengths, draw):
    """Catches: an offset past the first record of a book, a record too many or too few at a border, a wrong shard."""
    folder = str(tmp_path_factory.mktemp("prepared"))
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 4096, n) for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "RECORD_TOKENS", 16)
        patch.setattr(command, "RECORD_TOKENS", 16)
        patch.setattr(command, "tokenize_documents", lambda texts, *_, **__: (documents[int(d.text)] for d in texts))
        Path(folder, "in.jsonl").write_text("\n".join(json.dumps({"text": str(n)}) for n in range(len(lengths))))
        out = prepare(Job("jsonl", f"{folder}/in.jsonl", TINY, shard_characters=3), f"{folder}/out")
        assert len(out["shards"]) == -(-len(lengths) // 3)
        opened = Prepared(f"{folder}/out")
        assert opened.lengths.tolist() == lengths
        for index, ids in enumerate(documents):
            start = draw.draw(st.integers(0, len(ids))) if draw else 0
            stop = draw.draw(st.integers(start, len(ids))) if draw else len(ids)
            assert opened.read(index, start, stop)[0].tolist() == ids[start:stop].tolist()


class Killed(BaseException):
    """What a test throws where a process would have died."""


@pytest.mark.parametrize("after", [1, 2, 4, "manifest"])
def test_stopped_work_goes_on_and_ends_as_if_undisturbed(tmp_path, job, monkeypatch, after):
    """Catches: a document twice or missing at the seam, finished shards made again, another result after a stop."""
    prepare(job, str(tmp_path / "wanted"))
    close, made = command._ShardWriter.close, []

    def counted(self, *args, **kwargs):
        shard = close(self, *args, **kwargs)
        made.append(shard.file)
        if len(made) == after:
            raise Killed
        return shard

    monkeypatch.setattr(command._ShardWriter, "close", counted)
    if after == "manifest":
        monkeypatch.setattr(command, "_manifest", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        prepare(job, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    first, made[:] = list(made), []
    monkeypatch.undo()
    monkeypatch.setattr(command._ShardWriter, "close", lambda *a, **k: (made.append(1), close(*a, **k))[1])
    prepare(job, str(tmp_path / "out"))
    shards = len(list((tmp_path / "wanted").glob("shard*")))
    assert len(made) == shards - len(first)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


@pytest.mark.parametrize("after", [0, 1, 5, 10**6])
def test_a_stop_while_it_tidies_up_costs_nothing(tmp_path, job, monkeypatch, after):
    """Catches: finished shards made again, or another job's taken over, after a kill between the manifest and the name.

    after: files that are removed before it.
    """
    prepare(job, str(tmp_path / "wanted"))
    unlink, removed = os.unlink, []

    def counted(path, *args, **kwargs):
        if ".out.incomplete" not in str(path):
            return unlink(path, *args, **kwargs)
        if len(removed) == after:
            raise Killed
        removed.append(path)
        unlink(path, *args, **kwargs)

    def killed(*_):
        raise Killed

    monkeypatch.setattr(os, "unlink", counted)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(Killed):
        prepare(job, str(tmp_path / "out"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished work with another add_bos"):
        prepare(replace(job, add_bos=False), str(tmp_path / "out"))
    monkeypatch.setattr(command, "_write_shards", killed)
    prepare(job, str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_a_first_try_that_finished_nothing_binds_nobody(tmp_path, job):
    """Catches: a corrected call that is refused because the wrong one came first."""
    path = tmp_path / "in" / "a.jsonl"
    path.write_text("{\n" + path.read_text())
    with pytest.raises(UserError, match="a.jsonl, line 1: not JSON"):
        prepare(job, str(tmp_path / "out"))
    assert prepare(replace(job, on_bad_row="skip"), str(tmp_path / "out"))["skipped_rows"] == 1


def test_a_name_that_is_no_text_is_refused(tmp_path, job):
    """Catches: a traceback of the library that writes the records."""
    with pytest.raises(UserError, match=r"o\\udcff is no UTF-8: give another name"):
        prepare(job, str(tmp_path / "o\udcff"))


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path):
    """Catches: the same for a real kill -9, in the middle of whatever it was doing."""
    for n in range(20):
        (tmp_path / f"{n}.txt").write_text(f"x = [{n}, 2, 3]\n" * 3000)
    code = f"""
import os
os.environ["RAYON_NUM_THREADS"] = "1"
from longlora_jax.data.prepare import Job, prepare
prepare(Job("text", {str(tmp_path)!r}, {TINY!r}, shard_characters=1000), {str(tmp_path / "out")!r})
"""
    aside = tmp_path / ".out.incomplete"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    done = aside / "shard-00000.array_record.json"
    deadline = time.monotonic() + 60
    while not done.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    if child.returncode == 0:
        pytest.skip("it was done before it could be killed")
    written = done.stat().st_mtime_ns
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    manifest = prepare(Job("text", str(tmp_path), TINY, shard_characters=1000), str(tmp_path / "wanted"))
    assert Prepared(str(tmp_path / "out")).manifest["shards"] == manifest["shards"]
    assert (tmp_path / "out" / "shard-00000.array_record").stat().st_mtime_ns <= written


def test_a_changed_source_or_job_is_not_mixed_in(tmp_path, job, monkeypatch):
    """Catches: a folder of which half is of one corpus or tokenizer, half of another."""
    monkeypatch.setattr(command, "_manifest", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        prepare(job, str(tmp_path / "out"))
    monkeypatch.undo()
    for change in ({"max_tokens": 9}, {"add_bos": False}, {"text_key": "t"}):
        with pytest.raises(UserError, match=f"unfinished work with another {next(iter(change))}: start with"):
            prepare(replace(job, **change), str(tmp_path / "out"))
    (last,) = [p for p in (tmp_path / ".out.incomplete").glob("*.json") if '"last": true' in p.read_text()]
    last.unlink()
    path = tmp_path / "in" / "a.jsonl"
    path.write_text(path.read_text().replace("f_0", "g_0"))
    with pytest.raises(UserError, match="the corpus has changed since shard-00000.array_record was made"):
        prepare(job, str(tmp_path / "out"))
    path.write_text(path.read_text().replace("g_0", "f_0"))
    rest = (tmp_path / "in" / "b.jsonl").rename(tmp_path / "b.jsonl")  # the corpus ends before the shards do
    with pytest.raises(UserError, match="the corpus has changed since shard-0000[1-9].array_record was made"):
        prepare(job, str(tmp_path / "out"))
    rest.rename(tmp_path / "in" / "b.jsonl")
    shutil.rmtree(tmp_path / ".out.incomplete")
    prepare(job, str(tmp_path / "out"))
    with pytest.raises(UserError, match="out exists already"):
        prepare(job, str(tmp_path / "out"))


def test_max_tokens_and_skipped_rows(tmp_path, job, tokenizer):
    """Catches: a corpus cut in another place than in memory, files among the sources that were not read."""
    memory = DataConfig(source="jsonl", path=job.path, max_tokens=900)
    manifest = prepare(replace(job, max_tokens=900, shard_characters=700), str(tmp_path / "out"))
    assert manifest["tokens"] == 900
    assert whole(Prepared(str(tmp_path / "out"))) == whole(open_documents(memory, tokenizer))
    assert [Path(s["file"]).name for s in json.loads(Path(tmp_path, "out", "sources.json").read_text())] == ["a.jsonl"]
    with (tmp_path / "in" / "b.jsonl").open("a") as file:
        file.write("\n{\n5\n")
    with pytest.raises(UserError, match="b.jsonl, line 36: not JSON"):
        prepare(job, str(tmp_path / "stopped"))
    assert prepare(replace(job, on_bad_row="skip"), str(tmp_path / "skipped"))["skipped_rows"] == 2


def test_another_tokenizer_is_refused_by_name(tmp_path, job, tokenizer):
    """Catches: ids of one vocabulary trained on as those of another."""
    out = str(tmp_path / "out")
    prepare(job, out)
    other = tmp_path / "other"
    shutil.copytree(TINY, other, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    foreign = data.load_tokenizer(str(other))
    theirs, ours = tokenizer.fingerprint[:12], foreign.fingerprint[:12]
    assert theirs != ours
    message = rf"another tokenizer \({TINY}, fingerprint {theirs}\) than that of this run \(fingerprint {ours}\)"
    with pytest.raises(UserError, match=message):
        open_documents(DataConfig(source="arrayrecord", path=out), foreign)
    with pytest.raises(UserError, match="prepared with add_bos=True: set add_bos so"):
        open_documents(DataConfig(source="arrayrecord", path=out, add_bos=False), tokenizer)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[150] ^= 1
    path.write_bytes(content)


def rewrite(change) -> None:
    def apply(path: Path) -> None:
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def swap_lengths(path: Path) -> None:
    index = np.load(path)
    index[0, :2] += [1, -1]
    np.save(path, index)


def shift_first(path: Path) -> None:
    index = np.load(path)
    index[1, 2] += 1
    np.save(path, index)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-00001.array_record", Path.unlink, "shard-00001.array_record is missing"),
        ("shard-00001.array_record", cut, "shard-00001.array_record has .* bytes, not"),
        ("shard-00000.array_record", flip, "shard-00000.array_record cannot be read"),
        ("shard-00000.array_record", lambda p: p.write_bytes(b"0" * p.stat().st_size), "has 0 records, not"),
        ("index.npy", Path.unlink, "index.npy cannot be read"),
        ("index.npy", cut, "index.npy cannot be read"),
        ("index.npy", lambda p: np.save(p, np.zeros((2, 3))), "index.npy is float64"),
        ("index.npy", lambda p: np.save(p, np.load(p) + 1), "index.npy and manifest.json do not agree"),
        ("index.npy", shift_first, "index.npy and manifest.json do not agree"),
        ("index.npy", swap_lengths, "a record of shard-00000.array_record has .* bytes, not"),
        ("manifest.json", Path.unlink, "has no manifest.json: name a folder"),
        ("manifest.json", cut, "manifest.json cannot be read as JSON"),
        (
            "manifest.json",
            rewrite(lambda m: m.update(format_version=2)),
            "is of format version 2, this program reads 1",
        ),
        ("manifest.json", rewrite(lambda m: m.pop("shards")), "manifest.json lacks or mistakes 'shards'"),
        ("manifest.json", rewrite(lambda m: m.update(shards=[5])), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m.update(encoding="utf8")), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m["shards"][0].update(records=4)), "do not agree"),
        ("manifest.json", rewrite(lambda m: m["shards"][0].update(records="abc")), "manifest.json lacks or mistakes"),
        (
            "manifest.json",
            rewrite(lambda m: m["shards"][0].update(records=float("inf"))),
            "manifest.json lacks or mist",
        ),
        ("manifest.json", rewrite(lambda m: m["shards"][0].update(records=10**30)), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m["shards"][0].update(file="a\0b")), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m["shards"][0].update(file="\ud800")), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m["shards"][0].update(file="../out/x")), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m["shards"][0].update(file="..")), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m.update(encoding="float64")), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m.update(eos_id="x")), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m.update(eos_id=4096)), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m.update(vocab_size=5)), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m.update(vocab_size=None)), "manifest.json lacks or mistakes"),
        ("manifest.json", rewrite(lambda m: m.update(tokenizer={"folder": 1, "fingerprint": 2})), "lacks or mistakes"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, job, tokenizer, name, damage, message):
    """Catches: a traceback, or tokens that are not those of the corpus, out of a folder that was copied in part."""
    prepare(job, str(tmp_path / "out"))
    damage(tmp_path / "out" / name)
    with pytest.raises(UserError, match=message) as caught:
        whole(open_documents(DataConfig(source="arrayrecord", path=str(tmp_path / "out")), tokenizer))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_an_id_past_the_vocabulary_is_refused(tmp_path, job):
    """Catches: ids past the embedding, which XLA would clamp in silence, out of a folder of somebody else's."""
    prepare(job, str(tmp_path / "out"))
    rewrite(lambda m: m.update(vocab_size=100))(tmp_path / "out" / "manifest.json")
    with pytest.raises(UserError, match="is damaged: .* holds the id [0-9]+, the vocabulary has 100"):
        whole(Prepared(str(tmp_path / "out")))


def test_an_opened_corpus_travels_to_other_processes(tmp_path, job):
    """Catches: a pickle that takes the index or the readers along, or that opens what has changed since."""
    prepare(job, str(tmp_path / "out"))
    documents = Prepared(str(tmp_path / "out"))
    wanted = whole(documents)
    packed = pickle.dumps(documents)
    assert len(packed) < 300 and whole(pickle.loads(packed)) == wanted
    code = "import pickle, sys; d = pickle.load(sys.stdin.buffer); print(d.read(3, 0, int(d.lengths[3]))[0].tolist())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=packed, capture_output=True)
    assert json.loads(done.stdout) == wanted[3], done.stderr
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "in" / "a.jsonl").unlink()
    prepare(job, str(tmp_path / "out"))
    assert whole(Prepared(str(tmp_path / "out"))) == wanted[25:]  # not what was open under this name


def test_wide_vocabularies_take_four_bytes():
    """Catches: ids past 65,535 that lose their upper half."""
    assert [prepared.encoding_of(n) for n in (32_000, 65_536, 65_537, 128_256)] == ["uint16"] * 2 + ["uint32"] * 2


def test_the_command(tmp_path, job):
    """Catches: an argument that does nothing, progress on standard output, a traceback where one line will do."""

    def run(*args: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "longlora_jax.data.prepare", "--tokenizer", TINY, *args]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})

    out = str(tmp_path / "out")
    done = run("--source", "jsonl", "--path", job.path, "--out", out, "--workers", "1", "--no_bos")
    assert done.returncode == 0, done.stderr
    manifest = Prepared(out, add_bos=False).manifest
    assert done.stdout == f"{out}: {manifest['tokens']:,} tokens of 60 documents in 1 shards, 0 rows left out\n"
    assert "tokenizing" in done.stderr
    for args, message in (
        (("--source", "jsonl", "--path", job.path, "--out", out), f"error: {out} exists already"),
        (("--source", "xml", "--out", out), "error: argument --source: invalid choice: 'xml'"),
        (("--source", "text", "--path", "nowhere", "--out", f"{out}2"), "error: 'nowhere' does not exist"),
    ):
        done = run(*args)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
