"""What `longlora_jax.data.prepare` writes: tokenized documents in ArrayRecord files, with an index and a manifest.

manifest.json says what was tokenized by what, and names the shards. index.npy, [2, documents] int64, holds the tokens
of each document and the number of its first record. A record holds up to RECORD_TOKENS ids of one document, in
little-endian uint16 or uint32, so that a window of a book is read without the book.
"""

import hashlib
import json
import os
import re
from functools import lru_cache
from typing import Any

import numpy as np

from longlora_jax.data.tokenizer import Tokenizer
from longlora_jax.errors import UserError
from longlora_jax.files import one_line, read_json

VERSION = 1
RECORD_TOKENS = 65_536
MANIFEST, INDEX = "manifest.json", "index.npy"


def encoding_of(vocab_size: int) -> str:
    """The dtype of ids on the disk, in little-endian."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def records_of(lengths: np.ndarray) -> np.ndarray:
    """Records [num] int64 of documents of so many tokens."""
    return -(-lengths // RECORD_TOKENS)


class Prepared:
    """A prepared corpus, opened: see Documents. Files are opened when they are read, in each process for itself.

    tokenizer: the one that must have prepared it; None: any. add_bos: whether BOS was to be added; None: either.
    Raises UserError if the folder is damaged or was prepared in another way.
    """

    def __init__(self, folder: str, *, tokenizer: Tokenizer | None = None, add_bos: bool | None = None):
        self.folder = os.path.abspath(folder)
        if not os.path.isfile(os.path.join(folder, MANIFEST)):
            raise UserError(
                f"{folder!r} has no {MANIFEST}: name a folder that python -m longlora_jax.data.prepare has finished."
            )
        self.manifest = manifest = read_json(os.path.join(folder, MANIFEST))
        if (version := manifest.get("format_version")) != VERSION:
            said = one_line(repr(version), 50)
            raise UserError(f"{folder} is of format version {said}, this program reads {VERSION}: prepare it again.")
        try:
            _check_types(manifest)
            self.eos_id: int | None = manifest["eos_id"]
            self._dtype = np.dtype(manifest["encoding"]).newbyteorder("<")
            self._shards = [(s["file"], s["records"], s["sha256"]) for s in manifest["shards"]]
            self._ends = np.cumsum([records for _, records, _ in self._shards], dtype=np.int64)
            self._check_shards()
            self.lengths, self._first = self._read_index()
            if tokenizer is not None:
                self._check_tokenizer(tokenizer)
            if add_bos is not None and add_bos != manifest["add_bos"]:
                raise UserError(
                    f"{folder} was prepared with add_bos={manifest['add_bos']}: set add_bos so, or prepare it again."
                )
        except (KeyError, TypeError) as error:
            raise self._damaged(f"{MANIFEST} lacks or mistakes {one_line(str(error), 200)}") from error

    def __reduce__(self):
        return Prepared, (self.folder,)

    def read(self, index: int, start: int, stop: int) -> tuple[np.ndarray, None]:
        """See Documents."""
        length = int(self.lengths[index])
        assert 0 <= start <= stop <= length
        if start == stop:
            return np.empty(0, np.int32), None
        first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
        parts = [self._record(int(self._first[index]) + n, self._tokens_in(length, n)) for n in range(first, last + 1)]
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ids[start - first * RECORD_TOKENS : stop - first * RECORD_TOKENS].astype(np.int32), None

    def identity(self) -> dict[str, Any]:
        """See Documents."""
        content = json.dumps([sha256 for _, _, sha256 in self._shards])
        tokens = int(self.lengths.sum())
        digest = hashlib.sha256(content.encode()).hexdigest()
        return {"documents": len(self.lengths), "tokens": tokens, "eos_id": self.eos_id, "sha256": digest}

    def _record(self, number: int, tokens: int) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        name, records, sha256 = self._shards[shard]
        path = os.path.join(self.folder, name)
        try:
            reader = _open_shard(path, sha256)
            if reader.num_records() != records:
                raise self._damaged(f"{name} has {reader.num_records():,} records, not {records:,}")
            (record,) = reader.read([number - int(self._ends[shard]) + records])
        except RuntimeError as error:  # all that the library raises
            raise self._damaged(f"{name} cannot be read ({str(error).splitlines()[0][:200]})") from error
        if len(record) != tokens * self._dtype.itemsize:
            raise self._damaged(f"a record of {name} has {len(record):,} bytes, not {tokens * self._dtype.itemsize:,}")
        ids = np.frombuffer(record, self._dtype)
        if ids.max() >= self.manifest["vocab_size"]:
            vocabulary = f"the vocabulary has {self.manifest['vocab_size']:,}"
            raise self._damaged(f"a record of {name} holds the id {ids.max()}, {vocabulary}")
        return ids

    @staticmethod
    def _tokens_in(length: int, record: int) -> int:
        return min(RECORD_TOKENS, length - record * RECORD_TOKENS)

    def _check_shards(self) -> None:
        for shard in self.manifest["shards"]:
            try:
                size = os.path.getsize(os.path.join(self.folder, shard["file"]))
            except OSError:
                raise self._damaged(f"{shard['file']} is missing") from None
            if size != shard["bytes"]:
                raise self._damaged(f"{shard['file']} has {size:,} bytes, not {shard['bytes']:,}")

    def _read_index(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            # Mapped, so that all processes of a machine share it.
            index = np.load(os.path.join(self.folder, INDEX), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(f"{INDEX} cannot be read ({error})") from error
        documents, tokens = self.manifest["documents"], self.manifest["tokens"]
        if index.shape != (2, documents) or index.dtype != np.int64:
            raise self._damaged(f"{INDEX} is {index.dtype} {list(index.shape)}, not int64 {[2, documents]}")
        lengths, first = np.asarray(index)
        records = records_of(lengths)
        fits = lengths.min(initial=1) > 0 and lengths.sum() == tokens
        if not fits or records.sum() != self._ends[-1:].sum() or (first != np.cumsum(records) - records).any():
            raise self._damaged(f"{INDEX} and {MANIFEST} do not agree")
        return lengths, first

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        ours, theirs = tokenizer.fingerprint, self.manifest["tokenizer"]["fingerprint"]
        if ours == theirs and tokenizer.rows != self.manifest["vocab_size"]:
            raise TypeError("'vocab_size'")
        if ours != theirs:
            name = one_line(self.manifest["tokenizer"]["folder"], 500)
            raise UserError(
                f"{self.folder} was prepared with another tokenizer ({name}, fingerprint {theirs[:12]}) than that of "
                f"this run (fingerprint {ours[:12]}): prepare it again, or set tokenizer to that one"
            )

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.folder} is damaged: {what}; prepare it again, or copy it again.")


def _check_types(manifest: dict[str, Any]) -> None:
    """Raises KeyError or TypeError for what prepare would not have written: folders come from strangers, too."""

    def want(name: str, fits: Any) -> None:
        if not fits:
            raise TypeError(f"'{name}'")

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**48

    want("vocab_size", is_count(manifest["vocab_size"]))
    want("eos_id", is_count(manifest["eos_id"]) and manifest["eos_id"] < manifest["vocab_size"])
    want("encoding", manifest["encoding"] in ("uint16", "uint32"))
    want("add_bos", type(manifest["add_bos"]) is bool)
    for name in ("documents", "tokens"):
        want(name, is_count(manifest[name]))
    for name in ("folder", "fingerprint"):
        want(name, isinstance(manifest["tokenizer"][name], str))
    for shard in manifest["shards"]:
        for name in ("records", "bytes"):
            want(name, is_count(shard[name]))
        want("file", isinstance(shard["file"], str) and re.fullmatch(r"\w[\w.-]*", shard["file"], re.ASCII))
        want("sha256", isinstance(shard["sha256"], str))


@lru_cache(maxsize=256)  # files open at a time
def _open_shard(path: str, sha256: str) -> Any:
    """A reader that threads may share; sha256 keeps what is prepared anew apart from what was there before."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=2**15)
