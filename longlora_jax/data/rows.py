"""Rows of instructions as conversations: the one table of what a row may hold, and what becomes of it.

A field that is known is used as its own trainers use it. One that is not is counted, for the log to name, and a row
that cannot be used as it is says which field is in the way.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from longlora_jax.data.chat_template import Message
from longlora_jax.errors import UserError
from longlora_jax.files import load_json, one_line

ANSWERS = ("output", "response", "completion", "answer")
SYSTEM = ("system", "system_prompt")
BESIDE = (*SYSTEM, "tools", "documents", "chat_template_kwargs")
# form: the field that a row is known by, and those that it may have beside it. FIELDS of prompts and answers are texts;
# a prompt, and its answer, may be messages as well.
FORMS: dict[str, tuple[str, ...]] = {
    "messages": BESIDE,  # OpenAI, TRL
    "conversations": BESIDE,  # ShareGPT
    "conversation": BESIDE,
    "instruction": ("input", "context", "history", *ANSWERS, *BESIDE),  # Alpaca, LongAlpaca, Dolly
    "prompt": ("history", *ANSWERS, *BESIDE),
    "question": ("context", "history", *ANSWERS, *BESIDE),  # OpenOrca, and what evals.longqa reads
}
# Which roles are which, by the names of OpenAI, ShareGPT and LLaMA-Factory.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
}
SCORED = ("weight", "train", "training", "loss")  # OpenAI's, axolotl's, ms-swift's: whether an answer is learnt
# Of a message, beside its role and text: what templates have places for.
PLACES = ("tool_calls", "reasoning_content", "reasoning", "thinking", "tool_call_id", "name")
NEEDED_PLACES = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # without which an answer is another one
# What chat_template_kwargs may not set: the renderer does.
NOT_VARIABLES = ("messages", "tools", "add_generation_prompt")


class Malformed(ValueError):
    """A row that is no conversation: what it lacks."""


@dataclass
class Conversation:
    """What a row says: messages as a template takes them, and of each whether it is learnt where it is an answer.

    variables: what else the template is given, such as tools. unknown: fields that nobody reads.
    """

    messages: list[Message]
    scored: list[bool]
    variables: dict[str, Any] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)


def parse_columns(text: str) -> dict[str, str]:
    """{their name: ours} out of DataConfig.columns, "ours=theirs,..."; ours is "" for a field to be left out.

    Raises UserError.
    """
    known = {*FORMS, *(name for names in FORMS.values() for name in names), *SCORED, *PLACES}
    known |= {"role", "content", "from", "value"}
    columns = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        ours, found, theirs = (part.strip() for part in pair.partition("="))
        if not found or ours not in known:
            swapped = f": is it {theirs}={ours}?" if theirs in known else f", ours is one of {', '.join(sorted(known))}"
            raise UserError(f"data.columns has {one_line(pair, 50)!r}, it wants ours=theirs{swapped}")
        columns[theirs or ours] = ours if theirs else ""
    return columns


def conversation_of(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Conversation:
    """The conversation of a row in one of FORMS. Raises Malformed, which names the field that is in the way.

    columns: other names of fields and what they stand for, of rows and of messages (see parse_columns).
    """
    row = _renamed(row, columns or {})
    form = next((name for name in FORMS if name in row), "")
    if not form:
        fields = one_line(", ".join(map(str, row)), 200) or "no field"
        raise Malformed(
            f"it has {fields}: a conversation has messages, conversations, instruction and output, or prompt and "
            "completion; data.columns says which columns are these"
        )
    found = Conversation([], [])
    found.unknown.update(str(name) for name in row if name != form and name not in FORMS[form])
    if isinstance(row[form], list) or form in ("messages", "conversations", "conversation"):
        _add(found, row[form], form, columns or {})
    else:
        for turn in _history(row):
            _say(found, *turn)
        _say(found, "user", _question(row, form))
    if form not in ("messages", "conversations", "conversation"):
        name = next((name for name in ANSWERS if name in row), "completion" if form == "prompt" else "output")
        if isinstance(row.get(name), list):
            _add(found, row[name], name, columns or {})
        else:
            _say(found, "assistant", _text(row, name))
        # A row has one answer: another one is somebody else's.
        found.unknown.update(other for other in ANSWERS if other in row and other != name)
    _put_system(found, row)
    _put_variables(found, row)
    return found


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages of conversation_of(row)."""
    return conversation_of(row).messages


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    # A field that is null is as if it were not there: tables of rows of several forms have all the fields in each.
    renamed = {columns.get(name, name): value for name, value in values.items() if value is not None}
    renamed.pop("", None)
    return renamed


def _say(found: Conversation, role: str, content: str) -> None:
    found.messages.append({"role": role, "content": content})
    found.scored.append(True)


def _question(row: dict[str, Any], form: str) -> str:
    question = _text(row, form)
    if row.get("context"):  # as evals.longqa asks, and the chat page
        question = f"{_text(row, 'context')}\n\n{question}"
    if row.get("input"):  # as LongLoRA joins the two
        question += f" \n{_text(row, 'input')}"
    return question


def _history(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Earlier turns, [[question, answer], ...], which are learnt as the last one is."""
    turns = []
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list | tuple) else [history], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Malformed(f"turn {number} of 'history' is no pair of a question and its answer")
        turns += zip(("user", "assistant"), pair, strict=True)
    return turns


def _add(found: Conversation, turns: Any, name: str, columns: Mapping[str, str]) -> None:
    if not isinstance(turns, list) or not turns:
        raise Malformed(f"the field {name!r} is no list of messages")
    for number, turn in enumerate(turns, 1):
        where = f"message {number} of {name!r}"
        if not isinstance(turn, dict):
            raise Malformed(f"{where} is no object")
        turn = _renamed(turn, columns)
        who, what = ("role", "content") if "role" in turn else ("from", "value")
        said = turn.get(who)
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            shown = one_line(repr(said), 50)
            raise Malformed(f"{where} is by {shown}: {who!r} is one of {', '.join(ROLES)}")
        more = {key: value for key, value in turn.items() if key not in (who, what, *SCORED)}
        content = _content(turn.get(what), where, what, any(map(more.get, (*NEEDED_PLACES, "function_call"))))
        if said == "function_call" or "function_call" in more:
            call = more.pop("function_call", content)
            more["tool_calls"] = [{"type": "function", "function": _call(call, where)}]
            content = "" if said == "function_call" else content
        if isinstance(more.get("tool_calls"), list):
            more["tool_calls"] = [with_arguments(call, _as_object) for call in more["tool_calls"]]
        found.messages.append({"role": role, "content": content, **more})
        found.scored.append(all(_is_scored(turn, key, where) for key in SCORED))


def _content(content: Any, where: str, what: str, more: bool) -> str:
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is None and more:  # a call of a tool, or a thought, is an answer as well
        return ""
    if not isinstance(content, str):
        raise Malformed(f"{where} has no text in {what!r}")
    return content


def _call(call: Any, where: str) -> dict[str, Any]:
    if isinstance(call, str):
        try:
            call = load_json(call)
        except ValueError:
            call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Malformed(f"{where} is a function_call that is no JSON of a name and its arguments")
    return call


def with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """A call of a tool, {"function": {"name", "arguments"}} or what is inside alone, with its arguments changed."""
    if isinstance(call, dict) and "function" in call:
        return call | {"function": with_arguments(call["function"], change)}
    return call | {"arguments": change(call["arguments"])} if isinstance(call, dict) and "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    """Arguments as templates spell them: OpenAI has them as a text in JSON."""
    try:
        given = load_json(arguments) if isinstance(arguments, str) else None
    except ValueError:
        given = None
    return given if isinstance(given, dict) else arguments


def _is_scored(turn: dict[str, Any], key: str, where: str) -> bool:
    value = turn.get(key, True)
    if value not in (0, 1):
        raise Malformed(f"{where} has {key}={one_line(repr(value), 30)}: it must be 0 or 1, false or true")
    return bool(value)


def _put_system(found: Conversation, row: dict[str, Any]) -> None:
    for name in SYSTEM:
        if not (text := _text(row, name) if name in row else "").strip():
            continue
        first = found.messages[0]
        if first["role"] != "system":
            found.messages.insert(0, {"role": "system", "content": text})
            found.scored.insert(0, True)
        elif first["content"] != text:
            raise Malformed(f"it has a system message twice, in {name!r} and before: leave one of them out")


def _put_variables(found: Conversation, row: dict[str, Any]) -> None:
    for name in ("tools", "documents"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = load_json(value)
            except ValueError:
                raise Malformed(f"the field {name!r} is no JSON") from None
        if not value or isinstance(value, str):
            continue
        if not isinstance(value, list):
            raise Malformed(f"the field {name!r} is no list")
        found.variables[name] = value
    more = row.get("chat_template_kwargs") or {}
    if not isinstance(more, dict):
        raise Malformed("the field 'chat_template_kwargs' is no object")
    found.variables |= {name: value for name, value in more.items() if name not in NOT_VARIABLES}


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(value := row.get(name), str):
        raise Malformed(f"the field {name!r} is no text" if name in row else f"the field {name!r} is missing")
    return value
