"""A conversation about a document: what the model has read already is not read again."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from longlora_jax.chat.document import Document
from longlora_jax.data.stream import TextStream
from longlora_jax.data.tokenizer import Tokenizer
from longlora_jax.errors import UserError
from longlora_jax.generate.generation import common_prefix, load_for_generation
from longlora_jax.generate.session import GREEDY, Sampling, Session
from longlora_jax.weights.load import OpenModel

LEAST_ROOM = 64  # tokens that a document must leave for a question and its answer
STEP = 2048  # tokens; a cache is a multiple of them, and has room for at least so many more than it was made for
ROLES = ("user", "assistant")
PROBES = ("Who?", "1", "\u00e9")  # questions that share no first token

Message = dict[str, str]
Progress = Callable[[int, int], Any]


class Stopped(Exception):
    """Reading was stopped; what was read before it is still known."""


class Reader:
    """A model on its devices, and the one row of tokens that it has read last.

    All conversations share it in turns, and only one may use it at a time: memory for one cache, however many there
    are. Raises UserError from encode(), for ids outside of the vocabulary.
    """

    def __init__(self, opened: OpenModel, tokenizer: Tokenizer, dtype: str = "float32", *, chunk: int | None = None):
        self.window = opened.config.max_position_embeddings
        self.tokenizer, self.chat = tokenizer, opened.chat_format()
        self._vocab_size = opened.config.vocab_size
        self._model, self._params = load_for_generation(opened, dtype)
        self._chunk, self._capacity = chunk, 0
        self._lock = threading.Lock()  # a page that was closed may still be reading when the next one begins
        self._session: Any = None
        self._read: list[int] = []  # all that the session has read, and what it drew last
        self._marked: list[int] = []  # what it can be rewound to

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """The ids [tokens] of a conversation that the model is to go on with, as it was trained to be asked."""
        if self.chat:
            ids = self.chat.ids(messages, self.tokenizer)
        else:
            ends = {"user": "\n", "assistant": "\n\n"}
            ids = self.tokenizer.encode("".join(m["content"] + ends[m["role"]] for m in messages))
        if len(ids) and ids.max() >= self._vocab_size:
            raise UserError(f"token {ids.max()} is outside the model's vocabulary of {self._vocab_size}")
        return ids

    def read(self, ids: np.ndarray, kept: int, room: int, progress: Progress) -> None:
        """Has the model read ids [tokens], but for what it has read already, and leaves room for so many more.

        The first `kept` ids can be come back to later. progress is told tokens read and to read, after each chunk; if
        it raises Stopped, this does.
        """
        with self._lock:
            try:
                self._read_on(ids, kept, room, progress)
            except Stopped:
                self._rewind()
                raise
            except BaseException:  # out of memory, for one: nobody knows what the cache holds
                self._drop()
                raise

    def _read_on(self, ids: np.ndarray, kept: int, room: int, progress: Progress) -> None:
        if len(ids) + room > self._capacity or not _begins(ids[:kept], self._marked):
            self._start(len(ids) + room)
        del self._read[self._session.lengths[0] :]
        if len(self._marked) < kept or len(self._read) == len(ids) or not _begins(ids, self._read):
            self._rewind()
        known = len(self._read)
        done = known

        def tell(tokens: int):
            nonlocal done
            done += tokens
            self._session.wait()
            progress(done - known, len(ids) - known)

        for part in (slice(known, kept), slice(max(known, kept), None)):
            self._session.read([ids[part]], tell)
            self._read += ids[part].tolist()
            if len(self._read) == kept:
                self._session.mark()
                self._marked = list(self._read)

    def stream(self, limit: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """Draws up to `limit` tokens after what was read, and yields them as they come."""
        for (token,) in self._session.stream(limit, sampling, seed):
            self._read.append(int(token))
            yield int(token)

    def _start(self, tokens: int) -> None:
        self._drop()  # before the next cache takes its memory
        self._capacity = max(tokens, min(self.window, (tokens // STEP + 2) * STEP))
        self._session = Session(self._model, self._params, 1, self._capacity, chunk=self._chunk)
        self._session.mark()

    def _drop(self) -> None:
        self._session, self._capacity, self._read, self._marked = None, 0, [], []

    def _rewind(self) -> None:
        self._session.rewind()
        self._read = list(self._marked)


@dataclass
class Turn:
    """A question and its answer so far.

    ended: how, "" as long as it goes on: "eos" by the model, "stopped" by the user, "length" after as many tokens as
    were asked for, "window" where there was no more room. Of prompt_tokens, known_tokens had been read before, and
    read_tokens have been read since.
    """

    question: str
    answer: str = ""
    ended: str = ""
    prompt_tokens: int = 0
    known_tokens: int = 0
    read_tokens: int = 0
    new_tokens: int = 0
    read_seconds: float = 0.0
    seconds: float = 0.0


class Conversation:
    """Questions about a document, or about nothing: load(), then ask() and answer(), in turns.

    document_tokens: of the window, what the document takes with all that the template puts before a question.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self._stop = threading.Event()
        self.load(None)

    @property
    def tokens(self) -> int:
        """How many tokens of the window are taken."""
        last = self.turns[-1] if self.turns else Turn("")
        return max(self.document_tokens, last.prompt_tokens + last.new_tokens)

    def load(self, document: Document | None) -> None:
        """Takes a document, or none any more, and begins anew.

        Raises UserError, and takes none, if it does not leave room for a question in the model's window.
        """
        self.clear()
        self._stop = threading.Event()
        self.document: Document | None = None
        self.document_tokens, self._shared = 0, self._shared_tokens(None)
        if document is None:
            return
        tokens, window = self._shared_tokens(document), self.reader.window
        if tokens + LEAST_ROOM > window:
            own = self._shared  # the template's tokens before the document
            # Two in a hundred less: tokens are not spread evenly.
            share = 98 * max(0, window - LEAST_ROOM - own) // (tokens - own)
            raise UserError(
                f"{document.name} takes {tokens:,} tokens, and a question needs {LEAST_ROOM} more, but the model's "
                f"window is {window:,}: cut the document to about {share}% of its length, or train the model further "
                "to a longer window"
            )
        self.document, self.document_tokens, self._shared = document, tokens, tokens

    def read_ahead(self) -> Iterator[tuple[int, int]]:
        """Has the model read the document before the first question; yields tokens read and to read.

        stop() ends this, and answer() then reads the rest.
        """
        stop = self._stop
        ids = self.reader.encode(_messages(self.document, [], PROBES[0]))[: self._shared]
        with suppress(Stopped):
            yield from _watched(lambda tell: self.reader.read(ids, len(ids), LEAST_ROOM, _until(stop, tell)))

    def ask(self, question: str) -> None:
        """Puts a question, which answer() answers. Raises UserError if it is blank."""
        if not question.strip():
            raise UserError("the question is empty: type one")
        if self._stop.is_set():
            self._stop = threading.Event()  # what was stopped may not have noticed yet
        self.turns.append(Turn(question.strip()))

    def answer(self, max_new_tokens: int = 256, sampling: Sampling = GREEDY, seed: int = 0) -> Iterator[Turn]:
        """Answers the last question: yields its turn as the prompt is read, at each token, and when it has ended.

        Raises UserError, and takes the question back, if the window has no room for it or sampling is out of range.
        """
        turn, reader, stop = self.turns[-1], self.reader, self._stop
        try:
            sampling.validate()
            ids = reader.encode(_messages(self.document, self.turns[:-1], turn.question))
            if (limit := min(max_new_tokens, reader.window - len(ids))) < 1:
                raise UserError(
                    f"the conversation with this question is {len(ids):,} tokens, but the model's window is "
                    f"{reader.window:,}: ask less, begin a new conversation, or take a shorter document"
                )
        except UserError:
            self.turns.pop()
            raise
        turn.prompt_tokens, started = len(ids), time.perf_counter()
        try:
            for done, total in _watched(lambda tell: reader.read(ids, self._shared, limit, _until(stop, tell))):
                turn.read_tokens, turn.known_tokens = done, len(ids) - total
                turn.read_seconds = time.perf_counter() - started
                yield turn
        except Stopped:
            turn.ended = "stopped"
        else:
            yield from self._write(turn, reader.stream(limit, sampling, seed), stop)
            turn.ended = turn.ended or ("length" if limit == max_new_tokens else "window")
        yield turn

    def _write(self, turn: Turn, tokens: Iterator[int], stop: threading.Event) -> Iterator[Turn]:
        chat = self.reader.chat
        text, started = TextStream(self.reader.tokenizer, chat.stops), time.perf_counter()
        for token in tokens:
            turn.new_tokens += 1
            turn.seconds = time.perf_counter() - started
            if token not in chat.end_ids:
                text.push(token)
            if token in chat.end_ids or text.stopped:
                turn.ended = "eos"
                break
            turn.answer = text.text
            yield turn
            if stop.is_set():
                turn.ended = "stopped"
                break
        text.finish()
        turn.answer = text.text

    def stop(self) -> None:
        """Ends the answer, or the reading, that is under way; for another thread."""
        self._stop.set()

    def clear(self) -> None:
        """Begins anew with the same document, which is not read again."""
        self.stop()
        self.turns: list[Turn] = []

    def _shared_tokens(self, document: Document | None) -> int:
        """How many first tokens all conversations about a document share."""
        return common_prefix([self.reader.encode(_messages(document, [], probe)) for probe in PROBES])


def _messages(document: Document | None, turns: Sequence[Turn], question: str) -> list[Message]:
    """What was asked and answered, and a question; the document stands before all of it."""
    said = [(turn.question, turn.answer) for turn in turns if turn.answer]
    messages = [{"role": role, "content": text} for turn in said for role, text in zip(ROLES, turn, strict=True)]
    messages.append({"role": "user", "content": question})
    if document:
        messages[0]["content"] = f"{document.text}\n\n{messages[0]['content']}"
    return messages


def _begins(ids: np.ndarray, head: list[int]) -> bool:
    return len(head) <= len(ids) and np.array_equal(ids[: len(head)], head)


def _watched(work: Callable[[Progress], Any]) -> Iterator[tuple[int, int]]:
    """Does work in a thread, and yields what it tells of its progress; raises what it raises."""
    told: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(work, lambda *now: told.put(now))
        job.add_done_callback(lambda _: told.put(None))
        while (now := told.get()) is not None:
            yield now
        job.result()


def _until(stop: threading.Event, progress: Progress) -> Progress:
    def told(done: int, total: int):
        progress(done, total)
        if stop.is_set():
            raise Stopped

    return told
