"""The file of results: kept, gone on with, written over where nothing is in it."""

import json

import pytest

from longlora_jax.errors import UserError
from longlora_jax.evals import perplexity
from longlora_jax.evals.results import Results
from longlora_jax.generate import __main__ as generate

TINY = "models/tiny-python-llama"


@pytest.mark.parametrize("content", ["", "\n", " \t\r\n\n"])
def test_a_file_with_nothing_in_it_is_written_over(tmp_path, content):
    """Catches: a --json that `touch` or `mktemp` made refused as "not JSON"."""
    path = tmp_path / "a.json"
    path.write_text(content)
    results = Results(str(path), {"model": "m"}, ["length"])
    results.add({"length": 3, "correct": 1})
    assert json.loads(path.read_text()) == {"model": "m", "results": [{"length": 3, "correct": 1}]}
    assert Results(str(path), {"model": "m"}, ["length"]).rows == [{"length": 3, "correct": 1}]


@pytest.mark.parametrize("content", ["x", "[]", "\0" * 9, "{}", " " * 5000])
def test_a_file_with_something_else_in_it_is_kept(tmp_path, content):
    """Catches: another file overwritten by mistake."""
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError):
        Results(str(path), {"model": "m"}, ["length"])
    assert path.read_text() == content


@pytest.mark.parametrize(
    "command",
    [
        (perplexity, "--data", "README.md", "--seq_len", "64", "--max_windows", "1"),
        (generate, "--prompt", "import", "--max_new_tokens", "2"),
    ],
)
def test_commands_write_over_an_empty_file(tmp_path, command):
    """Catches: a command that has its own way with the file."""
    path = tmp_path / "a.json"
    path.touch()
    module, *flags = command
    module.main(["--model", TINY, *flags, "--json", str(path)])
    assert json.loads(path.read_text())["model"] == TINY
