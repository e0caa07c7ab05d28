"""Tokenized documents at random access: in memory, prepared on disk, or a flat file of ids."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longlora_jax.config import DataConfig
from longlora_jax.data.chat import load_prompt
from longlora_jax.data.formats import Reading
from longlora_jax.data.prepared import Prepared, encoding_of
from longlora_jax.data.sft import read_examples
from longlora_jax.data.source import Corpus, Share, check_path, find_files
from longlora_jax.data.tokenizer import Tokenizer, end_of, tokenize_documents
from longlora_jax.errors import UserError
from longlora_jax.progress import progress_bar

log = logging.getLogger(__name__)

Ids = np.ndarray
Scored = np.ndarray | None


class Documents(Protocol):
    """Documents whose lengths are known and of which any part can be read.

    lengths: [num] int64, tokens of each. eos_id: what the packer appends to each document; None where documents bring
    their own end or are a flat stream.
    """

    lengths: np.ndarray
    eos_id: int | None

    def read(self, index: int, start: int, stop: int) -> tuple[Ids, Scored]:
        """Tokens start to stop of a document: ids [stop - start] int32, and which are scored (int32; None: all)."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the data is, as a dict that JSON can hold: equal for equal tokens, whatever machine reads them."""
        ...


class InMemory:
    """Documents held in memory as one array.

    documents: ids [tokens] of each, or pairs (ids, scored) of which all or none are pairs.
    """

    def __init__(self, documents: Iterable[Any], eos_id: int | None):
        ids: list[np.ndarray] = []
        scored: list[np.ndarray] = []
        for document in documents:
            if isinstance(document, tuple):
                scored.append(np.asarray(document[1], np.int8))
                document = document[0]
            ids.append(np.asarray(document, np.int32))
        assert not scored or [len(s) for s in scored] == [len(i) for i in ids]
        self.lengths = np.array([len(i) for i in ids], np.int64)
        self.eos_id = eos_id
        self._ends = np.cumsum(self.lengths)
        self._ids = np.concatenate([np.empty(0, np.int32), *ids])
        self._scored = np.concatenate(scored) if scored else None

    def read(self, index: int, start: int, stop: int) -> tuple[Ids, Scored]:
        """See Documents."""
        first = int(self._ends[index] - self.lengths[index])
        assert 0 <= start <= stop <= self.lengths[index]
        here = slice(first + start, first + stop)
        return self._ids[here], None if self._scored is None else self._scored[here].astype(np.int32)

    def identity(self) -> dict[str, Any]:
        """See Documents."""
        digest = hashlib.sha256(self.lengths.astype("<i8").data)
        digest.update(self._ids.astype("<i4").data)
        if self._scored is not None:
            digest.update(self._scored.data)
        tokens = {"documents": len(self.lengths), "tokens": len(self._ids)}
        return {**tokens, "eos_id": self.eos_id, "sha256": digest.hexdigest()}


class Memmap:
    """Files of raw ids, one flat document each, in little-endian uint16 or uint32: nanoGPT's and LongLoRA's `.bin`.

    Raises UserError for a file that is empty, cut within an id, or (where it is read) has an id past the vocabulary.
    """

    eos_id: int | None = None

    def __init__(self, path: str, dtype: str | None = None, *, vocab_size: int):
        root, names = find_files(path, (".bin",))
        self._files = [root / name for name in names]
        self._dtypes = [np.dtype(dtype or _guess_dtype(file, vocab_size)).newbyteorder("<") for file in self._files]
        self._vocab_size = vocab_size
        self.lengths = np.array([_ids_in(*file) for file in zip(self._files, self._dtypes, strict=True)], np.int64)

    def read(self, index: int, start: int, stop: int) -> tuple[Ids, Scored]:
        """See Documents."""
        assert 0 <= start <= stop <= self.lengths[index]
        file, dtype = self._files[index], self._dtypes[index]
        try:
            ids = np.fromfile(file, dtype, stop - start, offset=start * dtype.itemsize)
        except OSError as error:
            raise UserError(f"{file} cannot be read any more ({error.strerror}): put it back.") from error
        if len(ids) != stop - start:
            raise UserError(f"{file} has become shorter than it was: put it back.")
        if (wrong := ids >= self._vocab_size).any():
            at = int(wrong.argmax())
            raise UserError(
                f"{file} holds the id {ids[at]} at place {start + at:,}, the tokenizer has ids below "
                f"{self._vocab_size:,}: give the tokenizer that made it (these are read as {dtype.name})"
            )
        return ids.astype(np.int32), None

    def identity(self) -> dict[str, Any]:
        """See Documents. Of each file its first and last megabyte stand for it."""
        digest = hashlib.sha256(self.lengths.astype("<i8").data)
        for file in self._files:
            with open(file, "rb") as stream:
                digest.update(stream.read(2**20))
                stream.seek(max(0, file.stat().st_size - 2**20))
                digest.update(stream.read())
        return {"documents": len(self.lengths), "tokens": int(self.lengths.sum()), "sha256_of_ends": digest.hexdigest()}


class Head:
    """The first max_tokens tokens of documents: the rest is as if it were not there."""

    def __init__(self, documents: Documents, max_tokens: int):
        before = np.cumsum(documents.lengths) - documents.lengths
        lengths = np.clip(max_tokens - before, 0, documents.lengths)
        self._documents = documents
        self.lengths = lengths[: np.count_nonzero(before < max_tokens)]
        self.eos_id = documents.eos_id

    def read(self, index: int, start: int, stop: int) -> tuple[Ids, Scored]:
        """See Documents."""
        assert 0 <= start <= stop <= self.lengths[index]
        return self._documents.read(index, start, stop)

    def identity(self) -> dict[str, Any]:
        """See Documents."""
        return {**self._documents.identity(), "head_tokens": int(self.lengths.sum())}


def open_documents(data: DataConfig, tokenizer: Tokenizer, *, window: int = 0, held_out: bool = False) -> Documents:
    """The documents of a config: opened where they are tokens already, else read and tokenized into memory.

    window: tokens of the longest example of instructions that there is room for (data.too_long says what becomes of
    others); 0: any. held_out: read data.hold_out_share of the rows, which others leave out.
    Raises UserError for what cannot be read, and for documents of another tokenizer.
    """
    if data.source in ("tokens", "arrayrecord"):
        check_path(data.source, data.path)
        if data.hold_out or data.only:
            raise UserError(f"hold_out and only name files of text, source {data.source!r} has none: leave them out.")
        if data.source == "tokens":
            documents: Documents = Memmap(data.path, vocab_size=tokenizer.rows)
        else:
            documents = Prepared(data.path, tokenizer=tokenizer, add_bos=data.add_bos)
        return Head(documents, data.max_tokens) if data.max_tokens else documents
    corpus = Corpus(
        data.source,
        data.path,
        hold_out=data.hold_out,
        only=data.only,
        split=data.split,
        streaming=data.streaming,
        share=Share(data.hold_out_share, held_out) if data.hold_out_share else None,
    )
    reading = Reading(data.on_bad_row)
    if data.task == "sft":
        template = load_prompt(data, data.tokenizer, tokenizer)
        examples = read_examples(corpus.rows(reading), reading, tokenizer, template, data, window=window)
        documents = InMemory(_with_progress(examples, corpus, reading), None)
    else:
        texts = corpus.documents(reading, data.text_key)
        ids = tokenize_documents(texts, tokenizer, max_tokens=data.max_tokens, add_bos=data.add_bos)
        documents = InMemory(_with_progress(ids, corpus, reading), end_of(tokenizer))
    if reading.skipped:
        log.warning("%s rows of %s are left out as bad", f"{reading.skipped:,}", data.path)
    return documents


def _with_progress(documents: Iterable[Any], corpus: Corpus, reading: Reading) -> Iterable[Any]:
    unit = " rows" if corpus.source == "hf" else "B"
    with progress_bar(corpus.size, label="tokenizing", unit=unit, delay=3) as bar:
        for document in documents:
            yield document
            bar.update(reading.position - bar.n)


def _guess_dtype(file: Path, vocab_size: int) -> str:
    """That of the vocabulary, as programs write it; a uint32 file of small ids shows by its zeros."""
    dtype = encoding_of(vocab_size)
    words = np.fromfile(file, "<u2", 8192)
    if dtype == "uint16" and len(words) > 64 and not words[1::2].any() and words.any():
        dtype = "uint32"
    log.info("%s is read as %s", file, dtype)
    return dtype


def _ids_in(file: Path, dtype: np.dtype) -> int:
    size = file.stat().st_size
    if not size or size % dtype.itemsize:
        raise UserError(
            f"{file} has {size:,} bytes, which is not a number of {dtype.name} ids above 0: "
            f"name a file of raw {dtype.name} that is whole."
        )
    return size // dtype.itemsize
