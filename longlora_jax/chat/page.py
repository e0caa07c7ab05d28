"""The page: a document and how much of the window it takes, questions, answers that stream.

All that users, files and models say is shown as text: nothing in it is HTML or Markdown, and no image in it is fetched.
"""

import html
import logging
import os
import secrets
import time
from collections.abc import Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr  # noqa: E402  # pyright: ignore[reportMissingImports]
from gradio import themes  # noqa: E402  # pyright: ignore[reportMissingImports]

from longlora_jax.chat.conversation import Conversation, Reader, Turn  # noqa: E402
from longlora_jax.chat.document import SUFFIXES, read_document  # noqa: E402
from longlora_jax.errors import UserError  # noqa: E402
from longlora_jax.files import one_line  # noqa: E402
from longlora_jax.generate.session import Sampling  # noqa: E402

log = logging.getLogger(__name__)

LARGEST_FILE = 64 * 2**20  # bytes
REFRESH_SECONDS = 0.05  # between two pictures of a growing answer
HOUR = 3600

THEME = themes.Base(
    primary_hue="blue",
    font=("ui-sans-serif", "system-ui", "sans-serif"),
    font_mono=("ui-monospace", "Consolas", "monospace"),
).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto !important }
#title h1 { font-size: 1.25rem; font-weight: 600; margin: 0 }
#title p, .meter p { margin: 0.25rem 0 0; overflow-wrap: anywhere }
.meter .bar { display: flex; height: 10px; border-radius: 5px; overflow: hidden; margin: 0.5rem 0;
  background: var(--border-color-primary) }
.meter .document { background: #1d4ed8 } .meter .talk { background: #f59e0b }
.meter .key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 0.4em }
.meter .free { background: var(--border-color-primary) }
.meter ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.2em }
.note { opacity: 0.75; font-size: 0.85rem; margin: 0 }
.fault { border-left: 4px solid #dc2626; padding: 0.25rem 0.75rem; overflow-wrap: anywhere }
#chat { border: 1px solid var(--border-color-primary); border-radius: 8px }
#chat small { opacity: 0.75; font-size: 0.9rem }
#chat .asked, #chat .answered { white-space: pre-wrap; overflow-wrap: anywhere; padding: 0.6rem 0.9rem;
  margin-bottom: 0.75rem; border-radius: 8px; max-width: 90%; width: fit-content; line-height: 1.5 }
#chat .asked { background: var(--primary-100); color: #111; margin-left: auto }
#chat .answered { background: var(--background-fill-secondary) }
#chat b { display: block; color: inherit; font-size: 0.75rem; opacity: 0.7 }
"""


def meter(talk: Conversation) -> str:
    """HTML of how much of the window is taken: a bar and its numbers."""
    window, document, total = talk.reader.window, talk.document_tokens, talk.tokens
    parts = [("document", "document", document), ("talk", "conversation", total - document)]
    bar = "".join(f'<div class="{kind}" style="width:{100 * n / window:.2f}%"></div>' for kind, _, n in parts)
    parts.append(("free", "free", window - total))
    keys = "".join(f'<li><span class="key {kind}"></span>{name} {n:,}</li>' for kind, name, n in parts)
    name = html.escape(talk.document.name) if talk.document else "no document yet"
    note = f"<p>{html.escape(talk.document.note)}</p>" if talk.document and talk.document.note else ""
    share = 100 * total / window
    return (
        f'<div class="meter"><p><strong>{name}</strong></p>{note}<p>{total:,} of {window:,} tokens ({share:.0f}%)</p>'
        f'<div class="bar" role="meter" aria-label="window" aria-valuemin="0" aria-valuemax="{window}" '
        f'aria-valuenow="{total}">{bar}</div><ul>{keys}</ul></div>'
    )


def fault(error: Exception) -> str:
    """HTML of what went wrong."""
    told = str(error) if isinstance(error, UserError) else one_line(f"{type(error).__name__}: {error}", 300)
    return f'<p class="fault" role="alert">{html.escape(told)}</p>'


def note(text: str) -> str:
    """HTML of what goes on, or went on."""
    return f'<p class="note" role="status">{html.escape(text)}</p>'


def reading(done: int, total: int) -> str:
    """What is told of a model that reads."""
    return f"reading: {done:,} of {total:,} tokens"


def measured(turn: Turn) -> str:
    """What an answer took so far, and why it ended."""
    if not turn.new_tokens and not turn.ended:
        return reading(turn.read_tokens, turn.prompt_tokens - turn.known_tokens)
    words = [f"{turn.read_tokens:,} tokens read in {turn.read_seconds:.1f} s, {turn.known_tokens:,} known already"]
    if turn.new_tokens > 1:
        words.append(f"{turn.new_tokens:,} written, {turn.new_tokens / turn.seconds:.1f} a second")
    ends = {
        "stopped": "stopped",
        "length": "cut off after max_new_tokens",
        "window": "cut off: the window is full, begin a new conversation",
    }
    words += [ends[turn.ended]] if turn.ended in ends else []
    return "; ".join(words)


def transcript(talk: Conversation) -> str:
    """HTML of all that was asked and answered."""
    rows = []
    for turn in talk.turns:
        answer = turn.answer or ("(no answer)" if turn.ended else "...")
        for kind, name, text in (("asked", "You", turn.question), ("answered", "Model", answer)):
            rows.append(f'<div class="{kind}" dir="auto"><b>{name}</b>{html.escape(text)}</div>')
    hint = "Load a document and ask about it. It is read once, for all questions."
    return f'<div role="log" aria-label="conversation">{"".join(rows) or f"<small>{hint}</small>"}</div>'


def build(reader: Reader, max_new_tokens: int) -> gr.Blocks:
    """The page over a model; max_new_tokens is where the slider stands at first."""
    with gr.Blocks(title="longlora_jax chat", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        talk = gr.State()
        gr.HTML("<h1>Ask a long document</h1>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="Document: txt, md or pdf", file_types=list(SUFFIXES), height=140)
                window = gr.HTML()
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature", info="0: the likeliest token")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top_p", info="1: any token may be drawn")
                    most = min(4096, reader.window)
                    first = min(max_new_tokens, most)
                    length = gr.Slider(1, most, first, step=1, label="max_new_tokens", info="of an answer")
            with gr.Column(scale=3, min_width=280):
                chat = gr.HTML(elem_id="chat", min_height=440, max_height=440, autoscroll=True, padding=True)
                status = gr.HTML()
                with gr.Row(equal_height=True):
                    question = gr.Textbox(
                        placeholder="Ask about the document", show_label=False, scale=5, min_width=200, autofocus=True
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=80)
                    stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False)
                clear = gr.Button("New conversation", size="sm")

        def shown(talk: Conversation, *, busy: bool = False, said: str = "") -> dict[Any, Any]:
            return {
                chat: transcript(talk),
                window: meter(talk),
                status: said,
                ask: gr.update(visible=not busy),
                stop: gr.update(visible=busy),
            }

        def begin():
            made = Conversation(reader)
            return made, meter(made), transcript(made)

        def take(path: str | None, talk: Conversation):
            try:
                talk.load(None)
                talk.load(read_document(path) if path else None)
            except UserError as error:
                return shown(talk, said=fault(error))
            return shown(talk)

        def read(talk: Conversation):
            try:
                for done, total in talk.read_ahead():
                    yield note(reading(done, total))
                yield ""
            except Exception as error:  # out of memory, most likely
                log.exception("the document cannot be read")
                yield fault(error)

        def put(text: str, talk: Conversation):
            if talk.turns and not talk.turns[-1].ended:
                return {status: fault(UserError("an answer is under way: wait for its end, or stop it"))}
            try:
                talk.ask(text)
            except UserError as error:
                return shown(talk, said=fault(error))
            return shown(talk, busy=True) | {question: ""}

        def answer(talk: Conversation, temperature: float, top_p: float, length: int) -> Iterator[dict[Any, Any]]:
            if not talk.turns or talk.turns[-1].ended:
                return
            turn, last = talk.turns[-1], 0.0
            try:
                for _ in talk.answer(int(length), Sampling(temperature, 0, top_p), secrets.randbits(31)):
                    if turn.ended or time.monotonic() - last > REFRESH_SECONDS:
                        last = time.monotonic()
                        yield shown(talk, busy=not turn.ended, said=note(measured(turn)) if talk.turns else "")
            except Exception as error:  # a question that does not fit, or no memory left
                if not isinstance(error, UserError):
                    log.exception("the question cannot be answered")
                talk.turns = [other for other in talk.turns if other is not turn]
                yield shown(talk, said=fault(error)) | {question: turn.question}

        def empty(talk: Conversation):
            talk.clear()
            return shown(talk)

        everything = [chat, window, status, ask, stop, question]
        # One at a time: there is one cache.
        alone = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        quick = {"queue": False, "show_progress": "hidden"}
        page.load(begin, None, [talk, window, chat], **quick)
        gr.on(
            [file.upload, file.clear], take, [file, talk], everything, show_progress="hidden", trigger_mode="multiple"
        ).success(read, talk, status, **alone)
        gr.on([question.submit, ask.click], put, [question, talk], everything, **quick).success(
            answer, [talk, temperature, top_p, length], everything, **alone
        )
        stop.click(lambda talk: talk.stop(), talk, None, **quick)
        clear.click(empty, talk, everything, **quick)
    return page


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Serves the page in the background; returns its address. Raises UserError if the port is taken."""
    try:
        _, address, _ = page.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            max_file_size=LARGEST_FILE,
            theme=THEME,
            css=CSS,
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be had ({error}): choose another --port") from error
    return address
