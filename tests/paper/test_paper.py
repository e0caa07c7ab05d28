"""The command behind docs/paper.md: what it would run, how it goes on, and that its tables are those of its numbers."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from longlora_jax.config import validate
from longlora_jax.config_file import read_run_config
from longlora_jax.errors import UserError
from longlora_jax.paper import __main__ as command
from longlora_jax.paper import results, runs, tables

ALL = [row.run(100) for table in tables.TABLES for row in table.rows]


@pytest.fixture
def trained(monkeypatch):
    """train.py and the scoring replaced: what was asked for, in order; perplexity grows with it."""
    asked = []

    def train(folder, run, seed, *, data):
        asked.append((run.name, seed))
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 1, "perf/step_seconds": 3.6, "train/loss": 4.5}\n')

    def score(folder, run, *, twice):
        value = 10.0 + len(asked)
        pattern = {"pattern": "s2", "pattern_perplexity": value / 2} if twice else {}
        return {"nll": 2.0, "perplexity": value, "stderr": 0.1, "tokens": 9, "pattern_perplexity": None} | pattern

    monkeypatch.setattr(runs, "prepare", lambda workdir: None)
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "score", score)
    return asked


def call(capsys, *flags):
    command.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def test_every_row_is_a_config_of_its_own(script, monkeypatch):
    """Catches: a row whose fields config.py does not have or refuses, two different rows in one folder, one table whose
    rows are the same run twice."""
    from ml_collections import config_flags  # as train.py reads it

    for table in tables.TABLES:
        of_table = [row.run(100) for row in table.rows]
        assert len(set(of_table)) == len(of_table), table.name
    assert len({run.name for run in ALL}) == len(set(ALL))
    for run in set(ALL):
        argv = ["x", f"--config={runs.CONFIG}", *run.flags()]
        monkeypatch.setattr(sys, "argv", argv)  # config_flags looks there for overrides
        values = script.flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(argv)
        config = values.config
        validate(config)
        assert config.seq_len == runs.SEQ_LEN and config.init_from == runs.BASE and config.dtype == runs.DTYPE
        for field, value in run.changes:
            found = config
            for name in field.split("."):
                found = getattr(found, name)
            assert str(found) == value


def test_rows_run_once_and_a_second_call_only_prints(trained, tmp_path, capsys):
    """Catches: rows that two tables share trained twice, the second seed before the first of every row, a second call
    that trains again, more seeds that are not added to those there."""
    flags = ["--rows", "parts/full,parts/lora,groups/1_4,steps/0", "--steps", 100, "--workdir", tmp_path]
    first = call(capsys, *flags)
    assert trained == [("mode-lora_100steps", 0), ("mode-full_100steps", 0)]
    assert "LoRA             |                      11.00 |     1 |   100 |     11.44" in first
    call(capsys, *flags)
    assert len(trained) == 2
    more = call(capsys, *flags, "--seeds", 3)
    assert trained[2:] == [(name, seed) for seed in (1, 2) for name in ("mode-lora_100steps", "mode-full_100steps")]
    # 11, 13 and 15: the standard error of their mean is 2 / sqrt(3)
    assert f"13.00 ± {2 / math.sqrt(3):.2f} |     3 |" in more
    assert (tmp_path / "paper.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "paper.json").read_text())
    assert [r["seed"] for r in content["runs"]["mode-lora_100steps"]] == [0, 1, 2]
    assert results.format_tables(content, tables.chosen(["parts/full", "parts/lora"])) in more


def test_what_is_finished_can_be_shown_while_the_rest_runs(trained, tmp_path, capsys):
    """Catches: --show that trains; a table of the training's pattern that shows full attention's numbers."""
    with pytest.raises(UserError, match="no finished row of 100 steps"):
        call(capsys, "--show", "--steps", 100, "--workdir", tmp_path)
    call(capsys, "--rows", "gap/s2", "--steps", 100, "--workdir", tmp_path)
    shown = call(capsys, "--show", "--steps", 100, "--workdir", tmp_path)
    assert len(trained) == 1
    assert re.search(r"\| s2 +\| +11.00 \| +5.50 \| +1 \|", shown)
    assert "## What is trained" in shown and "| full fine-tuning" in shown  # its row of LongLoRA is this run


def test_list_says_the_hours(trained, tmp_path, capsys):
    """Catches: hours of rows that are finished or shared counted again; seconds a step of another run."""
    call(capsys, "--rows", "parts/lora", "--steps", 1000, "--workdir", tmp_path)
    result = next((tmp_path / "results").glob("*.json"))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": 3636.0, "step_seconds": 3.6}))
    shown = call(capsys, "--list", "--rows", "parts,groups/1_4", "--steps", 1000, "--workdir", tmp_path)
    assert re.search(r"parts/lora +1000 +1 of 1 +0.00\n", shown)
    assert re.search(r"parts/longlora +1000 +0 of 1 +1.01\n", shown)  # 1,000 steps of 3.6 s, and 36 s beside them
    assert re.search(r"groups/1_4 +1000 +0 of 1 +1.01 \(shared with a row above\)\n", shown)
    assert "4.0 hours in all" in shown and len(trained) == 1


@pytest.mark.parametrize("flags", [["--list"], ["--show"], []], ids=["list", "show", "go on"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda result: result.pop("pattern_perplexity"), "has no pattern_perplexity (it is damaged"),
        (lambda result: result.update(seconds="3", seed=None), "has no seed and no seconds (it is damaged"),
        (lambda result: result.clear(), "has no seed and no steps and no changes and no perplexity"),
    ],
    ids=["older", "other types", "empty"],
)
def test_a_result_that_lacks_something_is_one_line(trained, tmp_path, capsys, flags, change, said):
    """Catches: a KeyError of a file that is damaged or of an earlier version, which does not say which file it is."""
    row = ["--rows", "parts/lora", "--steps", 100, "--workdir", tmp_path]
    call(capsys, *row)
    path = next((tmp_path / "results").glob("*.json"))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(f"{path} {said}")):
        call(capsys, *row, *flags)
    assert len(trained) == 1


def test_changes_of_all_rows_make_runs_of_their_own(trained, tmp_path, capsys):
    """Catches: rows of larger batches that are found in the folders of smaller ones, a base without training that is
    scored for each; a table that looks for the numbers of other rows."""
    flags = ["--rows", "parts/lora,steps/0", "--steps", 100, "--workdir", tmp_path]
    call(capsys, *flags)
    shown = call(capsys, *flags, "--batch_size", 8, "--dtype", "bfloat16")
    assert trained == [("mode-lora_100steps", 0), ("batch_size-8_dtype-bfloat16_mode-lora_100steps", 0)]
    assert re.search(r"\| LoRA +\| +12.00 \| +1 \|", shown)
    content = json.loads((tmp_path / "paper.json").read_text())
    assert content["common"] == {"batch_size": 8, "dtype": "bfloat16"} and "longlora_untrained" in content["runs"]


def test_a_name_that_is_none_is_one_line():
    """Catches: a typing error after which all rows are trained."""
    with pytest.raises(UserError, match="--rows parts/lara is no table and no row"):
        command.main(["--rows", "parts/lora,parts/lara", "--list"])


def test_the_page_holds_the_numbers_of_the_json():
    """Catches: a table of docs/paper.md that was edited by hand, or numbers that were renewed in one of the two."""
    content = json.loads(Path(command.MEASURED).read_text())
    page = Path("docs/paper.md").read_text()
    shown = 0
    for table, rows in tables.chosen([]):
        if any(row.share and results.results_of(content, row) for row in rows):
            assert results.format_table(table, rows, content) in page, table.name
            shown += 1
    assert shown


@pytest.mark.slow
def test_two_steps_of_a_row(environment, monkeypatch, tmp_path, capsys):
    """Catches: flags that train.py does not take, a run that scoring cannot open, scores under another pattern."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = call(capsys, "--rows", "gap/s2,steps/0", "--steps", 2, "--workdir", tmp_path)
    content = json.loads((tmp_path / "paper.json").read_text())
    (trained,), (untrained,) = content["runs"]["longlora_2steps"], content["runs"]["longlora_untrained"]
    # Two steps change little, and the patterns differ less than twofold; a lost rope or adapter would not.
    assert trained["perplexity"] == pytest.approx(untrained["perplexity"], rel=0.1)
    assert trained["pattern_perplexity"] != trained["perplexity"]
    assert len(trained["first_losses"]) == 2 and all(loss > 1 for loss in trained["first_losses"])
    assert trained["pattern"] == "s2(G=252)" and trained["tokens"] == 24 * (runs.SEQ_LEN - 1)
    config = read_run_config(str(tmp_path / "runs" / "longlora_2steps_seed0"))
    assert (config.rope.type, config.model.rope_scaling.factor) == ("linear", 4.0)
    assert "s2" in shown
