"""The adapter for lm-eval: its numbers against transformers, on requests and on a task of our own."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from longlora_jax import errors  # noqa: E402
from longlora_jax.evals import lm_eval as adapter  # noqa: E402

MODEL = str(Path(__file__).parents[2] / "models" / "tiny-python-llama")
PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("import", " os"),
    ("class Tree:\n    def __init__(self", "):"),
    ("", "import sys"),
    ("for i in range(10): ", "print(i)"),  # the blank belongs to what follows
]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return adapter.LongLoraLM(MODEL, batch_size=2)


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def asked(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def log_probs(reference, ids):
    """[tokens - 1, V] of what follows each token but the last."""
    with torch.no_grad():
        return torch.log_softmax(reference(torch.tensor([ids])).logits[0, :-1].double(), -1).numpy()


def test_loglikelihoods_are_those_of_transformers(model, reference):
    """Catches: a target off by one, filling that is scored, answers in the order of batches, a wrong likeliest."""
    found = model.loglikelihood([asked("loglikelihood", *pair) for pair in PAIRS])
    for (context, target), (value, likeliest) in zip(PAIRS, found, strict=True):
        ids = (
            model.tok_encode(context + target) if context else [model.prefix_token_id, *model.tok_encode(target, False)]
        )
        start = len(model.tok_encode(context.rstrip(" "))) if context else 1
        known = log_probs(reference, ids)[start - 1 :]
        np.testing.assert_allclose(value, sum(row[i] for row, i in zip(known, ids[start:], strict=True)), atol=2e-4)
        assert likeliest == all(row.argmax() == i for row, i in zip(known, ids[start:], strict=True))
    best = int(log_probs(reference, [*model.tok_encode("import"), 0])[-1].argmax())
    ((_, likeliest),) = model._loglikelihood_tokens([(None, model.tok_encode("import"), [best])])
    assert likeliest


def test_rolling_counts_every_token_once(reference):
    """Catches: tokens at the joints of windows counted twice or left out; texts that get each other's windows."""
    model = adapter.LongLoraLM(MODEL, batch_size=4, max_length=16)
    texts = ["import os\nimport sys\n\n\ndef main():\n    print(os.getcwd(), sys.argv, 1 + 2 + 3)\n", "x = 1"]
    found = model.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts])
    for text, value in zip(texts, found, strict=True):
        ids = model.tok_encode(text)
        known, start = 0.0, 0
        while start < len(ids):
            stop = min(start + 16, len(ids))
            # A later window sees the token before its first; at the end it reaches back to be full.
            first = max(stop - 17, -1) if start else -1
            seen = [model.prefix_token_id, *ids[:stop]] if first < 0 else ids[first:stop]
            rows = log_probs(reference, seen)[-(stop - start) :]
            known += sum(row[i] for row, i in zip(rows, ids[start:stop], strict=True))
            start = stop
        np.testing.assert_allclose(value, known, atol=5e-4)


def test_generation_stops_before_the_stop_text(model, reference):
    """Catches: the stop text left in the answer, two tasks' limits mixed, answers out of order."""
    texts = ["import os\nimport", "def f(x):\n    return"]
    settings = [{"until": ["\n"], "max_gen_toks": 12}, {"until": ["zzz"], "max_gen_toks": 5}]
    requests = [asked("generate_until", text, how) for text in texts for how in settings]
    found = model.generate_until(requests)
    for answer, (text, how) in zip(found, [r.args for r in requests], strict=True):
        ids = torch.tensor([model.tok_encode(text)])
        written = reference.generate(ids, max_new_tokens=how["max_gen_toks"], do_sample=False)[0, ids.shape[1] :]
        expected = model._tokenizer.decode(written.tolist(), skip_special_tokens=True)
        assert answer == expected.split(how["until"][0])[0]
    assert len(set(found)) > 1


def test_a_task_of_our_own_from_the_command_line(tmp_path, reference, capsys):
    """Catches: an adapter that lm-eval cannot drive; a JSON without results; a name that is not registered."""
    rows = [
        {"q": "import", "choices": [" os", " qqqq zz"], "label": 0},
        {"q": "x =", "choices": [")))", " 1"], "label": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "our_own_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "our_own_task.yaml").write_text(json.dumps(task))  # JSON is YAML
    out = tmp_path / "out.json"
    flags = ["--tasks", "our_own_task", "--include_path", str(tmp_path), "--json", str(out)]
    adapter.main(["--model", MODEL, *flags])
    written = json.loads(out.read_text())
    model = adapter.LongLoraLM(MODEL)
    right = []
    for row in rows:
        values = []
        for choice in row["choices"]:
            ids, start = model.tok_encode(row["q"] + choice), len(model.tok_encode(row["q"]))
            known = log_probs(reference, ids)[start - 1 :]
            values.append(sum(p[i] for p, i in zip(known, ids[start:], strict=True)))
        right.append(np.argmax(values) == row["label"])
    assert written["results"]["our_own_task"]["acc,none"] == np.mean(right)
    assert "our_own_task" in capsys.readouterr().out
    assert get_model("longlora_jax") is adapter.LongLoraLM


def test_an_answer_that_is_begun_is_gone_on_with(model, monkeypatch):
    """Catches: an end of turn after the beginning of an answer, as RULER's tasks give it: nothing is left to say."""

    def render(messages, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}<end>" for m in messages) + "<assistant>" * add_generation_prompt

    monkeypatch.setattr(model, "_format", SimpleNamespace(render=render))
    asked = {"role": "user", "content": "The number is?"}
    assert model.apply_chat_template([asked]) == "<user>The number is?<end><assistant>"
    begun = model.apply_chat_template([asked, {"role": "assistant", "content": "It is "}], add_generation_prompt=False)
    assert begun == "<user>The number is?<end><assistant>It is"


def test_data_of_the_hub_are_read_from_a_folder(tmp_path, capsys):
    """Catches: --data that is not looked at, or that moves --json; metadata that do not reach a task; data that are
    missing and end in a traceback."""
    data = tmp_path / "hub" / "owner" / "questions"
    data.mkdir(parents=True)
    (data / "rows.jsonl").write_text(json.dumps({"q": "import", "choices": [" os", " qqqq zz"], "label": 0}) + "\n")
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: some\n  data_files:\n  - split: test\n    path: rows.jsonl\n---\n"
    )
    task = {"task": "hub_task", "dataset_path": "owner/questions", "dataset_name": "some", "test_split": "test"}
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}"}
    (tmp_path / "hub_task.yaml").write_text(json.dumps(task | {"doc_to_target": "label"}))
    out = tmp_path / "out.json"
    command = ["--model", MODEL, "--tasks", "hub_task", "--include_path", str(tmp_path), "--json", str(out)]
    command += ["--metadata", '{"max_seq_lengths": [64]}']
    adapter.main([*command, "--data", str(tmp_path / "hub")])
    written = json.loads(out.read_text())
    assert written["results"]["hub_task"]["acc,none"] in (0, 1) and written["metadata"] == {"max_seq_lengths": [64]}
    (data / "rows.jsonl").unlink()
    for folder, says in ((str(tmp_path), "could not be had"), (str(tmp_path / "none"), "is no folder")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            errors.run(lambda folder=folder: adapter.main([*command, "--data", folder]))
        assert exit.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_faults_are_one_line(monkeypatch, capsys):
    """Catches: a traceback of lm-eval for a name that was misspelt; a folder without a model; weights read first."""
    monkeypatch.setattr(adapter, "load_for_generation", None)
    # Its own index of thousands of tasks takes long to read.
    monkeypatch.setattr(adapter, "TaskManager", lambda include_path, metadata: SimpleNamespace(all_tasks=["a", "b"]))
    for flags, says in (
        (["--tasks", "a,no_such_task"], "no task no_such_task:"),
        (["--tasks", "a", "--model", "no"], "no"),
    ):
        with pytest.raises(SystemExit) as exit:
            errors.run(lambda flags=flags: adapter.main(["--model", MODEL, *flags]))
        (line,) = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and says in line and line.startswith("error: ")


def test_a_length_without_room_is_one_line(capsys):
    """Catches: a traceback of lm-eval for RULER at a length in which its question has no room."""
    command = ["--model", MODEL, "--tasks", "niah_single_1", "--limit", "1", "--metadata", '{"max_seq_lengths": [64]}']
    with pytest.raises(SystemExit) as exit:
        errors.run(lambda: adapter.main(command))
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "no room" in line and "max_seq_lengths" in line
