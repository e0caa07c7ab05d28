"""What a template makes of conversations: which answers are learnt, after which prompt, and up to where."""

import logging

import numpy as np
import pytest
from chats import CHATML, TEMPLATES, chat, examples, model_folder, template_folder

from longlora_jax.data import load_tokenizer
from longlora_jax.errors import UserError

# Thoughts are shown of the last answer alone, as Qwen3's template does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last and parts | length > 1 %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip() }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# It knows no system, as Gemma's, and wants questions and answers to take turns.
STRICT = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(folder: str, example) -> tuple[str, str]:
    """(the whole text, what is scored of it) of an example."""
    ids, scored = example
    tokenizer = load_tokenizer(folder)
    return tokenizer.decode(ids), tokenizer.decode(ids[scored == 1])


def notes(caplog) -> list[str]:
    return [record.message for record in caplog.records]


def test_answers_whose_thoughts_a_template_hides_later_get_rows_of_their_own(tmp_path, caplog):
    """Catches: a whole row lost, a thought learnt by nobody, an answer learnt after a prompt that is never given."""
    folder = template_folder(tmp_path, THINKING)
    row = chat("q1", "<think>t1</think>a1", "q2", "<think>t2</think>a2")
    with caplog.at_level(logging.INFO):
        found = [texts(folder, example) for example in examples(folder, [row])]
    first = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    second = "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    learnt = ["<think>\nt1\n</think>\n\na1<|im_end|>", "<think>\nt2\n</think>\n\na2<|im_end|>"]
    assert found == [(f"{first}{learnt[0]}\n", learnt[0]), (f"{first}{second}{learnt[1]}\n", learnt[1])]
    assert any(note.startswith("1 answers are rows of their own") for note in notes(caplog))
    (last,) = (texts(folder, example) for example in examples(folder, [row], last_turn_only=True))
    assert last == found[1]


def test_a_token_that_closes_the_whole_conversation_belongs_to_the_last_answer_alone(tmp_path, caplog):
    """Catches: a row for each answer, every one with all that is before it, under Phi's templates."""
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n{% "
    folder = template_folder(tmp_path, CHATML.replace(asks + "endif %}", asks + "else %}<|endoftext|>{% endif %}"))
    with caplog.at_level(logging.INFO):
        found = [texts(folder, example) for example in examples(folder, [chat("q1", "a1", "q2", "a2", "q3", "a3")])]
    assert [scored for _, scored in found] == ["a1<|im_end|>a2<|im_end|>a3<|im_end|>\n<|endoftext|>"]
    assert not any("rows of their own" in note for note in notes(caplog))


def test_the_last_turn_alone_is_learnt_by_a_switch(tmp_path):
    """Catches: a switch that cuts the conversation, or that takes the last scored answer for the last one."""
    folder = template_folder(tmp_path, CHATML)
    row = chat("q1", "a1", "q2", "a2", "q3")
    [whole], [last] = examples(folder, [row]), examples(folder, [row], last_turn_only=True)
    np.testing.assert_array_equal(whole[0], last[0])
    assert texts(folder, whole)[1] == "a1<|im_end|>a2<|im_end|>" and texts(folder, last)[1] == "a2<|im_end|>"
    row["messages"][3]["train"] = False
    with pytest.raises(UserError, match="1 without an answer to learn"):
        examples(folder, [row], last_turn_only=True)


def test_a_conversation_that_the_assistant_begins_is_trained_on(tmp_path, caplog):
    """Catches: a run that stops at ShareGPT's usual first turn, under templates that read messages[0] and others."""
    row = {"messages": [{"role": "assistant", "content": "Hello."}, *chat("q", "a")["messages"]]}
    for kind in ("smollm2", "llama3"):
        folder = model_folder(tmp_path / kind, kind, template=TEMPLATES[kind])
        end = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>"}[kind]
        assert [texts(folder, example)[1] for example in examples(folder, [row])] == [f"Hello.{end}a{end}"]
    strict = template_folder(tmp_path, STRICT)
    with caplog.at_level(logging.INFO):
        [example] = examples(strict, [row])
    np.testing.assert_array_equal(example[0], examples(strict, [chat("q", "a")])[0][0])
    assert "1 rows are without their opening answer, which the template refuses" in notes(caplog)


@pytest.mark.parametrize(
    "template", [STRICT, "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + CHATML]
)
def test_a_system_message_that_the_template_does_not_take_is_folded_by_a_switch(template, tmp_path, caplog):
    """Catches: a run that stops with no way on, or a template that leaves the system message out without a word."""
    folder = template_folder(tmp_path, template)
    row = chat("q1", "a1", "q2", "a2", system="Rhyme.")
    with pytest.raises(
        UserError, match="line 1: .*data.fold_system=True puts a system message before the first question"
    ):
        examples(folder, [row])
    with caplog.at_level(logging.INFO):
        [example] = examples(folder, [row], fold_system=True)
    [wanted] = examples(folder, [chat("Rhyme.\n\nq1", "a1", "q2", "a2")])
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(example, wanted, strict=True))
    assert "1 rows have their system message folded into the first question" in notes(caplog)
    row["messages"].insert(1, {"role": "assistant", "content": "Hello."})  # nothing can go before it
    (opened,) = (texts(folder, example) for example in examples(folder, [row], fold_system=True))
    assert opened == texts(folder, wanted)


def test_a_system_message_that_the_template_takes_is_not_folded(tmp_path):
    """Catches: a switch that changes rows which need no change."""
    folder = template_folder(tmp_path, CHATML)
    row = chat("q", "a", system="Rhyme.")
    np.testing.assert_array_equal(examples(folder, [row], fold_system=True)[0][0], examples(folder, [row])[0][0])


def test_rows_are_accounted_for_where_max_tokens_ends_them(tmp_path, caplog):
    """Catches: rows left out, and fields that nothing reads, of which the log does not say a word."""
    folder = template_folder(tmp_path, CHATML)
    rows = [chat("q", "a") | {"mood": "gay"}, {"messages": chat("q")["messages"]}, *[chat("q", "a")] * 3]
    [one, *_] = examples(folder, rows)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert len(examples(folder, rows, max_tokens=2 * len(one[0]) + 1)) == 2
    tokens = 2 * len(one[0])
    made, unread = (next(n for n in notes(caplog) if words in n) for words in ("rows make", "nothing reads"))
    assert made.startswith(f"5 rows make 2 examples of {tokens} tokens") and "1 without an answer to learn" in made
    assert "mood (1 rows)" in unread


def test_examples_longer_than_the_window(tmp_path, caplog):
    """Catches: a row lost without a word, a cut of the wrong side, an example of which no answer is left."""
    folder = template_folder(tmp_path, CHATML)
    rows = [chat("q", "a"), chat("q" * 300, "yes"), chat("q", "yes " * 300)]
    whole = examples(folder, rows)
    window = 100
    caplog.clear()  # another test may have set the level
    assert len(whole[0][0]) < window < min(len(ids) for ids, _ in whole[1:])
    with caplog.at_level(logging.INFO):
        assert len(examples(folder, rows, window=window)) == 1
        left, right = (examples(folder, rows, window=window, too_long=side) for side in ("cut_left", "cut_right"))
    counted = [n for n in notes(caplog) if "examples of" in n]
    assert counted[0].endswith("left out: 2 longer than the window of 100 tokens")
    assert counted[1].endswith("left out: none")
    assert counted[2].endswith("left out: 1 without an answer in what a cut leaves")
    assert "2 examples have lost their beginning: they are longer than the window" in notes(caplog)
    for cut, full in zip(left, whole, strict=True):
        assert all(np.array_equal(ours, theirs[-window:]) for ours, theirs in zip(cut, full, strict=True))
    for cut, full in zip(right, (whole[0], whole[2]), strict=True):
        assert all(np.array_equal(ours, theirs[:window]) for ours, theirs in zip(cut, full, strict=True))
    with pytest.raises(UserError, match="line 2 makes an example of .* tokens, the window has 100: raise seq_len"):
        examples(folder, rows, window=window, too_long="stop")
