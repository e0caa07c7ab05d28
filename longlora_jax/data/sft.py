"""Conversations as training examples: rendered and tokenized as at inference, and the answers alone are scored.

The ids of an example are those of its whole text, and those of a prompt in it are the ones that a model is given when
it is to answer: nothing of a prompt is scored, and the token that ends an answer is. Where the text of an answer would
melt into the last token of its prompt ("]" and "(" into "]("), the text is cut and the two are tokenized apart, as in
generation: a model that was given "]" can only go on with "(".
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from longlora_jax.data.chat_template import FIXED_DAY, Message, TemplateFault, load_chat_template
from longlora_jax.data.formats import Reading, Row
from longlora_jax.data.tokenizer import Tokenizer
from longlora_jax.errors import UserError
from longlora_jax.files import one_line

log = logging.getLogger(__name__)

Example = tuple[np.ndarray, np.ndarray]  # ids and scored (1 where the token is a target), [tokens] int32 each

ROWS_AT_ONCE = 64  # enough to keep every core of the tokenizers library busy
CONTEXT = 256  # characters before a part of a text that may have a say in its tokens
LEAD = 100  # characters that a template may put between its generation prompt and the answer (" ", "<think></think>")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# The prompt of the paper's own models (LongAlpaca), byte for byte, its doubled and lone spaces included; the answer
# follows at once, and EOS follows the answer.
LLAMA2_PROMPT = """[INST] <<SYS>>
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your \
answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure \
that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information.
<</SYS>> \n\n {instruction} [/INST]"""


class Prompt(Protocol):
    """How a conversation becomes text; writes_bos: BOS is part of that text, where it is wanted."""

    writes_bos: bool

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of messages; with add_generation_prompt up to where the next answer begins."""
        ...


class Llama2Prompt:
    """LongLoRA's Llama-2 prompt: one question, one answer, and its own system text."""

    writes_bos = False

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """See Prompt. Raises TemplateFault if there is more than a question and its answer."""
        roles = [m["role"] for m in messages]
        if roles not in (["user"], ["user", "assistant"]):
            raise TemplateFault(f"prompt=alpaca holds a question and its answer, not {', '.join(roles) or 'nothing'}")
        return LLAMA2_PROMPT.format(instruction=messages[0]["content"]) + "".join(m["content"] for m in messages[1:])


def load_prompt(prompt: str, tokenizer_folder: str) -> Prompt:
    """The prompt of a name out of config.DATA_CHOICES: "chat", the tokenizer's own template, or "alpaca"."""
    return load_chat_template(tokenizer_folder, FIXED_DAY) if prompt == "chat" else Llama2Prompt()


def read_examples(
    rows: Iterable[Row], reading: Reading, tokenizer: Tokenizer, prompt: Prompt, *, add_bos: bool = True
) -> Iterator[Example]:
    """Yields an example of each row that makes one, in order; one line of the log counts the others by reason.

    Rows without an answer are left out; those that are no conversation, or that the template refuses, are bad rows (see
    Reading). Every example has a target: at least the token that ends its last answer.
    add_bos: begin with BOS where the tokenizer adds one; a chat template alone says whether its text has BOS.
    Raises UserError if no row makes an example.
    """
    counts, tokens, scored = Counter(), 0, 0
    adds_bos = tokenizer.bos_id is not None and list(tokenizer.encode("")[:1]) == [tokenizer.bos_id]
    begin = np.array([tokenizer.bos_id] if add_bos and adds_bos and not prompt.writes_bos else [], np.int32)
    closing = _closing(tokenizer)
    rows = iter(rows)
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        counts["rows"] += len(chunk)
        dialogues = []
        for row in chunk:
            try:
                dialogue = render_dialogue(messages_of(row.value), prompt, closing)
            except (TemplateFault, Malformed) as fault:
                reading.bad(row.where, str(fault))
                counts["malformed"] += 1
            else:
                dialogues += [dialogue] if dialogue.turns else []
                counts["without an answer"] += not dialogue.turns
        for ids, is_scored in encode_dialogues(dialogues, tokenizer):
            example = np.concatenate([begin, ids]), np.concatenate([np.zeros_like(begin), is_scored])
            counts["examples"] += 1
            tokens, scored = tokens + len(example[0]), scored + int(example[1].sum())
            yield example
    number, made = counts.pop("rows", 0), counts.pop("examples", 0)
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in counts.items() if n) or "none"
    if not made:
        raise UserError(f"none of {number:,} rows makes an example: {left_out}; give rows that hold answers")
    log.info(
        "%s rows make %s examples of %s tokens, %s of them scored; left out: %s",
        *(f"{n:,}" for n in (number, made, tokens, scored)),
        left_out,
    )


class Malformed(ValueError):
    """A row that is no conversation: what it lacks."""


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The messages {role, content} of a row; roles are system, user and assistant.

    The forms are {messages: [{role, content}]}, ShareGPT's {conversations: [{from, value}]}, LongAlpaca's
    {instruction, output, input: optional} and {prompt, completion or response}, texts or lists of messages.
    Raises Malformed.
    """
    # A field that is null is as if it were not there: tables of rows of several forms have all the fields in each.
    row = {name: value for name, value in row.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in row:
            return _messages(row[name], name)
    if "instruction" in row:
        question, more = _text(row, "instruction"), row.get("input")
        # As LongLoRA joins the two.
        question += f" \n{_text(row, 'input')}" if more else ""
        return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]
    if "prompt" in row:
        name = next((name for name in ("completion", "response") if name in row), "completion")
        question, answer = row["prompt"], row.get(name)
        if not isinstance(question, list):
            question = [{"role": "user", "content": _text(row, "prompt")}]
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": _text(row, name)}]
        return [*_messages(question, "prompt"), *_messages(answer, name)]
    fields = one_line(", ".join(map(str, row)), 200) or "no field"
    raise Malformed(
        f"it has {fields}: a conversation has messages, conversations, instruction and output, or prompt and completion"
    )


def _messages(turns: Any, name: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise Malformed(f"the field {name!r} is no list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Malformed(f"message {number} of {name!r} is no object")
        who, what = ("role", "content") if "role" in turn else ("from", "value")
        role = ROLES.get(said) if isinstance(said := turn.get(who), str) else None
        if role is None:
            shown = one_line(repr(said), 50)
            raise Malformed(f"message {number} of {name!r} is by {shown}: {who!r} is one of {', '.join(ROLES)}")
        content = turn.get(what)
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Malformed(f"message {number} of {name!r} has no text in {what!r}")
        messages.append({"role": role, "content": content})
    return messages


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(value := row.get(name), str):
        raise Malformed(f"the field {name!r} is no text" if name in row else f"the field {name!r} is missing")
    return value


@dataclass(frozen=True)
class Dialogue:
    """The text of a conversation; turns: (first, end) characters of each answer and of what ends it.

    closed: the template ends the last answer by a special token; if not, EOS is to follow the text.
    """

    text: str
    turns: tuple[tuple[int, int], ...]
    closed: bool

    def parts(self) -> Iterator[tuple[int, int, bool]]:
        """(first, stop) characters of all parts in order, and whether each is an answer."""
        done = 0
        for first, end in self.turns:
            yield done, first, False
            yield first, end, True
            done = end
        yield done, len(self.text), False


def render_dialogue(messages: list[Message], prompt: Prompt, closing: re.Pattern[str]) -> Dialogue:
    """A conversation as text; an answer is what follows the prompt that asks for it, up to the token that ends it.

    closing: matches blanks and the special token after an answer. Blank answers are no turns, and what comes after the
    last turn is left out. Raises TemplateFault if the template refuses the messages, or if an answer does not follow
    the prompt that asks for it.
    """
    while messages and not _is_answer(messages[-1]):
        messages = messages[:-1]
    if not messages:
        return Dialogue("", (), True)
    text, turns = prompt.render(messages), []
    for number, message in enumerate(messages):
        if not _is_answer(message):
            continue
        asked = prompt.render(messages[:number], add_generation_prompt=True)
        bare, end = _ends_of_answer(text, len(asked), message["content"], closing)
        if not text.startswith(asked) or bare < 0:
            raise TemplateFault(f"message {number + 1} does not follow its prompt in what the template writes")
        turns.append((len(asked), bare, end))
    if turns[-1][2] >= 0:
        return Dialogue(text, tuple((first, max(bare, end)) for first, bare, end in turns), True)
    # What stands after an earlier answer is the next question's. EOS will follow all that the template has written.
    turns[-1] = (turns[-1][0], len(text), -1)
    return Dialogue(text, tuple((first, bare) for first, bare, _ in turns), False)


def _ends_of_answer(text: str, seam: int, content: str, closing: re.Pattern[str]) -> tuple[int, int]:
    """Where an answer that begins near seam ends in the text, without and with its special token; -1: nowhere."""
    answer, limit = content.strip(), seam + len(content) + LEAD  # many templates strip it
    for found in closing.finditer(text, seam + len(answer), limit + LEAD):
        if text.endswith(answer, seam, found.start()):
            return found.start(), found.end()
    at = text.find(answer, seam, limit)
    return (at + len(answer) if at >= 0 else -1), -1


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _closing(tokenizer: Tokenizer) -> re.Pattern[str]:
    # The longest first, or "<|end|>" would hide "<|end|>x"; a tokenizer without any closes nothing. A run of blanks is
    # looked at once and as a whole, also those that a token begins with.
    tokens = sorted({t.lstrip() for t in tokenizer.special_tokens()} - {""}, key=len, reverse=True)
    return re.compile(rf"(?<!\s)\s*+(?:{'|'.join(map(re.escape, tokens))})" if tokens else r"(?!)")


def encode_dialogues(dialogues: list[Dialogue], tokenizer: Tokenizer) -> Iterator[Example]:
    """Yields the example of each, without BOS but for what the text spells; see the module on the seams."""
    texts = []
    for dialogue in dialogues:
        for first, stop, _ in dialogue.parts():
            before = dialogue.text[max(0, first - CONTEXT) : first]
            texts += [before, before + dialogue.text[first:stop]]
    encoded = iter(tokenizer.encode_batch(texts, add_bos=False))
    for dialogue in dialogues:
        ids, scored = [], []
        for first, stop, is_answer in dialogue.parts():
            before, both = next(encoded), next(encoded)
            if np.array_equal(both[: len(before)], before):
                part = both[len(before) :]
            else:
                part = _encode_after_a_cut(dialogue.text[first:stop], tokenizer)
            ids.append(part)
            scored.append(np.full(len(part), is_answer, np.int32))
        if not dialogue.closed:
            if tokenizer.eos_id is None:
                raise UserError("the tokenizer names no end of text to close answers: set eos_token beside it")
            ids.append(np.array([tokenizer.eos_id], np.int32))
            scored.append(np.ones(1, np.int32))
        yield np.concatenate(ids), np.concatenate(scored)


def _encode_after_a_cut(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a text that goes on, not of one that begins, before which sentencepiece puts a space."""
    for before in ("\n", "x", "."):
        alone, both = tokenizer.encode_batch([before, before + text], add_bos=False)
        if np.array_equal(both[: len(alone)], alone):
            return both[len(alone) :]
    return tokenizer.encode_batch([text], add_bos=False)[0]
