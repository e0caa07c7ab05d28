"""Rows of all forms: what a field becomes, what is refused by name, what the log says that nobody reads."""

import json
import logging

import numpy as np
import pytest
from chats import CHATML, TEMPLATES, chat, examples, template_folder

from longlora_jax.data import load_tokenizer
from longlora_jax.data.rows import Malformed, conversation_of, parse_columns
from longlora_jax.errors import UserError

SYSTEM = {"role": "system", "content": "Rhyme."}
TURNS = chat("q1", "a1", "q2", "a2")["messages"]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
# One that has places for all that a row may hold, as Qwen's and Llama 3.1's have.
PLACES = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def in_text(call: dict) -> dict:
    """A call as OpenAI spells it."""
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"])}}


def scored_text(folder: str, example) -> str:
    ids, scored = example
    return load_tokenizer(folder).decode(ids[scored == 1])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, *TURNS]},
        {"messages": TURNS, "system": "Rhyme."},
        {"messages": [{"role": "developer", "content": "Rhyme."}, *TURNS], "system": " ", "tools": "", "id": None},
        {
            "conversations": [
                {"from": f, "value": m["content"]} for f, m in zip(["human", "gpt"] * 2, TURNS, strict=True)
            ],
            "system": "Rhyme.",
            "tools": "[]",
        },
        {"instruction": "q2", "input": "", "output": "a2", "system": "Rhyme.", "history": [["q1", "a1"]]},
        {"prompt": "q2", "response": "a2", "system_prompt": "Rhyme.", "history": [["q1", "a1"]]},
        {"prompt": [SYSTEM, *TURNS[:3]], "completion": TURNS[3:]},
        {"question": "q2", "answer": "a2", "system_prompt": "Rhyme.", "history": (("q1", "a1"),)},
    ],
    ids=["messages", "system beside", "developer", "sharegpt", "alpaca", "prompt", "prompt of messages", "orca"],
)
def test_system_and_earlier_turns_are_part_of_the_conversation(row):
    """Catches: a system message or a history dropped without a word, and the template's default in its place."""
    said = conversation_of(row)
    assert said.messages == [SYSTEM, *TURNS] and all(said.scored) and not said.variables
    assert not {*said.unknown} - {"id"}


@pytest.mark.parametrize(
    ("field", "off", "on"),
    [("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True), ("training", False, None), ("loss", False, True)],
)
@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")], ids=str)
def test_an_answer_that_is_not_to_be_learnt_is_not_scored(field, off, on, names, tmp_path):
    """Catches: a bad answer that its row marks as such, learnt all the same; a mark that hides the good one too."""
    folder, (form, who, what) = template_folder(tmp_path, CHATML), names
    turns = [{who: m["role"], what: m["content"]} for m in TURNS]
    turns[1][field], turns[3][field] = off, on
    [example] = examples(folder, [{form: turns}])
    assert scored_text(folder, example) == "a2<|im_end|>"
    [plain] = examples(folder, [{"messages": TURNS}])
    np.testing.assert_array_equal(example[0], plain[0])
    with pytest.raises(UserError, match="line 1: message 2 of .* has weight=0.5: it must be 0 or 1"):
        turns[1]["weight"] = 0.5
        examples(folder, [{form: turns}])
    turns[1]["weight"], turns[3]["weight"] = 0, 0
    with pytest.raises(UserError, match="1 without an answer to learn"):
        examples(folder, [{form: turns}])


def test_templates_get_tools_calls_results_and_reasoning_as_transformers_gives_them(tmp_path):
    """Catches: a tool, a call, its result or a thought that is dropped where the template has a place for it."""
    auto = pytest.importorskip("transformers").AutoTokenizer
    folder = template_folder(tmp_path, PLACES)
    said = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "Say so."},
    ]
    rows = [
        {"messages": said, "tools": TOOLS},
        {"messages": [said[0], {**said[1], "content": None}, *said[2:]], "tools": json.dumps(TOOLS)},
        {"messages": [said[0], said[1] | {"tool_calls": [in_text(CALL)]}, *said[2:]], "tools": TOOLS},
        {
            "messages": [
                said[0],
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "content": "rain"},
                said[3],
            ],
            "tools": TOOLS,
        },
        {
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "It rains.", "reasoning_content": "Say so."},
            ],
            "tools": json.dumps(TOOLS),
        },
    ]
    tokenizer = auto.from_pretrained(folder)
    wanted = tokenizer.apply_chat_template(said, tools=TOOLS, return_dict=False)
    learnt = '<call>{"name": "weather", "arguments": {"city": "Ulm"}}</call><|im_end|>'
    for example in examples(folder, rows):
        assert example[0].tolist() == wanted
        assert scored_text(folder, example) == learnt + "<think>Say so.</think>\nIt rains.<|im_end|>"


@pytest.mark.parametrize(
    ("field", "row"),
    [
        ("tools", {"messages": TURNS, "tools": TOOLS}),
        ("tool_calls", {"messages": [TURNS[0], {**TURNS[1], "tool_calls": [CALL]}]}),
        ("reasoning_content", {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "hm"}]}),
        ("thinking", {"messages": [TURNS[0], {**TURNS[1], "thinking": "hm"}]}),
    ],
)
def test_a_field_without_a_place_in_the_template_is_refused_by_its_name(field, row, tmp_path):
    """Catches: half of an answer that is learnt, and the other half dropped in silence."""
    folder = template_folder(tmp_path, TEMPLATES["smollm2"])
    with pytest.raises(
        UserError, match=f"line 1: .* has {field}, for which the template has no place.*data.columns={field}="
    ):
        examples(folder, [row])
    left_out = {key: value for key, value in row.items() if key != field}
    left_out["messages"] = [{k: v for k, v in m.items() if k != field} for m in row["messages"]]
    [with_it], [without] = examples(folder, [row], columns=f"{field}="), examples(folder, [left_out])
    np.testing.assert_array_equal(with_it[0], without[0])


def test_a_template_that_writes_the_arguments_of_calls_as_they_are_gets_them_in_json(tmp_path):
    """Catches: a dict of Python's in what DeepSeek's template writes, and a row refused that OpenAI's own form fits."""
    folder = template_folder(tmp_path, PLACES.replace("c.function | tojson", "c.function.name ~ c.function.arguments"))
    turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    for row in ({"messages": turns}, {"messages": [turns[0], turns[1] | {"tool_calls": [in_text(CALL)]}]}):
        [example] = examples(folder, [row])
        assert scored_text(folder, example) == '<call>weather{"city": "Ulm"}</call><|im_end|>'


@pytest.mark.parametrize("role", ["tool", "system"])
def test_a_message_without_a_place_in_the_template_is_refused(role, tmp_path):
    """Catches: the result of a call dropped in silence, and a model that learns to invent it."""
    known = CHATML.replace("<|im_start|>{{", "{% if loop.first or m.role in ('user', 'assistant') %}<|im_start|>{{", 1)
    folder = template_folder(tmp_path, known.replace("{% endfor %}", "{% endif %}{% endfor %}", 1))
    row = {"messages": [*TURNS[:2], {"role": role, "content": "rain"}, TURNS[2], TURNS[3]]}
    with pytest.raises(UserError, match=f"line 1: message 3 is by {role}, for which the template has no place"):
        examples(folder, [row])


def test_variables_of_a_row_cannot_take_the_renderers_place(tmp_path):
    """Catches: a traceback from a row that an API server has logged."""
    row = chat("q", "a") | {"chat_template_kwargs": {"add_generation_prompt": True, "self": 1, "messages": []}}
    folder = template_folder(tmp_path, CHATML)
    np.testing.assert_array_equal(examples(folder, [row])[0][0], examples(folder, [chat("q", "a")])[0][0])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "turn 1 of 'history' is no pair"),
        ({"instruction": "q", "output": "a", "history": "q"}, "turn 1 of 'history' is no pair"),
        ({"messages": [SYSTEM, *TURNS], "system": "Sing."}, "a system message twice, in 'system' and before"),
        ({"messages": TURNS, "tools": "{not JSON"}, "the field 'tools' is no JSON"),
        ({"messages": TURNS, "tools": "[" * 2000 + "]" * 2000}, "the field 'tools' is no JSON"),
        ({"messages": TURNS, "tools": {"name": "f"}}, "the field 'tools' is no list"),
        ({"instruction": "q", "output": "a", "system": 3}, "the field 'system' is no text"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "no JSON of a name and its arguments"),
        ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "train='no': it must be 0 or 1"),
    ],
)
def test_fields_that_cannot_be_used_are_named(row, fault):
    """Catches: a traceback, or a guess at what a row may mean."""
    with pytest.raises(Malformed, match=fault):
        conversation_of(row)


def test_fields_that_nobody_reads_are_named_once_with_their_count(tmp_path, caplog):
    """Catches: a column that everybody thinks is used."""
    rows: list = [{"instruction": "q", "output": "a", "id": n, "lang": "de" if n else None} for n in range(3)]
    rows[0] = {"messages": [m | {"mood": "gay"} for m in TURNS], "chat_template_kwargs": {"volume": 3}, "id": 1}
    with caplog.at_level(logging.INFO):
        examples(template_folder(tmp_path, CHATML), rows)
        examples(template_folder(tmp_path, CHATML + "{# mood, volume #}"), rows)
    [line, seen] = [r.message for r in caplog.records if "nothing reads" in r.message]
    assert line.startswith("fields that nothing reads: id (3 rows), lang (2 rows), mood of messages (1 rows), volume")
    assert "mood" not in seen and "volume" not in seen


def test_columns_map_other_names(tmp_path):
    """Catches: a mapping that messages do not get, one of the wrong direction, a wrong name taken in silence."""
    folder = template_folder(tmp_path, CHATML)
    rows = [
        {"ask": "q1", "reply": "a1", "tools": "[3]"},
        {"dialog": [{"speaker": "user", "text": "q1"}, {"speaker": "bot", "text": "a1"}]},
    ]
    columns = "instruction=ask, output=reply,tools=,messages=dialog,role=speaker,content=text"
    wanted = examples(folder, [chat("q1", "a1")])[0][0]
    for example in examples(folder, rows, columns=columns):
        np.testing.assert_array_equal(example[0], wanted)
    assert parse_columns("") == {}
    with pytest.raises(UserError, match="has 'question_text=instruction', it wants ours=theirs: is it instruction="):
        parse_columns("question_text=instruction")
    with pytest.raises(UserError, match="has 'nonsense', it wants ours=theirs, ours is one of"):
        parse_columns("nonsense")
