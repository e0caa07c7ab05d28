"""The chat template of a tokenizer's folder: Jinja's sandbox as transformers sets it up, and limits that both lack.

Ours because processes that read data load no transformers, and because templates come with models from strangers:
Jinja's ImmutableSandboxedEnvironment keeps a program from the machine, but not from taking all of its time and memory.
ChatTemplate, load_chat_template, _Generation, _Namespace, _raise and _tojson are what transformers does (tests compare
the two); all else limits time, the length of what is written, and what one step makes.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from longlora_jax.data.tokenizer_files import special_texts
from longlora_jax.errors import UserError
from longlora_jax.files import one_line, read_json

RENDER_SECONDS = 10  # a conversation of a million words takes milliseconds
# A rendering has at most so many characters: factor * what it is given + extra.
RENDER_FACTOR, RENDER_EXTRA = 4, 100_000
STEP_LIMIT = 2**26  # characters or items that one step may make
BITS_LIMIT = 10_000  # of a whole number
WIDTH_LIMIT = 1000  # blanks that a format or an indent may ask for
TEMPLATE_LIMIT = 1_000_000  # bytes

# What a template in training takes for today, or its data would change overnight: the day that Llama 3's falls back to.
FIXED_DAY = datetime(2024, 7, 26)

Message = dict[str, Any]  # role, content (a text), and what else a template may have a place for


class TemplateFault(ValueError):
    """What a template makes of a conversation: a refusal, an error, or too much."""


class _OutOfTime(BaseException):
    """Past the limit of time: no Exception, which filters of Jinja would take for a fault of what they are given."""


class ChatTemplate:
    """A chat template; render() gives the text of a conversation.

    special: what the template may call bos_token, eos_token and so on. today: the day that it is told; None: the
    clock's. What it writes has the BOS that it is to have. Raises UserError if it is not Jinja.
    """

    def __init__(self, source: str, special: dict[str, str], today: datetime | None = None):
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: (today or datetime.now()).strftime(form),
            "namespace": _Namespace,
        }
        self.source, self._special = source, special
        try:
            with _time_limit():
                self._template = environment.from_string(source)
        except (Exception, _OutOfTime) as error:  # syntax, but also recursion, or a fold of constants that fails
            raise UserError(f"the chat template is not one that Jinja reads: {one_line(str(error), 200)}") from error

    def render(self, messages: list[Message], /, *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of messages {role, content, ...}; with add_generation_prompt up to where the next answer begins.

        variables: what else the template reads, such as tools. Raises TemplateFault if it refuses, fails, passes the
        limits, or leaves a system message out.
        """
        text = self._write(messages, add_generation_prompt, variables)
        first = messages[0] if messages else {}
        if first.get("role") == "system" and (system := first["content"].strip()) and system not in text:
            try:
                lost = self._write(messages[1:], add_generation_prompt, variables) == text
            except TemplateFault:
                lost = False
            if lost:
                raise TemplateFault("the template leaves the system message out")
        return text

    def _write(self, messages: list[Message], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        limit = RENDER_EXTRA + RENDER_FACTOR * (sum(map(_size, messages)) + _size(variables))
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
        except (Exception, _OutOfTime) as error:  # a template is a program, it can fail in any way
            raise TemplateFault(one_line(str(error) or type(error).__name__, 200)) from error
        return "".join(pieces)


def template_source(folder: str) -> str:
    """The chat template in a tokenizer's folder: chat_template.jinja, or else that of tokenizer_config.json; "": none.

    Raises UserError if it is too long.
    """
    config_path, jinja_path = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
    if jinja_path.is_file():
        with jinja_path.open("rb") as file:
            source = file.read(TEMPLATE_LIMIT + 1).decode("utf-8", errors="replace")
    else:
        source = read_json(str(config_path)).get("chat_template") if config_path.exists() else ""
    if isinstance(source, list):  # several by name, for tools or retrieval beside plain chats
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str):
        return ""
    if len(source) > TEMPLATE_LIMIT:
        raise UserError(f"the chat template in {folder} is longer than {TEMPLATE_LIMIT:,} characters: fetch it again")
    return source


def load_chat_template(folder: str, today: datetime | None = None) -> ChatTemplate:
    """The chat template of template_source(folder), told the folder's special tokens.

    today: see ChatTemplate. Raises UserError if there is none.
    """
    if not (source := template_source(folder)):
        raise UserError(
            f"the tokenizer in {folder} has no chat template: set data.prompt=alpaca, "
            "or put the model's chat_template.jinja beside it"
        )
    return ChatTemplate(source, special_tokens(folder), today)


def special_tokens(folder: str) -> dict[str, str]:
    """What a template of a tokenizer's folder may call bos_token, eos_token and so on."""
    return {f"{role}_token": text for role, text in special_texts(folder).items()}


def _size(value: Any) -> int:
    """Characters of the texts in a message, or in what else a template is given."""
    if isinstance(value, dict | list | tuple):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Jinja's, but for a ~ b, which it joins by a function that nobody can limit."""

    def visit_Concat(self, node, frame):  # noqa: N802
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without the steps that make much of little, or another thing every time."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    refused_methods = frozenset(("ljust", "rjust", "center", "zfill", "expandtabs", "translate", "to_bytes"))
    refused_filters = ("batch", "center", "random", "slice", "sum", "wordwrap", "xmlattr")

    def __init__(self, **options):
        super().__init__(**options)
        self.globals.pop("lipsum")
        for name in self.refused_filters:
            self.filters.pop(name)
        self.filters |= {"tojson": _tojson, "format": _format, "indent": _indent, "replace": _replace, "join": _join}

    def call_binop(self, context, operator, left, right):
        """Counts what the operator would make before it does."""
        if isinstance(left, int) and isinstance(right, int):
            bits = abs(left).bit_length() * max(right, 0) if operator == "**" else left.bit_length()
            if operator in ("*", "**") and bits + right.bit_length() > BITS_LIMIT:
                raise _too_much()
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _check_size(len(left) + len(right))
        elif operator == "*":
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(what, (str, bytes, list, tuple)):
                _check_size(times * len(what))
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_percents(left, right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj, attr, value):
        """Refuses methods of texts and numbers that pad by any width."""
        padding = isinstance(obj, (str, bytes, int)) and attr in self.refused_methods
        return super().is_safe_attribute(obj, attr, value) and not padding

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902, N805
        """Counts what text.replace() and text.join() would make before they do."""
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name == "replace" and len(args) > 1:
            _check_size(text.count(str(args[0])) * len(str(args[1])))
        if isinstance(text, str) and name == "join" and args:
            args = (list(args[0]),)
            _check_size(sum(len(text) + len(part) for part in args[0] if isinstance(part, str)))
        return super().call(__context, __obj, *args, **kwargs)

    def concat(self, parts):
        """Joins the parts of a ~ b, of a macro or of a block that is set."""
        parts = list(parts)
        _check_size(sum(map(len, parts)))
        return "".join(parts)

    def wrap_str_format(self, value):
        """text.format and text.format_map with limited widths."""
        if super().wrap_str_format(value) is None:
            return None

        def formatted(*args, **fields):
            text = value.__self__
            _check_size(text.count("{") * _longest((args, fields)))
            if value.__name__ == "format_map":
                args, fields = (), *args
            return _Formatter(self).vformat(text, args, fields)

        return formatted


class _Formatter(SandboxedFormatter):
    def format_field(self, value, format_spec):
        if any(int(width) > WIDTH_LIMIT for width in re.findall(r"\d+", format_spec)):
            raise _too_much()
        return super().format_field(value, format_spec)


def _too_much() -> TemplateFault:
    return TemplateFault("a step of it makes too much at once")


def _check_size(size: int) -> None:
    if size > STEP_LIMIT:
        raise _too_much()


def _longest(given: Any) -> int:
    """Characters of the longest text in what a format is given."""
    if isinstance(given, dict):
        given = tuple(given.values())
    return max(map(_longest, given), default=0) if isinstance(given, tuple) else len(str(given))


def _check_percents(form: str | bytes, given: Any) -> None:
    # Widths of five digits and more, and those that an argument gives.
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    _check_size(text.count("%") * _longest(given))
    if re.search(r"%[^%a-zA-Z]*?(?:\d{5}|\*)", re.sub(r"%\([^)]*\)", "%", text)):
        raise _too_much()


def _format(value, *args, **kwargs):
    _check_percents(str(value), (args, kwargs))
    return jinja2.filters.do_format(value, *args, **kwargs)


def _indent(s, width=4, first=False, blank=False):
    if not isinstance(width, str) and width > WIDTH_LIMIT:
        raise _too_much()
    _check_size(len(s) + (s.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
    return jinja2.filters.do_indent(s, width, first, blank)


@jinja2.pass_eval_context
def _replace(eval_ctx, s, old, new, count=None):
    _check_size(str(s).count(str(old)) * len(str(new)))
    return jinja2.filters.do_replace(eval_ctx, s, old, new, count)


@jinja2.pass_eval_context
def _join(eval_ctx, value, d="", attribute=None):
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(eval_ctx.environment, attribute), value)
    parts = [str(part) for part in value]
    _check_size(sum(len(str(d)) + len(part) for part in parts))
    return str(d).join(parts)


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


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if isinstance(indent, int) and indent > WIDTH_LIMIT or isinstance(indent, str) and len(indent) > WIDTH_LIMIT:
        raise _too_much()
    # Jinja's own escapes what HTML must not hold, and models were not trained on that.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises _OutOfTime in what it holds after RENDER_SECONDS. Threads, and Windows, have no alarm and no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise _OutOfTime(f"it takes more than {RENDER_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
