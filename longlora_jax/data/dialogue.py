"""A conversation as text in which answers are marked, and that text as ids of which the answers alone are scored.

An answer is what a template writes after the prompt that asks for it, up to the token that ends it. Where the text of
an answer would melt into the last token of its prompt ("]" and "(" into "]("), the text is cut and the two are
tokenized apart, as in generation: a model that was given "]" can only go on with "(".
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora_jax.data.chat import folds_system, last_token, refusal
from longlora_jax.data.chat_template import ChatTemplate, Message, TemplateFault
from longlora_jax.data.rows import NEEDED_PLACES, Conversation, with_arguments
from longlora_jax.data.tokenizer import Tokenizer
from longlora_jax.errors import UserError

Example = tuple[np.ndarray, np.ndarray]  # ids and scored (1 where the token is a target), [tokens] int32 each

CONTEXT = 256  # characters before a part of a text that may have a say in its tokens


@dataclass(frozen=True)
class Dialogue:
    """The text of a conversation; turns: (first, end) characters of each scored answer and of what ends it.

    closed: nothing is to follow the text; if not, EOS is, and it is scored.
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


class Renderer:
    """Conversations under a template; tokens: those that may end an answer.

    last_turn_only: of answers, the last alone is learnt. notes: what was done with rows that no template takes as they
    are, counted.
    """

    def __init__(self, template: ChatTemplate, tokens: dict[str, int], *, last_turn_only: bool = False):
        self._template, self._tokens, self._last_turn_only = template, tokens, last_turn_only
        self._folds_system, self._wants_json = folds_system(template), _wants_json(template)
        self.notes: Counter[str] = Counter()

    def __call__(self, said: Conversation) -> list[Dialogue]:
        """The dialogues of a conversation: one, and one for each answer before which the template hides something that
        it shows while that answer is the last (Qwen3's earlier reasoning); none if there is nothing to learn.

        Raises TemplateFault if the template refuses the messages, has no place for a field, or if an answer does not
        follow the prompt that asks for it.
        """
        messages, scored = list(said.messages), list(said.scored)
        if self._wants_json:
            messages = [_with_json(message) for message in messages]
        while messages and not _is_answer(messages[-1]):
            messages.pop()
        learnt = [k for k, message in enumerate(messages) if _is_answer(message) and scored[k]]
        if self._last_turn_only:
            learnt = [k for k in learnt if k == len(messages) - 1]
        if not learnt:
            return []
        messages, kept = self._accepted(messages, said.variables)
        learnt = [kept.index(k) for k in learnt if k in kept]
        text = self._render(messages, said.variables)
        self._check_places(messages, said.variables, text)
        turns, apart, closed = [], [], True
        for k in learnt:
            upto = text if k == len(messages) - 1 else self._render(messages[: k + 1], said.variables)
            first = self._seam(messages, k, said.variables, upto)
            end, is_closed = self._end(upto, first, messages[k], k)
            if k < len(messages) - 1:
                end = self._end_within(text, upto, first, end, messages[k])
            if text.startswith(upto[:end]):
                turns.append((first, end))
                closed = is_closed if k == len(messages) - 1 else closed
            else:
                apart.append(Dialogue(upto, ((first, end),), is_closed))
        if self._folds_system and messages[0]["role"] == "system":
            self.notes["rows have their system message folded into the first question"] += 1
        self.notes[
            "answers are rows of their own, since the template shows less of them once they are not the last"
        ] += len(apart)
        return [*apart, *([Dialogue(text, tuple(turns), closed)] if turns else [])]

    def _render(self, messages: list[Message], variables: dict[str, Any], ask: bool = False) -> str:
        return self._template.render(messages, add_generation_prompt=ask, **variables)

    def _accepted(self, messages: list[Message], variables: dict[str, Any]) -> tuple[list[Message], list[int]]:
        """Messages as the template takes them, and which of the given ones each is."""
        fault, asked = refusal(self._template, messages, variables), int(messages[0]["role"] == "system")
        numbers = list(range(len(messages)))
        # ShareGPT's conversations often begin with an answer that nobody asked for.
        begin = next((k for k in numbers if messages[k]["role"] == "user"), asked)
        if not fault and asked and begin > asked and self._folds_system:
            fault = "the template has no place for a system message before an answer"
        if not fault:
            return messages, numbers
        rest = numbers[:asked] + numbers[begin:]
        accepted = [messages[k] for k in rest]
        if not refusal(self._template, accepted, variables):
            self.notes["rows are without their opening answer, which the template refuses"] += 1
            return accepted, rest
        if asked and not self._folds_system and not refusal(self._template, accepted[1:], variables):
            fault += "; data.fold_system=True puts a system message before the first question"
        raise TemplateFault(fault)

    def _check_places(self, messages: list[Message], variables: dict[str, Any], text: str) -> None:
        """Raises TemplateFault if a message, or a field of the row, changes nothing in what the template writes."""
        for k, message in enumerate(messages):
            if k and message["role"] in ("system", "tool") and message["content"].strip():
                if self._is_lost([*messages[:k], *messages[k + 1 :]], variables, text):
                    who = f"message {k + 1} is by {message['role']}"
                    raise TemplateFault(f"{who}, for which the template has no place: take a template that has")
        for name in variables.keys() & {"tools", "documents"}:
            if self._is_lost(messages, {n: v for n, v in variables.items() if n != name}, text):
                raise _no_place(name, "the row")
        for name in NEEDED_PLACES:
            k = max((k for k, m in enumerate(messages) if m.get(name)), default=-1)
            if k >= 0:
                here = messages[: k + 1]
                bare = [{key: v for key, v in m.items() if key != name} if m is messages[k] else m for m in here]
                if self._is_lost(bare, variables, self._render(here, variables)):
                    raise _no_place(name, f"message {k + 1}")

    def _is_lost(self, messages: list[Message], variables: dict[str, Any], text: str) -> bool:
        try:
            return self._render(messages, variables) == text
        except TemplateFault:
            return False

    def _seam(self, messages: list[Message], k: int, variables: dict[str, Any], upto: str) -> int:
        """Where answer k begins in the text that ends with it."""
        try:
            asked = self._render(messages[:k], variables, ask=True)
        except TemplateFault:
            if any(message["role"] == "user" for message in messages[:k]):
                raise
            asked = None  # many templates cannot render no message at all
        if asked is not None and upto.startswith(asked):
            return len(asked)
        content = messages[k]["content"].strip()
        if not any(m["role"] in ("user", "tool") for m in messages[:k]) and content and content in upto:
            return upto.rindex(content)  # an opening answer, which nothing asks for
        raise _other_prompt(k)

    def _end(self, upto: str, first: int, message: Message, k: int) -> tuple[int, bool]:
        """Where an answer and what ends it end in a text, and whether that is a token."""
        token = last_token(upto[first:], self._tokens)
        end = len(upto.rstrip()) if token else len(upto)
        # Spaces and line ends may be the template's.
        content = _squashed(message["content"])
        if content not in _squashed(upto[first:end]):
            raise _other_prompt(k)
        if token and content not in _squashed(upto[first : end - len(token)]):
            return len(upto), False  # the answer's own last word
        return end, bool(token)

    def _end_within(self, text: str, upto: str, first: int, end: int, message: Message) -> int:
        """Where an answer ends that is not the last: before a token that closes whole conversations (Phi-3's), which
        the text goes on without; `end` where that is no such token."""
        before = upto[first:end]
        before = before[: len(before) - len(last_token(before, self._tokens))].rstrip()
        token = last_token(before, self._tokens)
        holds = bool(token) and _squashed(message["content"]) in _squashed(before[: len(before) - len(token)])
        return first + len(before) if holds and not text.startswith(upto[:end]) else end


def _other_prompt(k: int) -> TemplateFault:
    return TemplateFault(f"message {k + 1} does not follow its prompt in what the template writes")


def _no_place(name: str, where: str) -> TemplateFault:
    return TemplateFault(
        f"{where} has {name}, for which the template has no place: take a template that has, or leave it out with "
        f"data.columns={name}="
    )


def _wants_json(template: ChatTemplate) -> bool:
    """Whether a template writes the arguments of calls as they are (DeepSeek's), and so wants a text in JSON."""

    def shown(arguments: Any) -> str:
        call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": arguments}}
        asked = {"role": "user", "content": "Is it so?"}
        try:
            return template.render([asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except TemplateFault:
            return ""

    as_object, as_text = shown({"k": "v"}), shown('{"k": "v"}')
    return '{"k": "v"}' in as_text and '{"k": "v"}' not in as_object


def _with_json(message: Message) -> Message:
    """A message whose calls have their arguments as a text in JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [with_arguments(call, _as_json) for call in calls]}


def _as_json(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _squashed(text: str) -> str:
    return "".join(text.split())


def _is_answer(message: Message) -> bool:
    said = message["content"].strip() or any(message.get(name) for name in NEEDED_PLACES)
    return message["role"] == "assistant" and bool(said)


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
