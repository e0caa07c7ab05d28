"""Text to token ids and back, as the model's own tokenizer does; transformers is rarely needed."""

import functools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tokenizers

from longlora_jax.data.sentencepiece_model import SentencePieceModel
from longlora_jax.data.source import Document
from longlora_jax.data.tokenizer_files import build_tokenizer, in_one_line
from longlora_jax.errors import UserError

log = logging.getLogger(__name__)

CHARACTERS_AT_ONCE = 2**18  # a core of the tokenizers library takes about 0.1 s for them
CHARACTERS_AHEAD = 2**25  # texts read before their turn: beside a long one, the other cores go on


class Tokenizer:
    """A model's tokenizer: encode, decode, and its special ids, None where it has none.

    backend: a tokenizers.Tokenizer, or a SentencePieceModel. vocab_size: how many tokens it has; max_id: the largest
    id among them. fingerprint: SHA-256 of what decides the ids of a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | SentencePieceModel,
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        fingerprint: str = "",
    ):
        self._backend = backend
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.fingerprint = fingerprint

    @functools.cached_property
    def max_id(self) -> int:
        """The largest id that it can give, -1 if it has no tokens."""
        if isinstance(self._backend, SentencePieceModel):
            return self._backend.largest_id()
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def rows(self) -> int:
        """How many rows an embedding of all its ids needs: more than vocab_size where ids are left out."""
        return self.max_id + 1

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids [tokens] int32 of a text, with BOS where this tokenizer adds one."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], *, add_bos: bool = True) -> list[np.ndarray]:
        """Returns encode(text) of every text, computed on all cores; without add_bos, no special token is added."""
        with in_one_line("the tokenizer fails at a text"):
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=add_bos)
        return [np.array(e.ids, np.int32) for e in encoded]

    def special_tokens(self) -> list[str]:
        """Returns the texts of the tokens that stand for no text: BOS, EOS, ends of turns and so on."""
        return [t.content for t in self._backend.get_added_tokens_decoder().values() if t.special]

    def added_tokens(self) -> dict[str, int]:
        """Returns the tokens that are found before a text is split, special or not, and their ids."""
        return {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its text, None if it has none."""
        return self._backend.token_to_id(token)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of ids; special tokens are spelled out unless they are skipped."""
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)


def load_tokenizer(folder: str) -> Tokenizer:
    """Loads the tokenizer of a model folder out of all of its files: see tokenizer_files.

    Beside a tokenizer.json that alone says whether BOS is added: transformers 5, too, ignores add_bos_token of
    tokenizer_config.json there. Raises UserError if there is no tokenizer that can be read.
    """
    backend, roles, fingerprint = build_tokenizer(folder)
    ids = {f"{role}_id": backend.token_to_id(roles.get(role, "")) for role in ("bos", "eos", "pad")}
    return Tokenizer(backend, **ids, fingerprint=fingerprint)


def end_of(tokenizer: Tokenizer) -> int:
    """Returns the id that parts documents; raises UserError if the tokenizer has none."""
    if tokenizer.eos_id is None:
        raise UserError(
            "the tokenizer names no end of text, which parts the documents of a window: "
            "set eos_token in tokenizer_config.json."
        )
    return tokenizer.eos_id


def tokenize_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, max_tokens: int = 0, add_bos: bool = True
) -> Iterator[np.ndarray]:
    """Yields the ids [tokens] int32 of each document, in order, as encode() gives them.

    Documents are read ahead while those before them are tokenized on all cores.
    max_tokens: stop after so many tokens, within a document if need be; 0 reads everything.
    add_bos: begin documents with BOS, where this tokenizer adds one.
    """
    left = max_tokens or float("inf")
    for ids in _encode_ahead(documents, tokenizer, add_bos):
        yield ids[: min(left, len(ids))]
        left -= len(ids)
        if left <= 0:
            log.info("stopped reading the corpus after max_tokens=%d", max_tokens)
            return


def _encode_ahead(documents: Iterable[Document], tokenizer: Tokenizer, add_bos: bool) -> Iterator[np.ndarray]:
    cores = _cores()
    # A call keeps one core busy where it holds one long document, and none while its ids become arrays.
    pool = ThreadPoolExecutor(cores + 1)
    waiting: deque[tuple[int, Future[list[np.ndarray]]]] = deque()
    batches = _batches(documents)
    ahead, ended = 0, False
    try:
        while True:
            while not ended and ahead < CHARACTERS_AHEAD:
                texts = next(batches, [])
                ended = not texts
                if texts:
                    size = sum(map(len, texts))
                    waiting.append((size, pool.submit(tokenizer.encode_batch, texts, add_bos=add_bos)))
                    ahead += size
                # What is ready goes out first: the reader may be slow.
                if waiting and waiting[0][1].done():
                    break
            if not waiting:
                return
            size, encoded = waiting.popleft()
            yield from encoded.result()
            ahead -= size
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    """Cores that the tokenizers library uses: it, too, goes over what is no number."""
    said = os.environ.get("RAYON_NUM_THREADS", "")
    if said.isdecimal() and int(said):
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= CHARACTERS_AT_ONCE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
