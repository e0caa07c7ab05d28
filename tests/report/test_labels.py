"""Results of evaluations on the page: all of them are there, and each says what it is of."""

import json

import pytest
from report_pages import config, line, make_run, read, result

from longlora_jax.evals import longqa
from longlora_jax.report.labels import labels
from longlora_jax.report.runs import Run

TINY = "models/tiny-python-llama"
HEAD = {"model": "m", "weights": "ab", "config": "c", "data": ["/a/x.txt"], "data_digests": ["1"], "attention": "full"}
HEAD |= {"dtype": "float32", "rope_override": None, "quantize": None, "offset": 0, "last": None, "group_ratio": None}


def texts(*changes):
    return [text for text, _ in labels([HEAD | change for change in changes], [])]


def yarn(factor):
    return {"rope_override": {"rope_type": "yarn", "rope_factor": factor}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, {"quantize": "nf4"}], ["m", "m, in nf4"]),
        ([yarn(2.0), yarn(8.0)], ["m, untrained yarn rope ×2", "m, untrained yarn rope ×8"]),
        ([yarn(None)], ["m, untrained yarn rope"]),
        ([{}, {"dtype": "bfloat16"}], ["m, dtype float32", "m, dtype bfloat16"]),
        ([{}, {"last": 64}, {"quantize": "nf4"}], ["m, last none", "m, last 64", "m, in nf4"]),
        ([{"model": "/r/checkpoints/1"}, {"model": "/s/checkpoints/1"}], ["r, step 1", "s, step 1"]),
        ([{"model": "/a/m"}, {"model": "/b/m"}], ["m", "m"]),  # a copy of the same weights
        ([{"model": "/a/m"}, {"model": "/b/m", "weights": "cd"}], ["m, model /a/m", "m, model /b/m"]),
        ([{"weights": "step 1, ab"}, {"weights": "step 2, cd"}], ["m, weights step 1, ab", "m, weights step 2, cd"]),
        ([{"model": "/a/m/"}, {"model": "/a/m"}, {"weights": None, "config": None, "model": "/a/m"}], ["m"] * 3),
        ([{"config": "d"}, {}], ["m, config d", "m, config c"]),
        ([{"data": ["/b/x.txt"]}, {}], ["m", "m"]),
        ([{"data_digests": ["2"]}, {}], ['m, data digests ["2"]', 'm, data digests ["1"]']),
    ],
    ids=str,
)
def test_results_are_called_by_what_tells_them_apart(changes, expected):
    """Catches: one name for results of two quantizations, factors, dtypes, steps or weights; two for one thing."""
    assert texts(*changes) == expected


def test_steps_of_the_runs_on_the_page(tmp_path):
    """Catches: the first step of two runs, both called 1; a step that passes for the end of its run."""
    run = Run("A", "mine", str(tmp_path / "mine"), {}, [], "")
    heads = [{"model": f"{run.path}{end}"} for end in ("", "/", "/checkpoints/1")]
    assert labels(heads, [run]) == [("mine, trained", run), ("mine, trained", run), ("mine, step 1", run)]


def test_no_result_takes_the_place_of_another(tmp_path):
    """Catches: of two files of a length the first lost; a file that is there twice shown twice."""
    run = make_run(tmp_path / "run", [line(1)], config())
    files = {
        "a": {"model": "m", "results": [result(64, 8.5)]},
        "b": {"model": "m", "results": [result(64, 8.5), result(32, 7.25)]},
        "c": {"model": "m", "results": [result(64, 9.5)]},
        "d": {"model": "m", "results": [result(64, 6.5), result(64, 5.5), result(64, 4.5)]},
        "e": {"model": "m", "quantize": "nf4", "results": [result(64, 10.5)]},
    }
    for name, content in files.items():
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(content))
    page = read(tmp_path, run)
    shown = {
        row[0][1:]: [cell.split(" ±")[0] for cell in row[1:3]] for row in page.rows if row and row[0][:1].isdigit()
    }
    path = f"{run}/d.json"
    assert shown == {
        "m": ["7.25", "8.50"],
        "m, c.json": ["–", "9.50"],
        "m, d.json": ["–", "6.50"],
        f"m, {path}": ["–", "5.50"],
        f"m, {path} (2)": ["–", "4.50"],
        "m, in nf4": ["–", "10.50"],
    }


def test_grids_say_their_settings(tmp_path):
    """Catches: two grids of a run, one of them in four bits, under one title."""
    run = make_run(tmp_path / "run", [line(1)], config())
    cell = {"length": 64, "depth": 0.5, "trials": 2, "correct": 1}
    for name, more in {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 0, "quantize": "nf4"}}.items():
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps({"model": run, **more, "results": [cell]}))
    titles = {text for tag, text in read(tmp_path, run).texts if tag == "h3" and "trained" in text}
    assert titles == {"run, trained, seed 0", "run, trained, seed 1", "run, trained, in nf4"}


def test_what_longqa_writes(tmp_path):
    """Catches: every file of evals.longqa refused, as it writes an exact match as true or false."""
    run = make_run(tmp_path / "run", [line(1)], config())
    rows = [{"context": "import os", "question": "what?", "answer": answer} for answer in ("a", "b")]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run" / "qa.json"
    flags = ["--max_new_tokens", "2", "--template", "plain", "--json", str(out)]
    longqa.main(["--model", TINY, "--data", str(tmp_path / "qa.jsonl"), *flags])
    exact = [row["exact_match"] for row in json.loads(out.read_text())["results"]]
    assert [type(x) for x in exact] == [bool, bool]
    for page in (read(tmp_path, run), read(tmp_path, run, "--longqa", str(out))):
        assert "qa.jsonl" in page.text and page.row("exact match")[-1] == f"{sum(exact) / 2:.2f}"
