"""Rows and texts out of files: what is broken is named by file and line, or left out and counted; nothing else."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longlora_jax.data import formats
from longlora_jax.data.formats import Reading, read_file_rows, read_text_file, text_of
from longlora_jax.data.source import Corpus
from longlora_jax.errors import UserError
from longlora_jax.files import DEEPEST, TOO_DEEP, load_json

GOOD = [{"text": "one"}, {"text": "zwei é 漢 🙂", "n": [1, {"a": None}]}, {"text": ""}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def values(path, reading=None) -> list:
    return [row.value for row in read_file_rows(path, reading or Reading())]


def fault(path, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        list(read_file_rows(path, Reading(), **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_arrow_pads_structs_with_is_not_read(tmp_path):
    """Catches: a call of one tool with the arguments of all tools, null, where the same rows in JSON have its own."""
    rows = [
        {"calls": [{"name": "a", "x": {"city": "Ulm"}}], "n": None},
        {"calls": [{"name": "b", "x": {"m": 1}}], "n": 2},
    ]
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.value for row in read_file_rows(tmp_path / "a.parquet", Reading())] == rows
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path)).save_to_disk(tmp_path / "hf")
    assert [row.value for row in Corpus("hf", str(tmp_path / "hf")).rows(Reading())] == rows


def write_parquet(path: Path, columns: dict) -> Path:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_format_gives_the_same_rows_and_says_where_each_stands(tmp_path):
    """Catches: a format or a packing that loses or doubles a row, a line counted from 0 or without its blank lines."""
    text = lines(GOOD)
    for name, content in {
        "a.jsonl": text.encode(),
        "crlf.jsonl": b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        "no_end.ndjson": text.rstrip().encode(),
        "a.jsonl.gz": gzip.compress(text.encode(), mtime=0),
        "two.jsonl.gz": gzip.compress(lines(GOOD[:1]).encode()) + gzip.compress(lines(GOOD[1:]).encode()),
        "a.jsonl.zst": zstandard.compress(text.encode()),
        "two.jsonl.zst": zstandard.compress(lines(GOOD[:1]).encode()) + zstandard.compress(lines(GOOD[1:]).encode()),
        "lines.json": text.encode(),
        "array.json": json.dumps(GOOD).encode(),
        "indented.json": b"\xef\xbb\xbf\n" + json.dumps(GOOD, indent=1, ensure_ascii=False).encode(),
        "array.json.zst": zstandard.compress(json.dumps(GOOD).encode()),
    }.items():
        assert values(write(tmp_path / name, content)) == GOOD, name
    file = write(tmp_path / "blank.jsonl", '\n{"a": 1}\n \n{"a": 2}\n')
    assert [row.where for row in read_file_rows(file, Reading())] == [f"{file}, line 2", f"{file}, line 4"]
    file = write(tmp_path / "where.json", '[\n{"a": 1},\n\n {"a":\n2}, {}]\n')
    wanted = [f"{file}, item {item} (line {line})" for item, line in ((1, 2), (2, 4), (3, 5))]
    assert [row.where for row in read_file_rows(file, Reading())] == wanted
    file = write_parquet(tmp_path / "a.parquet", {"text": ["one", None], "n": [1, 2]})
    rows = list(read_file_rows(file, Reading()))
    assert [row.value for row in rows] == [{"text": "one", "n": 1}, {"text": None, "n": 2}]
    assert rows[1].where == f"{file}, row 2"
    assert values(write(tmp_path / "empty.jsonl", "")) == values(write(tmp_path / "none.json", "[ ]")) == []


def test_a_long_array_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Catches: an item or a number cut where one piece of the file ends and the next begins."""
    monkeypatch.setattr(formats, "CHUNK", 5)
    rows = [{"text": "x" * n + '\\"é', "n": 10**n, "f": -1.5e-7, "t": True} for n in range(40)]
    for indent in (None, 3):
        file = write(tmp_path / "a.json", json.dumps(rows, indent=indent))
        assert values(file) == rows
    reading = Reading("skip")
    assert values(write(tmp_path / "a.json", '[1234567890, {"a": 1}]'), reading) == [{"a": 1}] and reading.skipped == 1


# Python 3.13 reads it, and then calls itself less deeply than that.
DEEP = b"[" * 2000 + b"]" * 2000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n', "a.jsonl, line 2: not JSON (Expecting ',' delimiter"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: a list where a JSON object is needed"),
        ("a.jsonl", b'{"a": "caf\xe9"}\n', "line 1: not UTF-8: byte 0xe9 at offset 10"),
        ("a.jsonl", b'{"a": "\\ud83d"}\n', "line 1: half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON (it is nested too deeply)"),
        ("a.jsonl", b'{"a": %b}\n' % DEEP, "line 1: not JSON (it is nested too deeply)"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "line 1: not JSON (Exceeds the limit"),
        ("a.jsonl", os.urandom(4) + b"\x80\x00\x01" * 99, "line 1: not"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9], "a.jsonl.gz: damaged (Compressed file ended"),
        ("a.jsonl.gz", b'{"a": 1}\n', "damaged (Not a gzipped file"),
        ("a.jsonl.zst", zstandard.compress(b'{"a": 1}\n' * 999)[:-3], "damaged (it ends in the middle of its data)"),
        ("a.jsonl.zst", b'{"a": 1}\n' * 99, "a.jsonl.zst: damaged ("),
        ("a.json", b'[{"a": 1},\n{"a": 2]', "a.json, line 2: not JSON (Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1},\n', "line 2: not JSON (Expecting value"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "line 2: not JSON (']' expected, found '{')"),
        ("a.json", b'[{"a": 1}] 5', "line 1: not JSON (text after the end"),
        ("a.json", b'[{"a": 1}, 7]', "item 2 (line 1): a number where a JSON object is needed"),
        ("a.json", b'[{"a": "\xff"}]', "line 1: not UTF-8: byte 0xff"),
        ("a.json", b"[" * 100_000, "line 1: not JSON (it is nested too deeply)"),
        ("a.json", b'[{"a": %b}]' % DEEP, "line 1: not JSON (it is nested too deeply)"),
        ("a.json", b'{\n"rows": []}', "a.json, line 2: not JSON (one object, without rows"),
        ("a.parquet", b"PAR1 or not", "a.parquet, after row 0: not Parquet that can be read"),
    ],
)
def test_broken_rows_are_named_or_left_out_and_counted(tmp_path, name, content, message):
    """Catches: a traceback, a fault without its line, a bad row that ends a run which skips such, or is not counted."""
    file = write(tmp_path / name, content)
    assert message in fault(file)
    reading = Reading("skip")
    rows = values(file, reading)
    assert reading.skipped >= 1 and all(isinstance(row, dict) for row in rows)


def test_so_deep_and_no_deeper():
    """Catches: a limit that is one off, that counts brackets in strings or neighbours, or that Python sets."""
    for inner, depth in (("", 0), ("1", 0), ('{"a": 1}', 1), ('"[[{{"', 0)):
        spelled = "[" * (DEEPEST - depth) + inner + "]" * (DEEPEST - depth)
        assert load_json(spelled) == json.loads(spelled)
        with pytest.raises(ValueError, match=TOO_DEEP):
            load_json(f"[{spelled}]")
    assert len(load_json(f"[{'[{}],' * DEEPEST}1]")) == DEEPEST + 1


def test_good_rows_around_a_bad_one_are_kept(tmp_path, caplog):
    """Catches: a skip that takes its neighbours with it, and one that nobody hears of."""
    bad = ["{", "[]", '{"a": "\\udc00"}', "nul"] * 5
    content = "".join(f'{{"a": {n}}}\n{line}\n' for n, line in enumerate(bad)).encode()
    reading = Reading("skip")
    assert [row["a"] for row in values(write(tmp_path / "a.jsonl", content), reading)] == list(range(20))
    assert reading.skipped == 20
    assert "a.jsonl, line 2: not JSON" in caplog.text and len(caplog.records) == formats.SHOWN + 1
    reading = Reading("skip")
    assert values(write(tmp_path / "a.json", '[{"a": 1}, 5, {"a": 2}, {"a": ]'), reading) == [{"a": 1}, {"a": 2}]
    assert reading.skipped == 2


def test_a_row_past_the_limit_is_not_held(tmp_path, monkeypatch):
    """Catches: one crafted line, item or text that takes all memory, also where it is packed a thousandfold."""
    monkeypatch.setattr(formats, "ROW_LIMIT", 1000)
    monkeypatch.setattr(formats, "CHUNK", 100)
    long, row = '{"a": "' + "x" * 100_000 + '"}', '{"a": "b"}'
    for name, pack in {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstandard.compress}.items():
        file = write(tmp_path / name, pack(f"{row}\n{long}\n{row}\n".encode()))
        assert "line 2: a row of more than 1,000 bytes" in fault(file)
        reading = Reading("skip")
        assert values(file, reading) == [{"a": "b"}, {"a": "b"}] and reading.skipped == 1
    assert "an item of more than 1,000 characters" in fault(write(tmp_path / "a.json", f"[{row}, {long}]"))
    file = write_parquet(tmp_path / "a.parquet", {"a": ["b", "x" * 2000, "b"]})
    assert "row 2: a row of more than 1,000 bytes" in fault(file)
    reading = Reading("skip")
    assert values(file, reading) == [{"a": "b"}, {"a": "b"}] and reading.skipped == 1
    with pytest.raises(UserError, match="set/7: a text of more than 1,000 characters"):  # of a dataset
        text_of(formats.Row("set/7", {"text": "x" * 1001}), "text", Reading())
    with pytest.raises(UserError, match="one text of more than 1,000 bytes"):
        read_text_file(write(tmp_path / "a.txt", "x" * 1001), Reading())


def test_a_bomb_of_zstd_takes_no_time(tmp_path):
    """Catches: a few kilobytes that unpack to much, and are copied over and over on the way."""
    file = write(tmp_path / "a.jsonl.zst", zstandard.compress(b'{"a": "' + b"x" * 100_000_000 + b'"}\n{"a": "b"}'))
    assert file.stat().st_size < 10_000
    started = time.thread_time()
    assert [len(row["a"]) for row in values(file)] == [100_000_000, 1]
    assert time.thread_time() - started < 4  # 0.5 s; 20 s with the copies


def test_texts_are_read_exactly_and_binary_files_are_refused(tmp_path):
    """Catches: line ends changed, one stray zero byte that costs a whole manual, UTF-16 taken for UTF-8."""
    text = "a\r\nb\0" + "é" * 99
    for name, pack in {"a.txt": bytes, "a.txt.gz": gzip.compress, "a.txt.zst": zstandard.compress}.items():
        assert read_text_file(write(tmp_path / name, pack(text.encode())), Reading()) == text
    for content, message in ((b"caf\xe9", "not UTF-8: byte 0xe9 at offset 3"), ("abc".encode("utf-16-le"), "UTF-16")):
        file = write(tmp_path / "b.txt", content)
        with pytest.raises(UserError, match=f"b.txt: .*{message}"):
            read_text_file(file, Reading())
        reading = Reading("skip")
        assert read_text_file(file, reading) is None and reading.skipped == 1
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read \(No such file"):
        read_text_file(tmp_path / "nowhere.txt", Reading("skip"))  # a wrong path is no bad row


def test_the_text_of_a_row(tmp_path):
    """Catches: a missing field or a number that becomes a text or a traceback."""
    row = formats.Row("f, line 1", {"text": "a", "n": 1, "none": None})
    assert text_of(row, "text", Reading()) == "a" and text_of(row, "none", Reading()) is None
    with pytest.raises(UserError, match="f, line 1: no field 'body', set text_key to one of text, n, none; mend"):
        text_of(row, "body", Reading())
    with pytest.raises(UserError, match="f, line 1: no text but a number in the field 'n'"):
        text_of(row, "n", Reading())
    file = write_parquet(tmp_path / "a.parquet", {"text": ["one"]})
    assert "has no column body: set text_key to one of text" in fault(file, columns=["body"])


def test_the_position_reaches_the_size_of_the_file(tmp_path):
    """Catches: a progress bar that counts unpacked bytes, goes back, or never ends."""
    for name, pack in {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstandard.compress}.items():
        file = write(tmp_path / name, pack(lines([{"text": "x" * n} for n in range(2000)]).encode()))
        reading = Reading()
        reading.position = 7
        seen = [reading.position for _ in read_file_rows(file, reading)]
        assert seen == sorted(seen) and seen[0] > 7 and reading.position == 7 + file.stat().st_size
    file = write_parquet(tmp_path / "a.parquet", {"text": ["a"] * 200})
    reading = Reading()
    seen = [reading.position for _ in read_file_rows(file, reading)]
    assert seen == sorted(seen) and seen[-1] == reading.position == file.stat().st_size


def test_zstd_is_an_extra(tmp_path, monkeypatch):
    """Catches: an ImportError where one line could say what to install."""
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert "pip install zstandard" in fault(write(tmp_path / "a.jsonl.zst", zstandard.compress(b"{}")))


SEEDS = [lines(GOOD).encode(), json.dumps(GOOD, indent=1, ensure_ascii=False).encode()]
SEEDS += [gzip.compress(SEEDS[0], mtime=0), zstandard.compress(SEEDS[0])]


@settings(max_examples=150)
@given(
    st.sampled_from(SEEDS),
    st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst", "a.parquet"]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 4), st.binary(max_size=6)), max_size=4),
    st.sampled_from(["stop", "skip"]),
)
@example(b'{"a": NaN}', "a.jsonl", [], "stop")
@example(b'[{"a": "\\ud800"}]', "a.json", [], "skip")
def test_any_bytes_give_rows_or_one_line(tmp_path_factory, seed, name, edits, on_bad_row):
    """Catches: a crafted file that ends in another exception, or in a text that no tokenizer can take."""
    for at, cut, new in edits:
        seed = seed[:at] + new + seed[at + cut :]
    file = write(tmp_path_factory.getbasetemp() / name, seed)
    reading = Reading(on_bad_row)
    try:
        for row in read_file_rows(file, reading):
            assert isinstance(row.value, dict)
            json.dumps(row.value, ensure_ascii=False).encode("utf-8")
    except UserError as error:
        assert on_bad_row == "stop" and "\n" not in str(error)
    try:
        text = read_text_file(file, reading)
        assert text is None or text.encode("utf-8") == seed or name.endswith((".gz", ".zst"))
    except UserError as error:
        assert on_bad_row == "stop" and "\n" not in str(error)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 20), st.binary(max_size=9)), min_size=1, max_size=3))
def test_any_parquet_gives_rows_or_one_line(tmp_path_factory, edits):
    """Catches: pyarrow's many exceptions let through."""
    base = tmp_path_factory.getbasetemp()
    content = write_parquet(base / "seed.parquet", {"text": [f"row {n}" for n in range(300)]}).read_bytes()
    for at, cut, new in edits:
        at %= len(content)
        content = content[:at] + new + content[at + cut :]
    reading = Reading("skip")
    for row in read_file_rows(write(base / "a.parquet", content), reading):
        assert isinstance(row.value, dict)
