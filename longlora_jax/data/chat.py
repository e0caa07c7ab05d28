"""How a model is asked and what ends its answers: one value for training, generation, evaluation and every export.

A run begins under a ChatFormat, which is saved in its workdir. Whoever asks a model afterwards, whichever folder it
lies in, gets this value back: from the workdir, or from the files that transformers reads (chat_template.jinja,
generation_config.json, tokenizer_config.json), into which an export writes it.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from longlora_jax.config import DataConfig
from longlora_jax.data.chat_template import (
    FIXED_DAY,
    ChatTemplate,
    Message,
    TemplateFault,
    load_chat_template,
    special_tokens,
    template_source,
)
from longlora_jax.data.tokenizer import Tokenizer, load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.fields import from_dict
from longlora_jax.files import read_json, write_json, write_text

RUN_FILE = "chat_format.json"  # in a workdir
GENERATION = "generation_config.json"
# The prompt of the paper's own models (LongAlpaca), byte for byte, its doubled and lone spaces included; the answer
# follows at once, and EOS follows the answer. A system message takes the place of its system text, and further turns
# are Llama-2's: each begins anew with BOS.
LLAMA2_SYSTEM = """You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while \
being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal \
content. Please ensure that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information."""
_ALPACA = """{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
  {%- set system, turns = SYSTEM, messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('questions and answers must take turns, and a question is the first') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- BOS + '[INST] ' -}}
    {%- if loop.first -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>> \\n\\n ' -}}{%- endif -%}
    {{- message['content'] + ' [/INST]' -}}
  {%- else -%}
    {{- message['content'] + EOS -}}
  {%- endif -%}
{%- endfor -%}
"""
_SYSTEM = """{%- if not messages or messages[0]['role'] != 'system' -%}
  {%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages -%}
{%- endif -%}
"""


# Before a template that has no place for a system message: it goes before the first question.
_FOLD = """{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set folding = namespace(system=messages[0]['content'], turns=[]) -%}
  {%- for message in messages[1:] -%}
    {%- if message['role'] == 'user' and folding.system is not none -%}
      {%- set content = folding.system + '\\n\\n' + message['content'] -%}
      {%- set folding.turns = folding.turns + [{'role': 'user', 'content': content}] -%}
      {%- set folding.system = none -%}
    {%- else -%}
      {%- set folding.turns = folding.turns + [message] -%}
    {%- endif -%}
  {%- endfor -%}
  {%- set messages = folding.turns -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatFormat:
    """What a model is asked under, and what ends its answers.

    template: Jinja's source, "" where texts are asked as they are. special: what it may call bos_token and so on.
    end_ids: tokens that end an answer, the one of the template first. end_token: that one's text, "" if there is none.
    stops: texts that end an answer where the template closes it by a text that is no token.
    """

    template: str = ""
    special: dict[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()
    end_token: str = ""
    stops: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.template)

    def compiled(self, today: datetime | None = None) -> ChatTemplate:
        """The template, for which today is that day (None: the clock's); raises UserError if there is none."""
        if not self.template:
            raise UserError("the model has no chat template: give one that has, or a text to go on with")
        return _compiled(self.template, tuple(sorted(self.special.items())), today)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of messages, up to where the next answer begins; raises UserError if the template refuses them."""
        try:
            return self.compiled().render(list(messages), add_generation_prompt=add_generation_prompt)
        except TemplateFault as error:
            raise UserError(f"the model's chat template refuses: {error}") from error

    def ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
        """The ids [tokens] of what asks for the next answer, as transformers' apply_chat_template gives them."""
        return tokenizer.encode_batch([self.render(messages)], add_bos=False)[0]


@functools.lru_cache(maxsize=8)
def _compiled(source: str, special: tuple[tuple[str, str], ...], today: datetime | None) -> ChatTemplate:
    return ChatTemplate(source, dict(special), today)


# Found


def folder_format(folder: str) -> ChatFormat:
    """That of a folder as transformers would use it: its template, and the ids that its configs call EOS."""
    return ChatFormat(template_source(folder), special_tokens(folder), _configured_ends(folder))


def _configured_ends(folder: str) -> tuple[int, ...]:
    found: Any = None
    for name in (GENERATION, "config.json"):
        file = os.path.join(folder, name)
        if found is None and os.path.isfile(file):
            found = read_json(file).get("eos_token_id")
    found = found if isinstance(found, list) else [found]
    return tuple(i for i in found if type(i) is int and i >= 0)


def adapter_format(folder: str, base: str) -> ChatFormat:
    """That of an adapter whose tokenizer lies in `folder`; base: the model's folder, whose ends stay beside its own.

    Without configs of its own an adapter ends answers by its tokenizer's EOS.
    """
    found = folder_format(folder)
    if folder == base or found.end_ids:
        return found
    tokenizer = load_tokenizer(folder)
    ends = dict.fromkeys(i for i in (tokenizer.eos_id, *_configured_ends(base)) if i is not None)
    return replace(found, end_ids=tuple(ends))


def run_format(parts: Sequence[DataConfig], model_folder: str) -> ChatFormat:
    """What a run on these data trains under; model_folder: its base, "" for none. Raises UserError.

    Data of instructions decide by their prompt, and the token that ends their answers comes before those of the base.
    """
    folder = parts[0].tokenizer or model_folder
    base = folder_format(folder) if folder else ChatFormat()
    ends = _configured_ends(model_folder) if model_folder else ()
    ends = ends or base.end_ids
    chats = next((data for data in parts if data.task == "sft"), None)
    if chats is None:
        return ChatFormat(base.template, base.special, ends)
    tokenizer = load_tokenizer(chats.tokenizer or folder)
    template = load_prompt(chats, chats.tokenizer or folder, tokenizer)
    token, stop = closing_of(template, tokenizer)
    first = next((i for t, i in tokenizer.added_tokens().items() if t.strip() == token), tokenizer.eos_id)
    ends = tuple(dict.fromkeys(i for i in (first, *ends) if i is not None))
    special = special_tokens(chats.tokenizer or folder)
    return ChatFormat(template.source, special, ends, token, (stop,) if stop else ())


def load_prompt(data: DataConfig, folder: str, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """The template that data.prompt names: "chat", the tokenizer's own, or "alpaca", LongLoRA's prompt.

    folder: of the tokenizer. data.add_bos: LongLoRA's begins with BOS where the tokenizer adds one. data.system: what
    messages without a system message have for one. data.fold_system: where the template has no place for that, it goes
    before the first question. Every day is FIXED_DAY. Raises UserError.
    """
    chats = data.prompt == "chat"
    template = load_chat_template(folder, FIXED_DAY) if chats else _longlora_prompt(folder, tokenizer, data.add_bos)

    def with_before(source: str) -> ChatTemplate:
        return ChatTemplate(source + template.source, special_tokens(folder), FIXED_DAY)

    def fault_of(system: str) -> str:
        return refusal(template, [{"role": "system", "content": system}, {"role": "user", "content": _PROBES[0]}])

    if data.fold_system and fault_of("Be brief."):
        template = with_before(_FOLD)
    if data.system:
        if fault := fault_of(data.system):
            raise UserError(f"data.system: {fault}; data.fold_system=True puts it before the first question")
        template = with_before(_SYSTEM.replace("SYSTEM", _literal(data.system)))
    return template


def folds_system(template: ChatTemplate) -> bool:
    """Whether a template of load_prompt puts system messages before the first question."""
    return _FOLD in template.source


def refusal(template: ChatTemplate, messages: list[Message], variables: dict[str, Any] | None = None) -> str:
    """Why a template does not take messages and what else it is given (ChatTemplate.render), "" if it does."""
    try:
        template.render(messages, **(variables or {}))
    except TemplateFault as fault:
        return str(fault)
    return ""


def _longlora_prompt(folder: str, tokenizer: Tokenizer | None, add_bos: bool) -> ChatTemplate:
    tokenizer = tokenizer or load_tokenizer(folder)
    special = special_tokens(folder)
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end of text to close answers: set eos_token beside it")
    adds_bos = tokenizer.bos_id is not None and list(tokenizer.encode("")[:1]) == [tokenizer.bos_id]
    names = {"SYSTEM": _literal(LLAMA2_SYSTEM), "BOS": "bos_token" if add_bos and adds_bos else "''"}
    # A token that is not found in a text cannot stand in the template: EOS then follows the text.
    names["EOS"] = "eos_token" if special.get("eos_token") in tokenizer.added_tokens() else "''"
    source = _ALPACA
    for name, value in names.items():
        source = source.replace(name, value)
    return ChatTemplate(source, special, FIXED_DAY)


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


_PROBES = ("Is it so?", "So it is.")


def closing_of(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, str]:
    """What a template writes after an answer: (its last token, or ""; where that is none, the text, or "")."""
    question, answer = ({"role": r, "content": c} for r, c in zip(("user", "assistant"), _PROBES, strict=True))
    for before in ([], [{"role": "system", "content": "Be brief."}]):
        try:
            text = template.render([*before, question, answer])
        except TemplateFault:
            continue
        _, found, rest = text.rpartition(_PROBES[1])
        if found:
            token = last_token(rest, tokenizer.added_tokens())
            return token, "" if token else rest.strip()
    return "", ""


def last_token(text: str, tokens: dict[str, int]) -> str:
    """The longest of the tokens with which a text ends, but for blanks; "" if there is none."""
    text = text.rstrip()
    return max((t for t in tokens if t.strip() and text.endswith(t.strip())), key=len, default="").strip()


# Kept


def save_format(workdir: str, chat: ChatFormat) -> None:
    """Writes what a run trains under into its workdir."""
    write_json(os.path.join(workdir, RUN_FILE), asdict(chat))


def saved_format(workdir: str) -> ChatFormat | None:
    """What save_format wrote; None in a workdir of an earlier version. Raises UserError if it is damaged."""
    path = os.path.join(workdir, RUN_FILE)
    if not os.path.isfile(path):
        return None
    content = read_json(path)
    try:
        return from_dict(ChatFormat, content)
    except (UserError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it is made again of the run's config") from error


def export_format(folder: str, chat: ChatFormat) -> None:
    """Writes it into a folder of tokenizer files and configs, for transformers and all that read its files.

    Nothing changes in a folder that says the same already.
    """
    if chat.template and chat.template != template_source(folder):
        write_text(os.path.join(folder, "chat_template.jinja"), chat.template)
        _change(folder, "tokenizer_config.json", chat_template=None)
    # Programs that do not read generation_config.json end at EOS; but a template that spells it must keep it.
    if chat.end_token and "eos_token" not in chat.template:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            _change(folder, name, eos_token=chat.end_token)
    if chat.end_ids:
        ends = chat.end_ids[0] if len(chat.end_ids) == 1 else list(chat.end_ids)
        for name in (GENERATION, "config.json"):
            _change(folder, name, eos_token_id=ends)


def _change(folder: str, name: str, **fields: Any) -> None:
    """Sets fields of a JSON file, if it is there and says something else; None takes a field out."""
    path = os.path.join(folder, name)
    content = read_json(path) if os.path.isfile(path) else {}
    changed = {key: value for key, value in {**content, **fields}.items() if key not in fields or value is not None}
    if content and changed != content:
        write_json(path, changed)


# Asked


def stop_ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The ids of those texts that have a special token in them, which the text of an answer never shows."""
    special = tokenizer.special_tokens()
    shown = [text for text in texts if any(token.strip() in text for token in special if token.strip())]
    return [tuple(map(int, ids)) for ids in tokenizer.encode_batch(shown, add_bos=False) if len(ids)] if shown else []


def ends_with_any(tokens: Sequence[int], ends: Sequence[tuple[int, ...]]) -> bool:
    """Whether tokens end with one of the sequences."""
    return any(tuple(tokens[-len(end) :]) == end for end in ends)


def has_chat_template(tokenizer_dir: str) -> bool:
    """Whether the folder of a tokenizer has a chat template."""
    return Path(tokenizer_dir).is_dir() and bool(template_source(tokenizer_dir))


def render_chat(tokenizer_dir: str, messages: list[Message], add_generation_prompt: bool = False) -> str:
    """The text of messages under the template of a tokenizer's folder; see ChatFormat.render."""
    try:
        return load_chat_template(tokenizer_dir).render(messages, add_generation_prompt=add_generation_prompt)
    except TemplateFault as error:
        raise UserError(f"the chat template of {tokenizer_dir} refuses: {error}") from error
