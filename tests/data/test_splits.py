"""Which rows a run trains on and which it evaluates on: splits, shares by hash, and files of rows in other forms."""

import dataclasses
import json

import pytest
from chats import CHATML, template_folder

from longlora_jax.config import Config, DataConfig, EvalConfig, validate, with_held_out_eval
from longlora_jax.config_file import read_config
from longlora_jax.data import load_tokenizer, open_documents, show
from longlora_jax.data.formats import Reading
from longlora_jax.data.source import Corpus, Share, read_rows
from longlora_jax.errors import UserError
from longlora_jax.files import write_json
from longlora_jax.training import run

ROWS = [{"text": f"row {n}", "n": n} for n in range(400)]


def config(**changes) -> Config:
    return dataclasses.replace(Config(seq_len=128, steps=1, init_from="base"), **changes)


def numbers(path, source="jsonl", **options) -> list[int]:
    return [row.value["n"] for row in Corpus(source, str(path), **options).rows(Reading())]


def test_parts_of_a_saved_dataset_are_disjoint(tmp_path, monkeypatch):
    """Catches: train[:4] and train[4:] that both read everything, so that the evaluation leaks."""
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS[:10])
    datasets.DatasetDict({"train": whole, "test": whole.select([9])}).save_to_disk(tmp_path / "many")
    whole.save_to_disk(tmp_path / "one")
    datasets.Dataset.from_list(ROWS[:10], split="test").save_to_disk(tmp_path / "test")
    for folder in ("one", "many"):
        parts = [numbers(tmp_path / folder, "hf", split=split) for split in ("train[:4]", "train[4:]", "train[:20%]")]
        assert parts == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9], [0, 1]]
        stream = Corpus("hf", str(tmp_path / folder), split="train[4:]", streaming=True)
        assert [row.value["n"] for row in stream.rows(Reading())] == parts[1]
    assert numbers(tmp_path / "many", "hf", split="test+train[:1]") == [9, 0]
    for folder, split, there in (("one", "test", "train"), ("many", "dev", "train, test"), ("test", "train", "test")):
        with pytest.raises(UserError, match=f"has no split '{split}', it has {there}"):
            numbers(tmp_path / folder, "hf", split=split)
    for split in ("train[", "train[4", "train[:x]"):
        with pytest.raises(UserError, match="has no split"):
            numbers(tmp_path / "many", "hf", split=split)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hf"])
def test_a_share_of_the_rows_is_held_out_by_their_hash(kind, tmp_path):
    """Catches: rows in both parts or in none, parts that change with the order, equal rows on both sides."""
    path = tmp_path / f"rows.{kind}"
    rows = [*ROWS, ROWS[7]]
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        path.write_text("text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in rows))
    elif kind == "parquet":
        pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(path)
    trained, held = (list(map(int, numbers(path, kind, share=Share(0.1, out)))) for out in (False, True))
    assert sorted(trained + held) == sorted(row["n"] for row in rows) and not {*trained} & {*held}
    assert 20 < len(held) < 60
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, reversed(rows))))
        assert numbers(path, kind, share=Share(0.1, True)) == held[::-1]
    texts = [d.text for d in Corpus(kind, str(path), share=Share(0.1, True)).documents(Reading())]
    assert sorted(texts) == sorted(f"row {n}" for n in held)


def test_texts_are_held_out_by_share_too(tmp_path):
    """Catches: a share that files of text have not."""
    for n in range(60):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    parts = [
        {d.text for d in Corpus("text", str(tmp_path), share=Share(0.3, out)).documents(Reading())} for out in (0, 1)
    ]
    assert len(parts[0]) + len(parts[1]) == 60 and not parts[0] & parts[1] and 5 < len(parts[1]) < 35


def test_an_evaluation_takes_what_training_leaves(tmp_path):
    """Catches: an evaluation of rows that are trained on, in each way that a config can say them."""
    data = DataConfig("jsonl", "rows.jsonl", hold_out_share=0.1)
    for given in (DataConfig(), DataConfig("jsonl", "rows.jsonl"), dataclasses.replace(data)):
        eval_data = with_held_out_eval(config(data=data, eval=EvalConfig(1, data=given))).eval.data
        assert (eval_data.path, eval_data.hold_out_share) == ("rows.jsonl", 0.1)
    other = with_held_out_eval(config(data=data, eval=EvalConfig(1, data=DataConfig("jsonl", "other.jsonl"))))
    assert other.eval.data == DataConfig("jsonl", "other.jsonl")
    unequal = config(data=data, eval=EvalConfig(1, data=dataclasses.replace(data, hold_out_share=0.2)))
    with pytest.raises(UserError, match="are of the same rows: set the same"):
        validate(unequal)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = dataclasses.replace(data, path=str(tmp_path / "rows.jsonl"))
    tokenizer = load_tokenizer(template_folder(tmp_path, CHATML))
    lengths = [open_documents(data, tokenizer, held_out=out).lengths for out in (False, True)]
    assert sum(map(len, lengths)) == 400 and 20 < len(lengths[1]) < 60


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"source": "jsonl", "split": "train[:4]"}, "data.split='train.:4.' is for source 'hf'"),
        ({"hold_out_share": 1.0}, "hold_out_share=1.0 is a share of the rows"),
        ({"source": "tokens", "hold_out_share": 0.1}, "source 'tokens' has tokens alone"),
        ({"last_turn_only": True}, "data.last_turn_only has no effect"),
        ({"too_long": "stop"}, "data.too_long has no effect"),
        ({"too_long": "left"}, "data.too_long='left' is unknown: use one of drop, cut_left, cut_right, stop"),
    ],
)
def test_switches_that_do_nothing_are_refused(changes, fault):
    """Catches: a flag that does nothing."""
    with pytest.raises(UserError, match=fault):
        validate(config(data=DataConfig(path="x", **changes)))


def test_one_run_has_one_prompt():
    """Catches: a model that is trained under two prompts, of which its export can have one."""
    parts = [DataConfig("jsonl", "x", task="sft", packing="best_fit", prompt=p) for p in ("chat", "alpaca")]
    with pytest.raises(UserError, match=r"data.prompt=chat, mixture\[0\].prompt=alpaca: a model is asked under one"):
        validate(config(data=parts[0], mixture=(parts[1],)))


@pytest.mark.parametrize(
    "content",
    [
        '{"data": [{"n": 1}, {"n": 2}]}',
        '{\n  "version": "1.0",\n  "data": [\n {"n": 1},\n {"n": 2}\n ],\n "more": {"a": [1]}\n}\n',
        '{"version": 2, "data": [{"n": 1},\n{"n": 2}], "more": []}',
    ],
)
def test_json_with_its_rows_under_data(content, tmp_path):
    """Catches: "not JSON" said of a file that is."""
    (tmp_path / "a.json").write_text(content)
    assert [(row.value["n"], row.where.split("item ")[1][0]) for row in read_rows(str(tmp_path))] == [
        (1, "1"),
        (2, "2"),
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{\n "rows": [{"n": 1}]\n}', 'one object, without rows under "data": give a list of rows, or a row a line'),
        ('{"data": [{"n": 1}', "it ends before ']'"),
        ('{"data": [{"n": 1}]} x', "text after the end of the object"),
    ],
)
def test_json_that_has_no_rows_says_so(content, fault, tmp_path):
    """Catches: rows that are lost, or a fault without what to do."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=fault):
        list(read_rows(str(tmp_path)))


def test_json_lines_stay_lines_whatever_their_first_field(tmp_path):
    """Catches: rows of JSON Lines taken for one object around rows."""
    rows = [{"messages": [{"n": 1}]}, {"data": "x"}, {"a": 1, "data": []}]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    assert [row.value for row in read_rows(str(tmp_path))] == rows


def test_csv(tmp_path):
    """Catches: "not JSON" said of a CSV file, line ends in a field, a row of another length taken for a whole one."""
    path = tmp_path / "a.csv"
    path.write_text('\ufeffinstruction,output\n"q, ""x""","a\nb"\nr,s\n')
    for source in ("csv", "jsonl"):
        rows = list(read_rows(str(path), source=source))
        assert [row.value for row in rows] == [
            {"instruction": 'q, "x"', "output": "a\nb"},
            {"instruction": "r", "output": "s"},
        ]
    assert rows[1].where.endswith("a.csv, line 4")
    (tmp_path / "b.tsv").write_text("n\tm\n1\t2\n")
    assert [row.value for row in read_rows(str(tmp_path / "b.tsv"), source="csv")] == [{"n": "1", "m": "2"}]
    for broken, fault in (
        ("a,b\n1\n", "another number of columns"),
        ("a,b\n1,2,3\n", "another number"),
        ('a\n"b', "not CSV"),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=f"a.csv, line .*{fault}"):
            list(read_rows(str(path), source="csv"))


def test_examples_are_shown_as_they_are_trained_on(tmp_path, capsys):
    """Catches: a mark around what is not scored, an example that is not the run's, a command that wants weights."""
    folder = template_folder(tmp_path, CHATML)
    rows = [{"instruction": f"q{n}", "output": f"Jane {n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.py").write_text(
        "from longlora_jax.config import *\n\n\ndef get_config():\n"
        "    data = DataConfig('jsonl', 'nowhere', task='sft', packing='best_fit')\n"
        f"    return Config(seq_len=64, steps=1, init_from={folder!r}, data=data)\n"
    )
    flags = ["--config", str(tmp_path / "run.py"), f"--config.data.path={tmp_path / 'rows.jsonl'}"]
    show.main([*flags, "--first", "1", "--count", "2"])
    out = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in out] == [
        "example    1: 26 tokens, 5 of them scored: ⟦so⟧",
        *("<|im_start|>user", "q1<|im_end|>", "<|im_start|>assistant", "⟦Jane 1<|im_end|>⟧", ""),
        "example    2: 26 tokens, 5 of them scored: ⟦so⟧",
        *("<|im_start|>user", "q2<|im_end|>", "<|im_start|>assistant", "⟦Jane 2<|im_end|>⟧", ""),
    ]
    show.main([*flags, "--config.new_tokens=('Jane',)"])
    assert capsys.readouterr().out.splitlines()[0] == "example    0: 25 tokens, 4 of them scored: ⟦so⟧"
    (tmp_path / "work").mkdir()
    earlier = read_config(str(tmp_path / "run.py"))
    earlier.data.tokenizer = folder
    write_json(str(tmp_path / "work" / "config.json"), dataclasses.asdict(earlier) | {"base_fingerprint": "x"})
    show.main(
        [
            *flags,
            "--config.init_from=",
            "--config.data.tokenizer=",
            f"--config.continue_from={tmp_path / 'work'}",
            "--count",
            "1",
        ]
    )
    assert capsys.readouterr().out.splitlines()[0] == "example    0: 26 tokens, 5 of them scored: ⟦so⟧"
    show.main([*flags, "--limit", "20"])
    assert "characters ..." in capsys.readouterr().out
    for wrong, fault in (
        (["--first", "9"], "--first 9 is past the last of 4 examples"),
        (["--part", "mixture[0]"], "--part mixture.0. is not of this config: give one of data, eval.data"),
        (["--config.data.nothing=3"], "nothing"),
    ):
        with pytest.raises(UserError, match=fault):
            show.main([*flags, *wrong])


def test_a_fault_of_the_evaluation_says_that_it_is_its_own(tmp_path):
    """Catches: "give more text" said to a user who has given a library to train on, and a line to evaluate on."""
    folder = template_folder(tmp_path, CHATML)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "long.txt").write_text("long " * 400)
    parts = [DataConfig("text", str(tmp_path / f"{name}.txt"), tokenizer=folder) for name in ("long", "short")]
    for given, named in (
        ({"data": parts[0], "eval": EvalConfig(1, data=parts[1])}, "eval.data: a window of 128 tokens is longer"),
        ({"data": parts[0], "mixture": (parts[1],)}, r"mixture\[0\]: a window of 128 tokens is longer"),
        ({"data": parts[1]}, "^a window of 128 tokens is longer"),
    ):
        whole = config(**given)
        with pytest.raises(UserError, match=named):
            run.read_windows(parts[1], whole)
    assert len(run.read_windows(parts[0], config(data=parts[0]))) > 1
