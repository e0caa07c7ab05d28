"""Needle, topics and long questions: prompts, judging and files, with stand-ins for the model that know the answer."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from longlora_jax import errors
from longlora_jax.evals import longqa, needle, reader, topics
from longlora_jax.evals.answers import exact_match, f1, words
from longlora_jax.evals.reader import Reader
from longlora_jax.report import __main__ as report

MODEL = Path(__file__).parents[2] / "models" / "tiny-python-llama"
NATURAL = " ".join(f"Mr. Fox walked {day * 7 % 13} miles on day {day}." for day in range(600))
tokenizer = reader.load_tokenizer(str(MODEL))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command; says(text of a prompt) answers in the place of the model. Returns the JSON."""
    monkeypatch.setattr(reader, "load_for_generation", lambda model, dtype: (None, None))

    def command(module, says, *flags):
        def generate(model, params, prompts, *, stop, max_new_tokens, **_):
            texts = [says(tokenizer.decode(ids)) for ids in prompts]
            answers = [list(map(int, i)) for i in tokenizer.encode_batch(texts, add_bos=False)]
            assert all(len(answer) <= max_new_tokens for answer in answers)
            ends = [next((n for n in range(1, len(a) + 1) if stop(0, a[:n])), len(a)) for a in answers]
            return [a[:n] for a, n in zip(answers, ends, strict=True)]

        monkeypatch.setattr(reader, "generate", generate)
        module.main(["--model", str(MODEL), "--json", str(tmp_path / "out.json"), *flags])
        return json.loads((tmp_path / "out.json").read_text())

    return command


def fact_in(text):
    return re.search(r"keeps the (?:\w+ )+?((?:in|behind|under|above) .*?)\.", text)[1]


@pytest.fixture
def haystack(tmp_path):
    (tmp_path / "haystack.txt").write_text(NATURAL)
    return str(tmp_path / "haystack.txt")


# Needle


def test_needle_grid_and_scores(run, haystack, tmp_path, capsys):
    """Catches: a share of the answer's words instead of the fact's, a fact that is not in the prompt, a score that the
    report's page does not read."""
    flags = ("--haystack", haystack, "--lengths", "400", "--depths", "0,1", "--trials", "3", "--plot")
    flags += (str(tmp_path / "out.png"),)
    written = run(needle, lambda text: f" It lies {fact_in(text)}.\nQuestion: and so on", *flags)
    assert [(r["depth"], r["score"], r["correct"], r["trials"]) for r in written["results"]] == [
        (0, 1.0, 3, 3),
        (1, 1.0, 3, 3),
    ]
    assert "so on" not in written["results"][0]["answers"][0]["answer"]
    assert all(399 <= r["tokens"] <= 400 for r in written["results"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out.json").unlink()
    half = run(needle, lambda text: " ".join(words(fact_in(text))[:2]), *flags)
    assert all(0.2 < r["score"] < 0.6 and r["correct"] == 0 for r in half["results"])


def test_needle_scores_by_hand():
    """Catches: a word counted twice, case or articles that count."""
    place = "under the third step of the lighthouse"
    assert needle.judge("It is UNDER a third step, of the lighthouse!", place) == 1
    assert needle.judge("under under the step", place) == 2 / 5
    assert needle.judge("", place) == 0
    assert needle.judge("\nunder\nthird step of lighthouse", place) == 1 / 5


def test_needle_lies_between_sentences_at_its_depth():
    """Catches: a fact within a sentence, at the wrong end, or glued to its neighbours."""
    asked = Reader(str(MODEL))
    for depth in (0.0, 0.5, 1.0):
        text = asked.tokenizer.decode(needle.prompt(asked, NATURAL, 600, depth, "Ada keeps it.", "Where?"))
        before, after = text.split("Ada keeps it.")
        filling = [part.replace(needle.TASK, "").strip() for part in (before, after.removesuffix("Where?\nAnswer:"))]
        assert text.endswith("\nWhere?\nAnswer:") and before[-1] in " \n" and after[0] in " \n"
        # (a title like Mr. ends a sentence for this program)
        assert not filling[0] or filling[0][-1] == "."
        share = len(filling[0].removeprefix("<s>")) / sum(map(len, filling))
        assert abs(share - depth) < 0.03


# Topics


def test_topics_are_asked_for_in_order(run):
    """Catches: the last topic taken for the first, a first topic that comes twice, a prompt above its length."""
    find = r"Let us talk about (the \w+ of [\w ]+)\."
    written = run(topics, lambda t: f" {re.findall(find, t)[0]}. Then", "--lengths", "900,2500", "--trials", "4")
    assert [(r["length"], r["correct"], r["trials"]) for r in written["results"]] == [(900, 4, 4), (2500, 4, 4)]
    assert all(r["length"] - 120 < r["tokens"] <= r["length"] and "depth" not in r for r in written["results"])
    assert len({a["expected"] for r in written["results"] for a in r["answers"]}) > 4


def test_the_last_topic_is_wrong(run):
    """Catches: any topic of the record judged right."""
    find = r"Let us talk about (the \w+ of [\w ]+)\."
    written = run(topics, lambda text: f" {re.findall(find, text)[-1]}.", "--lengths", "2500", "--trials", "4")
    assert written["results"][0]["correct"] == 0


def test_a_conversation_never_repeats_a_topic():
    """Catches: a subject with the same aspect again when all subjects had their turn."""
    said, names = topics.conversation(topics.TURNS * 200, np.random.default_rng(0))
    assert len(set(names)) == len(names) == 200 and len({n.split(" of ")[1] for n in names[:32]}) == 32
    assert sum("Let us talk about" in turn for turn in said) == 200
    assert topics.judge("It was the history of pottery, I think.", "the history of pottery") == 1
    assert topics.judge("The history of potteries", "the history of pottery") == 0


class Absent:
    """The package lm_eval is not installed."""

    @staticmethod
    def find_spec(name, *_):
        if name == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_lm_eval_that_is_not_there_is_one_line(monkeypatch, capsys):
    """Catches: a traceback, a package that is missing called incomplete."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "longlora_jax.evals.lm_eval", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("longlora_jax.evals.lm_eval", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the package lm_eval is not installed: pip install lm_eval\n"


# Long questions


def test_answers_are_compared_as_squad_does():
    """Catches: articles inside words removed, punctuation that parts words, F1 over sets instead of counts."""
    assert words("The  Cat's an ANT, a theme-park!") == ["cats", "ant", "themepark"]
    assert exact_match(" the Answer. ", ["An answer"]) and not exact_match("answer b", ["answer"])
    assert exact_match("b", ["a b c", "B!"])
    assert f1("the cat sat on the mat", ["a cat sat"]) == pytest.approx(2 * 2 / (4 + 2))
    assert f1("to be or not to be", ["to be to"]) == pytest.approx(2 * 3 / (6 + 3))
    assert f1("dog", ["cat", "big dog"]) == pytest.approx(2 / 3)
    assert f1("", [""]) == f1("the", ["a"]) == 1.0 and f1("", ["x"]) == f1("x", [""]) == 0.0


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"context": "The cat sat. " * 20, "question": "Who sat?", "answer": "the cat"},
        {"context": "A dog ran. " * 30, "instruction": "Who ran?", "output": ["a cow", "The Dog"]},
        {"context": "word " * 3000, "question": "Too long?", "answer": "yes"},
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "qa.jsonl")


def says(text):
    return " The cat!\nmore" if "Who sat" in text else " dog and pony"


def test_longqa_counts_and_leaves_out(run, questions, tmp_path, capsys):
    """Catches: a row that does not fit judged as wrong or cut; fields of the one name alone; a mean over the wrong
    rows; rows that are asked again."""
    written = run(longqa, says, "--data", questions, "--max_new_tokens", "8", "--limit", "1")
    assert written["summary"]["questions"] == 1 and written["skipped"] == 1
    asked = []
    written = run(
        longqa, lambda t: asked.append(t) or says(t), "--data", questions, "--max_new_tokens", "8", "--plot",
        str(tmp_path / "out.png"),
    )  # fmt: skip
    assert (
        len(asked) == 1 and asked[0].removeprefix("<s>").strip().startswith("A dog") and asked[0].endswith("?\nAnswer:")
    )
    one, two = written["results"]
    assert (one["exact_match"], one["f1"], one["answer"]) == (True, 1.0, "The cat!")
    assert (two["exact_match"], two["f1"], two["row"]) == (False, 0.5, 1)
    assert written["summary"]["exact_match"] == 0.5 and written["summary"]["f1"] == 0.75
    assert sum(part["questions"] for part in written["by_length"]) == 2
    assert all(r["tokens"] <= part["tokens_up_to"] for r, part in zip((one, two), written["by_length"], strict=False))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "1 rows left out" in capsys.readouterr().out


def test_longqa_asks_what_has_changed(run, questions, caplog, capsys):
    """Catches: answers to a question that the file does not hold any more; questions asked again because one was added;
    a summary of more rows than were asked for."""
    asked, flags = [], ("--data", questions, "--max_new_tokens", "8")
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()][:2]
    rows.append({"context": "A hen ran.", "question": "Who hid?", "answer": "nobody"})

    def ask(*more):
        Path(questions).write_text("\n".join(map(json.dumps, rows)))
        asked.clear()
        return run(longqa, lambda text: asked.append(text) or says(text), *flags, *more)

    assert ask()["summary"]["questions"] == len(asked) == 3
    rows.append({"context": "A cow ran.", "question": "Who flew?", "answer": "nobody"})
    assert ask()["summary"]["questions"] == 4 and len(asked) == 1
    one = ask("--limit", "1")
    assert one["summary"]["questions"] == 1 and one["summary"]["exact_match"] == 1 and not asked
    assert sum(part["questions"] for part in one["by_length"]) == 1 and len(one["results"]) == 4
    assert " 1 " in capsys.readouterr().out.splitlines()[-2]
    rows[0]["context"] = rows[0]["context"].replace("cat", "cow")
    rows[2]["answer"] = "the hen"
    del rows[3]
    written = ask()
    assert len(asked) == 2 and len(written["results"]) == 3 and written["results"][2]["expected"] == ["the hen"]
    assert f"3 of 4 results are left out: {questions} has other questions there now" in caplog.text


@pytest.mark.parametrize(
    ("rows", "flags", "says"),
    [
        ('{"context": "a", "question": "b"}', [], "qa.jsonl, line 1 has no answer or output, it has context, question"),
        ('{"context": "a", "question": "b", "answer": 3}', [], "line 1: context, question and answer must be texts"),
        ("", [], "has no rows"),
        ("{", [], "line 1: not JSON"),
        (None, [], "none.jsonl"),
        ('{"context": "a b", "question": "b", "answer": "c"}', ["--max_tokens", "65"], "none of the 1 rows"),
    ],
    ids=["no answer", "a number", "empty", "no JSON", "no file", "too long"],
)
def test_longqa_faults_are_one_line(tmp_path, monkeypatch, capsys, rows, flags, says):
    """Catches: a traceback, weights that are read before the fault is told."""
    monkeypatch.setattr(reader, "load_for_generation", None)
    path = tmp_path / ("none.jsonl" if rows is None else "qa.jsonl")
    if rows is not None:
        path.write_text(rows)
    with pytest.raises(SystemExit) as exit:
        errors.run(lambda: longqa.main(["--model", str(MODEL), "--data", str(path), *flags]))
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and says in lines[0] and not printed.out


# The page


def test_the_report_shows_the_grids(run, haystack, tmp_path):
    """Catches: fields of other names than longlora_jax.report reads."""
    run(needle, lambda text: fact_in(text), "--haystack", haystack, "--lengths", "400", "--depths", "0.5")
    found, _ = report.read_evaluations({"needle": [str(tmp_path / "out.json")]}, [])
    assert [(e.kind, e.results[0]["score"]) for e in found] == [("needle", 1.0)]
    assert "0.5" in str(report.grids("needle", found, [])) or "50%" in str(report.grids("needle", found, []))
