"""python -m benchmarks.gpu: what fits a card, who gets how much time, what is kept when a part fails; a rehearsal."""

import json
import sys

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import sizes
from benchmarks.gpu.part import Part
from longlora_jax.errors import UserError

GIB = 2**30


def planned(step, devices):
    """Weights and activations, about as the planner has them, without its seconds."""
    weights = {"smollm2": 1, "1b": 4, "7b": 16}[step.model]
    kept = {"block": 1, "attention": 3, "dots": 5, "none": 8}[step.remat]
    return GIB * (weights + weights * kept * step.seq_len / 50_000)


def test_a_card_gets_what_fits(monkeypatch):
    """Catches: a first step that needs 80 GB on a card of 16, a large card that measures the small model alone."""
    monkeypatch.setattr(sizes, "planned", planned)
    small, large = (sizes.steps_for(gib * GIB, []) for gib in (14, 75))
    assert {step.model for step in small} == {"smollm2", "1b"} and sizes.Step("smollm2", 16_384) in small
    assert {sizes.Step("7b", 32_768), sizes.Step("7b", 32_768, "full"), sizes.Step("7b", 100_000)} <= set(large)
    assert all(planned(step, []) <= gib * GIB for steps, gib in ((small, 14), (large, 75)) for step in steps)


def test_what_a_part_leaves_is_the_next_ones():
    """Catches: a whole that outlasts its minutes, time that nobody uses."""
    left, parts = 600.0, list(command.PARTS)
    for i, part in enumerate(parts):
        given = command.budget(part, parts[i + 1 :], left)
        assert 0 < given <= left
        left -= given
    assert left == pytest.approx(0)
    assert command.budget("peer", [], 100) == 100


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A part in this process, which writes rows.json."""

    def make(seconds: str) -> Part:
        monkeypatch.setattr(sys, "argv", ["part", "--json", str(tmp_path / "rows.json"), "--seconds", seconds])
        return Part("A part.")

    return make


def test_a_case_that_fails_does_not_end_the_others(part, tmp_path):
    """Catches: a step too large for the card that takes all rows with it, a row that is only in memory."""
    running = part("100")
    running.run({"case": "a"}, lambda: 1 / 0)
    running.run({"case": "b"}, lambda: {"ms": 1.5})
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows == [{"case": "a", "error": "ZeroDivisionError: division by zero"}, {"case": "b", "ms": 1.5}]
    late = part("0")
    assert "skipped" in late.run({"case": "c"}, lambda: pytest.fail("it ran"))


def test_the_summary_compares_with_the_fastest():
    """Catches: ours beside another pattern's time, or beside the slower of torch's backends; a failed case unsaid."""
    attention = [{"what": "full", "shape": "7b", "seq_len": 8192, "ms": 3.0}]
    attention += [{"what": "blockwise full", "shape": "7b", "seq_len": 8192, "ms": 90.0}]
    names = ("torch flash full", "torch cudnn full", "torch cudnn s2 G=T/4")
    theirs = [{"what": name, "shape": "7b", "seq_len": 8192, "ms": 5.0 - i} for i, name in enumerate(names)]
    step = {"model": "7b", "seq_len": 8192, "attention": "s2"}
    found = {
        "check": {"failed": ["b"], "rows": [{"case": "a", "pass": True}, {"case": "b", "pass": False}]},
        "attention": {"rows": attention},
        "torch_attention": {"rows": theirs},
        "steps": {"rows": [step | {"remat": "block", "packed": False, "tokens_per_second": 200.0, "mfu": 0.4}]},
        "peer": {"rows": [step | {"tokens_per_second": 90.0}, step | {"error": "out of memory"}]},
    }
    assert command.summary(found) == [
        "check      2 of 2 cases ran; failed: b",
        "attention  7b 8,192 full: 3.00 ms, torch 4.00",
        "attention  7b 8,192 blockwise full: 90.00 ms",
        "steps      7b 8,192 s2, remat block: 200 tokens/s, MFU 40%, transformers + PEFT 90",
    ]


def run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *args])
    command.main()


def test_what_is_missing_is_said_in_a_line(monkeypatch, tmp_path, capsys):
    """Catches: a traceback without a GPU, or without the libraries to compare with."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no GPU: run this on a machine with one, or rehearse with --tiny"):
        run(monkeypatch, "--out", str(tmp_path))
    with pytest.raises(UserError, match="--parts speed is not known: choose from check,"):
        run(monkeypatch, "--tiny", "--parts", "speed")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    run(monkeypatch, "--tiny", "--parts", "peer", "--out", str(tmp_path))
    assert "peer       skipped: torch, transformers, peft is not installed" in capsys.readouterr().out
    assert command.short_name("NVIDIA GeForce RTX 4090, 24564 MiB, 580.1") == "rtx-4090"


def rehearse(monkeypatch, tmp_path, parts: str) -> dict[str, dict]:
    """Runs parts in processes of their own, as on a GPU, and reads their files."""
    run(monkeypatch, "--tiny", "--minutes", "10", "--parts", parts, "--out", str(tmp_path))
    return {name: json.loads((tmp_path / f"tiny_{name}.json").read_text()) for name in parts.split(",")}


@pytest.mark.slow
def test_a_rehearsal_of_one_part(monkeypatch, tmp_path):
    """Catches: a part that does not start by itself, or whose file says neither what ran nor with which versions."""
    content = rehearse(monkeypatch, tmp_path, "torch_attention")["torch_attention"]
    assert len(content["rows"]) == 4 and all(row["ms"] > 0 for row in content["rows"])
    assert "torch" in content["versions"] and content["device"] == "cpu"


@pytest.mark.slow
def test_a_rehearsal(monkeypatch, tmp_path):
    """Catches: any part that a change of the product has broken; every case of every part runs."""
    found = rehearse(monkeypatch, tmp_path, ",".join(command.PARTS))
    wrong = [row for content in found.values() for row in content["rows"] if "error" in row or "skipped" in row]
    assert not wrong and not found["check"]["failed"]
    assert "perplexity 256" in found["smollm2"]["rows"][-1]
