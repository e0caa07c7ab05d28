"""Passkey: prompts to the token, the place of the key, the grid, its intervals and its file. No model reads here:
in the place of generate() stand readers that see all of a prompt, or its last tokens alone."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from longlora_jax import errors
from longlora_jax.evals import passkey, reader, retrieval
from longlora_jax.evals.reader import Reader, fit
from longlora_jax.evals.results import Results
from longlora_jax.evals.retrieval import begun_anywhere, split_at_sentence, wilson

MODEL = Path(__file__).parents[2] / "models" / "tiny-python-llama"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>\n{% endif %}"
)
NATURAL = "\n".join(
    f"On day {day} the {'fox' if day % 3 else 'old crow'} walked {day * 7 % 13} miles to the river. Nobody saw it!"
    for day in range(400)
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def reads_last(tokens_seen, asked=None):
    """A stand-in for generate(): writes the key if it is among the last tokens of a prompt, else some other number."""
    tokenizer = reader.load_tokenizer(str(MODEL))

    def generate(model, params, prompts, *, stop, max_new_tokens, **_):
        written = []
        for ids in prompts:
            if asked is not None:
                asked.append(ids)
            found = re.search(r"The pass key is (\d+)\. Remember it\.", tokenizer.decode(ids[-tokens_seen:]))
            text = f" {found[1] if found else 77_777}. And so on for ever"
            answer = []
            for token in tokenizer.encode_batch([text], add_bos=False)[0][:max_new_tokens]:
                answer.append(int(token))
                if stop(0, answer):
                    break
            written.append(answer)
        return written

    return generate


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with a stand-in for the model; returns the JSON."""
    monkeypatch.setattr(reader, "load_for_generation", lambda model, dtype: (None, None))

    def command(generate, *flags, model=MODEL):
        monkeypatch.setattr(reader, "generate", generate)
        passkey.main(["--model", str(model), "--json", str(tmp_path / "out.json"), *flags])
        return json.loads((tmp_path / "out.json").read_text())

    return command


@pytest.mark.parametrize("haystack", [None, NATURAL], ids=["filling", "natural"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_prompts_have_the_length_and_the_words(chat_folder, haystack, template):
    """Catches: the template or BOS not counted, a prompt a token too long, the key twice or not at all, other words
    than LongLoRA's, the fact in another place than its depth says."""
    asked = Reader(str(chat_folder), template=template)
    for length in (180, 181, 182, 183, 700, 1025):
        for depth in (0.0, 0.3, 1.0):
            ids = passkey.prompt(asked, length, depth, 31_415, haystack)
            # The fewest tokens that a cut can be short by is 1 where a character more is two tokens more.
            assert length - 1 <= len(ids) <= length
            text = asked.tokenizer.decode(ids)
            end = "<a>\nThe pass key is" if template == "chat" else "What is the pass key? The pass key is"
            start = "<user>\nThere is an" if template == "chat" else "There is an important info hidden inside a lot"
            assert text.removeprefix("<s>").lstrip().startswith(start) and text.endswith(end)
            fact = "The pass key is 31415. Remember it. 31415 is the pass key."
            assert text.count(fact) == 1
            before, after = text.split(f"\n{fact}\n")
            before = before.split("information there.\n")[1]
            after = after.split("\nWhat is the pass key?")[0]
            share = len(before) / (len(before) + len(after))
            # A natural text is parted between sentences, 120 characters at most.
            assert abs(share - depth) <= (
                0.5 / len(before + after) + 1e-9 if haystack is None else 60 / (len(before) + len(after)) + 0.01
            )
            if haystack is None:
                filling = passkey.GARBAGE * 100
                assert filling.startswith(before) and filling.startswith(after)
            else:
                assert (before + after) == haystack[: len(before + after)]
                assert not before or not after or before.rstrip()[-1] in ".!"


def test_most_prompts_have_exactly_the_length():
    """Catches: a search that is content with the first length below."""
    asked = Reader(str(MODEL))
    lengths = [len(passkey.prompt(asked, length, 0.5, 12_345)) - length for length in range(300, 340)]
    assert lengths.count(0) >= 36


def test_grid_of_a_reader_that_sees_all_and_of_one_that_sees_the_end(run, tmp_path, capsys):
    """Catches: depth counted from the wrong end, a result under another length."""
    flags = ("--lengths", "300,600", "--depths", "0,0.5,1", "--trials", "2")
    everything = run(reads_last(10_000), *flags, "--plot", str(tmp_path / "out.png"))
    assert [(r["length"], r["depth"]) for r in everything["results"]] == [
        (length, depth) for length in (300, 600) for depth in (0, 0.5, 1)
    ]
    assert all(
        r["correct"] == r["trials"] == 2 and r["tokens"] in (r["length"], r["length"] - 1)
        for r in everything["results"]
    )
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "2/2" in capsys.readouterr().out
    (tmp_path / "out.json").unlink()
    right = {(r["length"], r["depth"]): r["correct"] for r in run(reads_last(400), *flags)["results"]}
    assert right == {(300, 0): 2, (300, 0.5): 2, (300, 1): 2, (600, 0): 0, (600, 0.5): 2, (600, 1): 2}
    (tmp_path / "out.json").unlink()
    right = {(r["length"], r["depth"]): r["correct"] for r in run(reads_last(120), *flags)["results"]}
    assert right == {(300, 0): 0, (300, 0.5): 0, (300, 1): 2, (600, 0): 0, (600, 0.5): 0, (600, 1): 2}


def test_a_finished_result_is_not_computed_again(run, tmp_path, caplog):
    """Catches: a grid that starts anew after a crash; results of other settings mixed; other keys on another day."""
    asked = []
    flags = ("--trials", "2", "--depths", "0,1")
    first = run(reads_last(10_000, asked), "--lengths", "300", *flags)
    assert len(asked) == 4
    both = run(reads_last(10_000, asked), "--lengths", "200,300", *flags)
    assert len(asked) == 8 and {r["length"] for r in both["results"]} == {200, 300}
    assert [r for r in both["results"] if r["length"] == 300] == first["results"]
    again = run(reads_last(10_000, asked), "--lengths", "300", "--depths", "0,1", "--trials", "3")
    assert len(asked) == 14 and [r["trials"] for r in again["results"]] == [2, 2, 3, 3]
    said = [r["answers"] for r in again["results"][2:]]
    assert said[0] == said[1] and said[0][:2] == first["results"][0]["answers"]
    assert len({a["expected"] for a in said[0]}) == 3
    other = run(reads_last(10_000), "--lengths", "300", "--seed", "1")
    assert "holds results with seed 0, these are with 1: it is written anew" in caplog.text
    assert other["seed"] == 1 and {r["length"] for r in other["results"]} == {300}
    (tmp_path / "out.json").write_text('{"seq_len": 8}')  # a config, say
    with pytest.raises(errors.UserError, match="out.json holds something else than such results"):
        run(reads_last(10_000), "--lengths", "300")
    assert json.loads((tmp_path / "out.json").read_text()) == {"seq_len": 8}


def test_questions_of_a_depth_stand_in_other_places_of_a_haystack(run, tmp_path):
    """Catches: trials that differ in their key alone, so that one place decides all of them; a text of which some is
    lost or begins within a sentence; another place on another day, or at another depth."""
    (tmp_path / "novel.txt").write_text(NATURAL)
    flags, asked = ("--haystack", str(tmp_path / "novel.txt"), "--lengths", "300", "--trials", "4"), []
    run(reads_last(10_000, asked), *flags, "--depths", "0,1")
    tokenizer = reader.load_tokenizer(str(MODEL))
    texts = [tokenizer.decode(ids) for ids in asked]
    days = [re.search(r"On day (\d+) |Nobody saw it!", text).group() for text in texts]
    assert len(set(days[:4])) >= 3 and days[:4] == days[4:]
    turned = begun_anywhere(NATURAL, np.random.default_rng(3))
    assert sorted(turned.split()) == sorted(NATURAL.split()) and re.match(r"On day \d+|Nobody", turned)


def test_another_text_under_the_name_of_a_haystack_is_asked_anew(run, tmp_path, caplog):
    """Catches: results of the text that the file held before."""
    asked, novel = [], tmp_path / "novel.txt"
    flags = ("--haystack", str(novel), "--lengths", "300", "--trials", "1", "--depths", "0")
    for text in (NATURAL, NATURAL, NATURAL.replace("fox", "owl")):
        novel.write_text(text)
        run(reads_last(10_000, asked), *flags)
    assert len(asked) == 2 and "holds results with haystack_digest" in caplog.text


def test_untrained_scalings_are_asked_too(run, monkeypatch, caplog):
    """Catches: a scaling that does not reach the model; results of another scaling gone on with, in either order, or
    when it grew with the lengths."""
    opened, asked = [], []
    monkeypatch.setattr(reader, "load_for_generation", lambda model, dtype: opened.append(model) or (None, None))
    flags = ("--depths", "0", "--trials", "1", "--lengths")
    for lengths, scaling, found, prompts in (
        ("300,600", (), None, 2),
        ("300,600", ("--rope_type", "yarn"), ("yarn", 3.0), 2),
        ("300,600", (), None, 2),
        ("300", ("--rope_type", "linear"), ("linear", 2.0), 1),
        ("300,600", ("--rope_type", "linear"), ("linear", 3.0), 2),
        ("300", ("--rope_type", "linear", "--rope_factor", "3"), ("linear", 3.0), 0),
        ("200", ("--rope_type", "linear"), None, 1),
    ):
        asked.clear()
        written = run(reads_last(10_000, asked), *flags, lengths, *scaling)
        assert len(asked) == prompts, (lengths, scaling)
        assert written["rope_override"] == (found and dict(zip(("rope_type", "rope_factor"), found, strict=True)))
        if prompts:
            rope = opened[-1].config.rope_scaling
            assert (rope and (rope.rope_type, rope.factor)) == found
    with pytest.raises(errors.UserError, match="--rope_factor needs --rope_type"):
        run(reads_last(10_000), *flags, "300", "--rope_factor", "8")


def test_what_was_done_before_a_crash_is_there(run, tmp_path):
    """Catches: results that are written at the very end."""
    good, calls = reads_last(10_000), []

    def dies(*args, **how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return good(*args, **how)

    with pytest.raises(KeyboardInterrupt):
        run(dies, "--lengths", "200", "--trials", "1")
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 2


def test_chat_template_is_used_where_there_is_one(run, chat_folder, tmp_path):
    """Catches: --template recorded and not used; a batch size that changes what is asked."""
    asked, flags = [], ("--lengths", "300", "--depths", "0", "--trials", "3")
    assert run(reads_last(10_000, asked), *flags, "--batch_size", "2", model=chat_folder)["template"] == "chat"
    assert len(asked) == 4 and (asked[2] == asked[3]).all()  # whole batches
    (tmp_path / "out.json").unlink()
    assert run(reads_last(10_000, asked), *flags, "--template", "plain", model=chat_folder)["template"] == "plain"
    tokenizer = reader.load_tokenizer(str(MODEL))
    assert "<user>" in tokenizer.decode(asked[0]) and "<user>" not in tokenizer.decode(asked[-1])


def test_answers_are_judged_by_their_first_number():
    """Catches: the first digits of a key taken for it, a key that comes after a wrong one."""
    right = [" 12345. Remember it", "12345", "the number 12345."]
    assert [passkey.judge(answer, "12345") for answer in right] == [1, 1, 1]
    wrong = ["", " 123", "123456", "1 2345", "54321, no, 12345", "one"]
    assert [passkey.judge(answer, "12345") for answer in wrong] == [0] * 6


@pytest.mark.parametrize(
    ("correct", "trials", "low", "high"),
    # R's prop.test(correct, trials, correct = FALSE)$conf.int
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (9, 10, 0.5958500, 0.9821238), (10, 10, 0.7224672, 1.0)],
)
def test_wilson_by_known_values(correct, trials, low, high):
    """Catches: the interval of the normal approximation, which is empty at 0 and 1; a z of 1.645."""
    np.testing.assert_allclose(wilson(correct, trials), (low, high), atol=1e-6)


def test_sentences_are_not_cut():
    """Catches: a fact in the middle of a sentence; an end that is not an end."""
    text = 'One is here. "Two is there!" Three? Four'
    assert split_at_sentence(text, 0.3) == ("One is here. ", '"Two is there!" Three? Four')
    assert split_at_sentence(text, 0.0) == ("", text)
    assert split_at_sentence(text, 1.0) == ('One is here. "Two is there!" Three? ', "Four")
    assert split_at_sentence("One. Two.", 1.0) == ("One. Two.", "")
    assert split_at_sentence("no end", 0.8) == ("no end", "")


def test_fit_finds_the_longest():
    """Catches: an off-by-one at either end of the search; a text that is too short taken as long enough."""
    sizes = [5, 5, 7, 6, 8, 8, 12, 9, 14, 15, 20]
    render = lambda n: np.zeros(sizes[n], np.int32)  # noqa: E731
    assert [len(fit(render, length, 10)) for length in (5, 6, 9, 11, 14, 20)] == [5, 6, 9, 9, 14, 20]
    with pytest.raises(errors.UserError, match="length 4 is too short: the task by itself takes 5"):
        fit(render, 4, 10)
    with pytest.raises(errors.UserError, match="more than the text gives: with all of it the prompt has 20 tokens"):
        fit(render, 21, 10)


def test_results_refuse_what_is_not_theirs(tmp_path):
    """Catches: somebody's file overwritten because it is JSON."""
    path = tmp_path / "other.json"
    for content in ({"lr": 1}, {"results": [{"length": 3}]}, {"results": {"a": 1}}):
        path.write_text(json.dumps(content))
        with pytest.raises(errors.UserError, match="something else"):
            Results(str(path), {}, ["length", "depth"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--model": "no_such_folder"}, "no_such_folder"),
        ({"--lengths": "20"}, "length 20 is too short: the task by itself takes"),
        ({"--lengths": "300,x"}, "300,x"),
        ({"--haystack": "short.txt"}, "length 300 is more than the text gives"),
        ({"--haystack": "blank.txt"}, "blank.txt is empty"),
        ({"--haystack": "none.txt"}, "none.txt"),
        ({"--depths": "0,1.5"}, "1.5 must be at most 1"),
        ({"--trials": "0"}, "0 must be at least 1"),
        ({"--template": "chat"}, "has no chat template"),
        ({"--json": "no/such/out.json"}, "no/such/out.json"),
        ({"--plot": "out.gif"}, "out.gif"),
    ],
    ids=lambda value: " ".join(sum(value.items(), ())) if isinstance(value, dict) else "",
)
def test_a_fault_is_one_line(tmp_path, monkeypatch, capsys, change, says):
    """Catches: a traceback, weights that are read before the fault is told, a file although something was wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reader, "load_for_generation", None)
    Path("short.txt").write_text("It is short. Very.")
    Path("blank.txt").write_text(" \n")
    flags = {"--model": str(MODEL), "--lengths": "300", "--json": "out.json"} | change
    with pytest.raises(SystemExit) as exit:
        errors.run(lambda: passkey.main([part for pair in flags.items() for part in pair]))
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
    assert not printed.out and not list(tmp_path.glob("*out*"))


def test_a_model_reads_and_answers(tmp_path, capsys):
    """Catches: a stand-in that takes other arguments than generate(); lengths beyond the window refused or not told."""
    flags = ["--lengths", "150", "--depths", "0.5", "--trials", "1", "--json", str(tmp_path / "out.json")]
    passkey.main(["--model", str(MODEL), *flags])
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (row["length"], row["depth"], row["trials"]) == (150, 0.5, 1) and row["correct"] in (0, 1)
    assert row["answers"][0]["answer"]
    assert retrieval.DEPTHS[0] == 0 and retrieval.DEPTHS[-1] == 1
