"""Training examples out of conversations: the ids of inference, and nothing but answers scored."""

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chats import SPECIAL, TEMPLATES, build, chat, examples, template_folder

from longlora_jax.config import DataConfig
from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import load_prompt
from longlora_jax.data.dialogue import Renderer
from longlora_jax.data.rows import Conversation, Malformed, messages_of
from longlora_jax.errors import UserError


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request, tmp_path_factory) -> str:
    """A model's folder with tokenizer and template; its name is the template's."""
    folder = tmp_path_factory.mktemp("models") / request.param
    folder.mkdir()
    build(request.param).save(str(folder / "tokenizer.json"))
    bos, eos = SPECIAL[request.param][:2]
    # transformers writes tokens in either form.
    config = {"bos_token": {"__type": "AddedToken", "content": bos, "special": True}, "eos_token": eos}
    config |= {"chat_template": TEMPLATES[request.param], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


# (text, scored) of every part of a conversation of two questions as each model sees it, written down by hand. A part
# is tokenized on its own: it ends where no token of that tokenizer goes across. The Llama-2 tokenizer puts a space
# before every part by itself, and after every special token.
TURNS = ("Who wrote it?", "Jane Austen did.", "Thank you!", "You are welcome.")
BY_HAND = {
    "smollm2": [
        ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n", 0),
        ("<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Jane Austen did.<|im_end|>", 1),
        ("\n<|im_start|>user\nThank you!<|im_end|>\n<|im_start|>assistant\n", 0),
        ("You are welcome.<|im_end|>", 1),
        ("\n", 0),
    ],
    "llama2": [
        ("<s>[INST] Who wrote it? [/INST]", 0),
        ("Jane Austen did. </s>", 1),
        ("<s>[INST] Thank you! [/INST]", 0),
        ("You are welcome. </s>", 1),
    ],
    "llama3": [
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho wrote it?<|eot_id|>", 0),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", 0),
        ("Jane Austen did.<|eot_id|>", 1),
        ("<|start_header_id|>user<|end_header_id|>\n\nThank you!<|eot_id|>", 0),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", 0),
        ("You are welcome.<|eot_id|>", 1),
    ],
}


def by_hand(folder: str, parts) -> tuple[list[int], list[int]]:
    """Ids and mask of parts, by the tokenizers library alone."""
    backend = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids, scored = [], []
    for text, is_scored in parts:
        part = backend.encode(text, add_special_tokens=False).ids
        ids, scored = ids + part, scored + [is_scored] * len(part)
    return ids, scored


def test_ids_and_mask_are_those_written_by_hand(model):
    """Catches: a seam off by one token, an end of turn that is not learned, a user's marker or a newline that is."""
    [(ids, scored)] = examples(model, [chat(*TURNS)])
    wanted = by_hand(model, BY_HAND[Path(model).name])
    assert (ids.tolist(), scored.tolist()) == wanted
    assert ids.dtype == scored.dtype == np.int32


def test_every_prompt_is_what_transformers_gives_a_model(model):
    """Catches: a doubled or missing BOS, a default system turn that is lost, a template rendered by other rules."""
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model)
    row = chat(*TURNS, system="Be brief.")
    [(ids, scored)] = examples(model, [row])
    encode = lambda messages, **options: auto.apply_chat_template(messages, return_dict=False, **options)  # noqa: E731
    assert ids.tolist() == encode(row["messages"])
    starts = np.flatnonzero(np.diff(scored) == 1) + 1
    prompts = [encode(row["messages"][:n], add_generation_prompt=True) for n in (2, 4)]
    assert [ids[:start].tolist() for start in starts] == prompts


def test_an_answer_that_would_melt_into_its_prompt_is_cut(tmp_path):
    """Catches: a prompt whose last token ("](") only exists because the answer is known, or a space put at the cut."""
    backend = build("llama2")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    whole, asked = (backend.encode(t, add_special_tokens=False).ids for t in ("a [/INST](c)", "a [/INST]"))
    assert whole[: len(asked)] != asked  # else this shows nothing
    rows = [{"instruction": "a", "output": "(c)"}, {"instruction": "a", "output": "c"}]
    cut, plain = examples(str(tmp_path), rows, prompt="alpaca")
    tokenizer = load_tokenizer(str(tmp_path))
    first = int(np.flatnonzero(cut[1])[0])
    assert cut[0][:first].tolist() == plain[0][:first].tolist()
    text = tokenizer.decode(cut[0])
    assert text.endswith("a [/INST](c)</s>") and tokenizer.decode(cut[0][first:]) == "(c)</s>"


def test_alpaca_is_longloras_prompt(model):
    """Catches: a byte of the paper's prompt that is not the paper's, EOS missing or masked, braces read as fields."""
    rows = [
        {"instruction": "Name {it}.", "input": "", "output": "Emma"},
        {"instruction": "Name it.", "input": "A {b}", "output": "Emma", "extra": 1},
    ]
    system = (
        "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
        "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
        "or illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a "
        "question does not make any sense, or is not factually coherent, explain why instead of answering something "
        "not correct. If you don't know the answer to a question, please don't share false information.\n<</SYS>> "
        "\n\n "
    )
    backend = tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json")
    eos = SPECIAL[Path(model).name][1]
    for example, question in zip(
        examples(model, rows, prompt="alpaca"), ["Name {it}.", "Name it. \nA {b}"], strict=True
    ):
        # encode() of the whole adds BOS where the tokenizer does; every other id is that of the original's text.
        asked = backend.encode(f"{system}{question} [/INST]").ids
        assert example[0].tolist() == backend.encode(f"{system}{question} [/INST]Emma{eos}").ids
        assert example[1].tolist() == [0] * len(asked) + [1] * (len(example[0]) - len(asked))
    without = examples(model, rows, prompt="alpaca", add_bos=False)[0][0]
    assert without.tolist() == backend.encode(f"{system}Name {{it}}. [/INST]Emma{eos}", add_special_tokens=False).ids


def test_the_rows_of_every_form_are_the_same_conversation():
    """Catches: a role by its other name, an optional field, or text in parts that is lost on the way."""
    wanted = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parts = [{"type": "text", "text": "a"}]
    for row in (
        {"messages": wanted},
        {"messages": [wanted[0], {"role": "assistant", "content": parts}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": None, "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"messages": None, "prompt": None, "instruction": "q", "output": "a"},  # a table of rows of several forms
        {"instruction": None, "prompt": "q", "completion": None, "response": "a"},
        {"prompt": wanted[:1], "completion": wanted[1:]},
    ):
        assert messages_of(row) == wanted, row


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "t"}, "it has text"),
        ({"instruction": "q"}, "'output' is missing"),
        ({"instruction": "q", "output": 3}, "'output' is no text"),
        ({"instruction": "q", "input": 3, "output": "a"}, "'input' is no text"),
        ({"prompt": "q"}, "'completion' is missing"),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": []}, "no list of messages"),
        ({"messages": ["hello"]}, "message 1 of 'messages' is no object"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 of 'messages' has no text in 'content'"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "message 1 of 'messages' is by"),
        ({"conversations": [{"from": "moon", "value": "q"}]}, "'moon'"),
        ({}, "no field"),
    ],
)
def test_malformed_rows_say_what_they_lack(row, fault):
    """Catches: a KeyError in the middle of a corpus, or a row of the wrong shape that trains on nothing."""
    with pytest.raises(Malformed, match=fault):
        messages_of(row)


BAD = [chat("q", "a"), {"instruction": "q"}, chat("q", " \n"), chat("q"), {"messages": 1}, chat("q", "b", "r")]


def test_rows_left_out_are_counted_by_reason(model, caplog):
    """Catches: rows that vanish without a word, and an answer that is lost with an open question after it."""
    with caplog.at_level(logging.INFO):
        made = examples(model, BAD, on_bad_row="skip")
    assert len(made) == 2 and all(scored.any() for _, scored in made)
    [line] = [r.message for r in caplog.records if "examples of" in r.message]
    assert line.startswith("6 rows make 2 examples of ")
    assert line.endswith("scored; left out: 2 without an answer to learn, 2 malformed")
    alone = examples(model, [chat("q", "b")])
    np.testing.assert_array_equal(made[1], alone[0])


def test_bad_rows_stop_a_run_by_name(model):
    """Catches: a fault without file and line, and a corpus without one example that trains on nothing."""
    with pytest.raises(UserError, match="^file.jsonl, line 2: the field 'output' is missing"):
        examples(model, BAD)
    with pytest.raises(UserError, match="none of 2 rows makes an example: 2 without an answer to learn"):
        examples(model, [chat("q"), chat("q", "")])
    with pytest.raises(UserError, match="line 1: questions and answers must take turns"):
        examples(model, [{"messages": chat("q")["messages"] + chat("q", "a")["messages"]}], prompt="alpaca")


def test_a_template_that_closes_nothing_gets_eos(tmp_path):
    """Catches: a model that is never taught to stop."""
    folder = template_folder(
        tmp_path,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    tokenizer = load_tokenizer(folder)
    [(ids, scored)] = examples(folder, [chat("q", "Austen")])
    assert tokenizer.decode(ids[scored == 1]) == "Austen\n\n<|im_end|>"
    assert ids[-1] == tokenizer.eos_id and (ids[:-1] != tokenizer.eos_id).all()
    assert tokenizer.decode(ids[scored == 0]) == "user: q\n\nassistant: "


def test_words_before_an_answer_do_not_hide_it(tmp_path):
    """Catches: the answer "fin" found in the marks that a template puts before it, and EOS doubled."""
    folder = template_folder(
        tmp_path,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}final<|endoftext|>\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    [(ids, scored)] = examples(folder, [chat("q", "fin")])
    assert load_tokenizer(folder).decode(ids[scored == 1]) == "final<|endoftext|>\nfin<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}",
        "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT {% endif %}",
    ],
    ids=["answer lost", "prompt rewritten"],
)
def test_a_template_whose_answers_follow_another_prompt_is_refused(template, tmp_path):
    """Catches: answers scored after a prompt that no model will ever be given, or answers that are not there."""
    with pytest.raises(UserError, match="line 1: message 2 does not follow its prompt"):
        examples(template_folder(tmp_path, template), [chat("q", "Austen")])


def test_many_blanks_before_an_answer_take_no_time(model):
    """Catches: a look for the end of an answer that begins again at every blank: a million of them took an hour."""
    said = Conversation(chat("q", "\n" * 200_000 + "yes")["messages"], [True] * 2)
    render = Renderer(load_prompt(DataConfig(), model), load_tokenizer(model).added_tokens())
    started = time.thread_time()
    assert [len(dialogue.turns) for dialogue in render(said)] == [1]
    assert time.thread_time() - started < 2  # 0.01 s


def test_a_marker_of_the_next_question_ends_no_answer(tmp_path):
    """Catches: a model that is taught to speak for its user, where a template does not close answers."""
    folder = template_folder(
        tmp_path,
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|endoftext|>' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|endoftext|>{% endif %}",
    )
    [(ids, scored)] = examples(folder, [chat(*TURNS)])
    assert load_tokenizer(folder).decode(ids[scored == 1]) == "Jane Austen did.You are welcome.<|im_end|>"
