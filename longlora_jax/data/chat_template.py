"""The chat template of a tokenizer's folder, rendered as transformers renders it, without transformers.

Templates come with models from strangers: they are programs in Jinja's sandbox, under a limit of time and length.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from longlora_jax.errors import UserError
from longlora_jax.files import one_line, read_json

RENDER_SECONDS = 10  # a conversation of a million words takes milliseconds
RENDER_FACTOR, RENDER_EXTRA = (
    4,
    100_000,
)  # a rendering has at most so many characters: factor * what it is given + extra
TEMPLATE_LIMIT = 1_000_000  # bytes
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

Message = dict[str, str]


class TemplateFault(ValueError):
    """What a template makes of a conversation: a refusal, an error, or too much."""


class ChatTemplate:
    """A chat template; render() gives the text of a conversation.

    special: what the template may call bos_token, eos_token and so on. Raises UserError if it is not Jinja.
    """

    writes_bos = True  # where the text is to have it

    def __init__(self, source: str, special: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
        self._special = special
        try:
            with _time_limit():
                self._template = environment.from_string(source)
        except Exception as error:  # syntax, but also recursion, or a fold of constants that fails
            raise UserError(f"the chat template is not one that Jinja reads: {one_line(str(error), 200)}") from error

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of messages {role, content}; with add_generation_prompt up to where the next answer begins.

        variables: what else the template reads. Raises TemplateFault if it refuses, fails, or passes the limits.
        """
        limit = RENDER_EXTRA + RENDER_FACTOR * sum(len(m["content"]) for m in messages)
        given: dict[str, Any] = {**self._special, "messages": [dict(m) for m in messages], "tools": None}
        given |= {"documents": None, "add_generation_prompt": add_generation_prompt, **variables}
        pieces, length = [], 0
        try:
            with _time_limit():
                for piece in self._template.generate(given):
                    pieces.append(piece)
                    length += len(piece)
                    if length > limit:
                        raise TemplateFault(f"it makes more than {limit:,} characters of the messages")
        except TemplateFault:
            raise
        except Exception as error:  # a template is a program, it can fail in any way
            raise TemplateFault(one_line(str(error) or type(error).__name__, 200)) from error
        return "".join(pieces)


def load_chat_template(folder: str) -> ChatTemplate:
    """The chat template in a tokenizer's folder: chat_template.jinja, or else that of tokenizer_config.json.

    Raises UserError if there is none.
    """
    config_path, jinja_path = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
    config = read_json(str(config_path)) if config_path.exists() else {}
    source = config.get("chat_template")
    if jinja_path.is_file():
        with jinja_path.open("rb") as file:
            source = file.read(TEMPLATE_LIMIT + 1).decode("utf-8", errors="replace")
    if isinstance(source, list):  # several by name, for tools or retrieval beside plain chats
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str) or not source:
        raise UserError(
            f"the tokenizer in {folder} has no chat template: set data.prompt=alpaca, "
            "or put the model's chat_template.jinja beside it"
        )
    if len(source) > TEMPLATE_LIMIT:
        raise UserError(f"the chat template in {folder} is longer than {TEMPLATE_LIMIT:,} characters: fetch it again")
    contents = {name: t["content"] if isinstance(t := config.get(name), dict) else t for name in SPECIAL}
    return ChatTemplate(source, {name: t for name, t in contents.items() if isinstance(t, str)})


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, by which some templates mark answers: what is inside, as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names in underscores, which lead to Python's insides."""

    def __init__(*args, **kwargs):  # no named parameter: namespace(self=...) is legal
        for name in (fields := dict(*args[1:], **kwargs)):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(args[0], fields)

    def __setitem__(self, name, value):
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no field {name!r}")


def _raise(message):
    raise jinja2.exceptions.TemplateError(message)


def _now(form):
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes what HTML must not hold, and models were not trained on that.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises TemplateFault in what it holds after RENDER_SECONDS. Threads, and Windows, have no alarm and no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TemplateFault(f"it takes more than {RENDER_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
