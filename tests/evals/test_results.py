"""The file of results: kept, gone on with, written over where nothing is in it."""

import json
import logging
import shutil

import numpy as np
import pytest
from tiny import tiny_config

from longlora_jax.data import load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.evals import perplexity
from longlora_jax.evals.results import Results, identity, weights_of
from longlora_jax.generate import __main__ as generate
from longlora_jax.weights.load import OpenModel, open_model
from longlora_jax.weights.workdir import fingerprint

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


# What results depend on


def changed(name, **values):
    def change(folder):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return change


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (changed("config.json", rms_norm_eps=0.1), {"config"}),
        (changed("config.json", rope_scaling={"rope_type": "linear", "factor": 2.0}), {"config"}),
        (changed("config.json", transformers_version="9.9", name_or_path="elsewhere"), set()),
        (changed("generation_config.json", eos_token_id=[7, 9]), {"chat_format"}),
        (changed("tokenizer_config.json", chat_template="{{ messages[0]['content'] }}"), {"chat_format"}),
        (changed("tokenizer.json", normalizer={"type": "Lowercase"}), {"tokenizer"}),
        (lambda folder: (folder / "README.md").write_text("a"), set()),
        (lambda folder: (folder / "training_args.json").write_text("{}"), set()),
    ],
)
def test_a_folder_is_known_by_all_that_results_depend_on(tmp_path, change, fields):
    """Catches: old numbers for a model whose scaling, tokenizer, prompts or ends were changed since; hours spent again
    because a file beside the model is new."""
    folder = shutil.copytree(TINY, tmp_path / "model")

    def look():
        return identity(open_model(str(folder)), load_tokenizer(str(folder)))

    before = look()
    change(folder)
    assert {name for name, value in look().items() if value != before[name]} == fields


def test_adapters_merged_into_a_large_file_are_not_missed(tmp_path):
    """Catches: an export written over another one, which differs between what the digest of a run's base reads."""
    opened, path = OpenModel(tiny_config(), {}, str(tmp_path)), tmp_path / "model.safetensors"
    content = np.zeros(12 << 20, np.uint8)
    path.write_bytes(content.tobytes())
    before, base = weights_of(opened), fingerprint(str(tmp_path))
    content[2 << 20 : 3 << 20] = 1
    path.write_bytes(content.tobytes())
    assert weights_of(opened) != before and fingerprint(str(tmp_path)) == base


def test_other_words_of_the_same_length_are_another_text(tmp_path, monkeypatch, caplog):
    """Catches: the perplexity of an earlier text of as many tokens, given out as that of the one in its file now."""
    caplog.set_level(logging.WARNING)
    scored, out, text = [], tmp_path / "out.json", tmp_path / "text.txt"
    monkeypatch.setattr(perplexity, "on_device", lambda opened, dtype: opened)

    def evaluate(model, documents, seq_len, args):
        scored.append(seq_len)
        found = dict.fromkeys(("windows", "tokens", "perplexity", "nll"), 1)
        return {"seq_len": seq_len, "stride": None, "stderr": None, **found}

    monkeypatch.setattr(perplexity, "_evaluate", evaluate)
    for said in ("import os " * 40, "import os " * 40, "import re " * 40):
        text.write_text(said)
        perplexity.main(["--model", TINY, "--data", str(text), "--seq_len", "16", "--json", str(out)])
    assert len(scored) == 2 and "holds results with data_digests" in caplog.text
    assert len(load_tokenizer(TINY).encode("import os " * 40)) == len(load_tokenizer(TINY).encode("import re " * 40))


def test_a_file_of_an_earlier_version_is_computed_anew(tmp_path, caplog):
    """Catches: results of which nobody knows what they are of; a field that is None where it does not apply, held
    against them."""
    path = tmp_path / "a.json"
    path.write_text('{"model": "m", "results": [{"length": 3}]}')
    assert Results(str(path), {"model": "m", "quantize": None}, ["length"]).rows == [{"length": 3}]
    assert not Results(str(path), {"model": "m", "config": "12"}, ["length"]).rows
    assert [r.getMessage() for r in caplog.records] == [
        f"{path} does not say its config, as in earlier versions: it is written anew"
    ]


def test_another_spelling_of_a_place_is_the_same_place(tmp_path):
    """Catches: hours spent again for a slash at the end of --model, or for a text that was moved; a place that nothing
    else tells from others left out as well."""
    path = str(tmp_path / "a.json")
    head = {"model": "runs/m", "weights": "1", "data": ["a.txt"], "data_digests": ["2"]}
    stack = {"haystack": "h.txt", "haystack_digest": "3"}
    Results(path, head | stack, ["row"]).add({"row": 0})
    moved = {"model": "./runs/m/", "data": ["/b/a.txt"]}
    assert Results(path, head | moved | stack | {"haystack": "x.txt"}, ["row"]).rows
    for other in ({"weights": "9"}, {"data_digests": ["9"]}, {"haystack_digest": "9"}):
        assert not Results(path, head | stack | other, ["row"]).rows
    assert not Results(path, head | {"haystack": None}, ["row"]).rows  # of another text, not of the task's own filling
    Results(path, {"model": "m", "weights": "1", "data": "a.jsonl"}, ["row"]).add({"row": 0})
    elsewhere = {"model": "m/", "weights": "1", "data": "b.jsonl"}
    assert Results(path, elsewhere, ["row"], by_row=["data"]).rows and not Results(path, elsewhere, ["row"]).rows
