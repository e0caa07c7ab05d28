"""Documents to windows of equal length: joined and cut as in the paper, packed whole, or cut from long ones alone.

A packing is computed from the lengths of documents, before a token of them is read: a table that says which part of
which document stands where. Tokens are read when a window is asked for.
"""

import logging
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora_jax.data.documents import Documents, InMemory
from longlora_jax.errors import UserError

log = logging.getLogger(__name__)

Example = dict[str, np.ndarray]
Pieces = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # window, document, start and stop of each, int64


@dataclass(frozen=True)
class Packing:
    """Which tokens make each window: pieces of documents, one after the other, then padding.

    first: [windows + 1], window w has the pieces first[w] to first[w + 1]; document, start, stop: [pieces] int64, in
    tokens of the document with its EOS. joined: a window is one segment, over the ends of documents; else every piece
    is one. account: where the tokens went, {documents, tokens, kept, cut, left_out, padded, dropped}: tokens with EOS,
    kept + dropped == tokens, windows * seq_len == kept + padded; cut and left_out count documents, of which a part
    or nothing was kept in one piece.
    """

    kind: str
    seq_len: int
    first: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    account: dict[str, int]

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def joined(self) -> bool:
        """Whether tokens see across the ends of documents, and no row has padding."""
        return self.kind == "concat"

    def line(self) -> str:
        """The account in a line for people."""
        count = {name: f"{n:,}" for name, n in self.account.items()}
        return (
            f"{self.kind}: {count['tokens']} tokens of {count['documents']} documents in {len(self):,} windows of "
            f"{self.seq_len:,}: {count['kept']} kept, {count['dropped']} dropped, {count['padded']} padded, "
            f"{count['cut']} documents cut, {count['left_out']} left out"
        )


def plan_packing(
    lengths: np.ndarray, seq_len: int, packing: str = "concat", *, min_tokens: int = 0, whole: bool = False
) -> Packing:
    """The packing of documents of these lengths [num], with the EOS that each gets; one of length 0 adds nothing.

    packing: concat, best_fit (decreasing) or long, see DataConfig; min_tokens: of long, 0 is seq_len. whole: best_fit
    leaves out documents that are longer than a window; else their whole windows come first, and the rest is packed
    with the others. Windows are in the order of the first document of each. Raises UserError if there is no window.
    """
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len} has no target to score: set it to 2 or more.")
    lengths = np.asarray(lengths, np.int64)
    if packing == "concat":
        pieces = _concat(lengths, seq_len)
    elif packing == "best_fit":
        pieces = _best_fit(lengths, seq_len, whole)
    else:
        assert packing == "long", packing
        pieces = _windows_of(np.where(lengths >= max(min_tokens, seq_len), lengths // seq_len, 0), seq_len)
    window, document, start, stop = pieces
    num = int(window.max()) + 1 if len(window) else 0
    if not num:
        raise UserError(_no_window(lengths, seq_len, packing, min_tokens))
    # In the order of the corpus, so that what is read in order is read from neighbouring places.
    order = np.lexsort((start, document, window))
    window, document, start, stop = window[order], document[order], start[order], stop[order]
    first = np.searchsorted(window, np.arange(num))
    by_document = np.argsort(document[first], kind="stable")
    counts = np.diff(first, append=len(window))[by_document]
    table = np.repeat(first[by_document] - np.cumsum(counts) + counts, counts) + np.arange(len(window))
    document, start, stop = document[table], start[table], stop[table]
    account = _account(lengths, num * seq_len, document, stop - start)
    return Packing(packing, seq_len, np.append(0, np.cumsum(counts)), document, start, stop, account)


def _account(lengths: np.ndarray, room: int, document: np.ndarray, sizes: np.ndarray) -> dict[str, int]:
    largest = np.zeros(len(lengths), np.int64)
    np.maximum.at(largest, document, sizes)
    kept, tokens = int(sizes.sum()), int(lengths.sum())
    return {
        "documents": int((lengths > 0).sum()),
        "tokens": tokens,
        "kept": kept,
        "cut": int(((largest > 0) & (largest < lengths)).sum()),
        "left_out": int(((largest == 0) & (lengths > 0)).sum()),
        "padded": room - kept,
        "dropped": tokens - kept,
    }


def _no_window(lengths: np.ndarray, seq_len: int, packing: str, min_tokens: int) -> str:
    if packing == "concat" or not lengths.any():
        return (
            f"a window of {seq_len:,} tokens is longer than the corpus ({lengths.sum():,} tokens): "
            "lower seq_len or give more text."
        )
    if packing == "long":
        return (
            f"no document has {max(min_tokens, seq_len):,} tokens, the longest has {lengths.max():,}: lower seq_len "
            "or min_tokens, or set packing to best_fit."
        )
    return (
        f"all {(lengths > 0).sum():,} examples are longer than a window of {seq_len:,} tokens, the shortest has "
        f"{lengths[lengths > 0].min():,}: raise seq_len."
    )


def _concat(lengths: np.ndarray, seq_len: int) -> Pieces:
    """All documents in a row, cut; what is left after the last whole window is dropped."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) // seq_len * seq_len if len(ends) else 0
    edges = np.union1d(ends[ends < total], np.arange(0, total + 1, seq_len))
    here, size = edges[:-1], np.diff(edges)
    document = np.searchsorted(ends, here, side="right")
    start = here - (ends - lengths)[document]
    return here // seq_len, document, start, start + size


def _windows_of(counts: np.ndarray, seq_len: int) -> Pieces:
    """The first counts[i] whole windows of each document, one piece each."""
    document = np.repeat(np.arange(len(counts)), counts)
    window = np.arange(len(document))
    start = (window - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    return window, document, start, start + seq_len


def _best_fit(lengths: np.ndarray, seq_len: int, whole: bool) -> Pieces:
    counts = np.zeros_like(lengths) if whole else lengths // seq_len
    windows = _windows_of(counts, seq_len)
    start = counts * seq_len
    packed = np.flatnonzero((lengths > start) & (lengths - start <= seq_len))
    window = len(windows[0]) + _fit((lengths - start)[packed], seq_len)
    rest = (window, packed, start[packed], lengths[packed])
    return tuple(np.concatenate(pair) for pair in zip(windows, rest, strict=True))  # pyright: ignore[reportReturnType]


def _fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each size [num], by best-fit decreasing: the longest first, each into the fullest bin that has room.

    Equal sizes go at once: the fullest bin with room stays the fullest until it has none, so it takes as many as it
    can. Time: a sort, O(num) for the bins that move, and O(log capacity) looks at a sorted list for each of at most
    `capacity` distinct sizes, since a bin that takes a size loses half of its room or more.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    with_room: dict[int, list[int]] = {}  # room in tokens -> bins
    rooms: list[int] = []  # its keys, sorted
    num = at = 0

    def put(room: int, some: list[int]) -> None:
        if some and room:
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, []).extend(some)

    distinct, counts = np.unique(sizes, return_counts=True)
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            i = bisect_left(rooms, size)
            room = rooms[i] if i < len(rooms) else capacity
            each = room // size
            need = -(-count // each)
            if i == len(rooms):
                some, num = list(range(num, num + need)), num + need
            else:
                some = with_room[room][-need:]
                del with_room[room][-need:]
                if not with_room[room]:
                    del with_room[room], rooms[i]
            taken = min(count, each * len(some))
            bins[order[at : at + taken]] = np.repeat(some, each)[:taken]
            in_last = taken - each * (len(some) - 1)
            put(room - each * size, some[:-1])
            put(room - in_last * size, some[-1:])
            at, count = at + taken, count - taken
    return bins


class Windows:
    """Documents under a packing: window i is read when it is asked for."""

    def __init__(self, documents: Documents, packing: Packing):
        self.packing = packing
        self.segmented = packing.kind == "best_fit"  # else no row has two segments, or padding
        self.documents = documents

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> Example:
        """{tokens, segment_ids, positions, loss_mask: [T] int32}.

        Segments count from 1, and their positions from 0; padding has segment 0. Nothing stands before the first
        token of a segment, so it is never scored.
        """
        table, length = self.packing, self.packing.seq_len
        tokens, segments, positions, scored = (np.zeros(length, np.int32) for _ in range(4))
        at = 0
        for segment, piece in enumerate(range(table.first[index], table.first[index + 1]), 1):
            size = int(table.stop[piece] - table.start[piece])
            here = slice(at, at + size)
            tokens[here], scored[here] = self._read(piece)
            segments[here] = 1 if table.joined else segment
            positions[here] = np.arange(size) + (at if table.joined else 0)
            at += size
        return {
            "tokens": tokens,
            "segment_ids": segments,
            "positions": positions,
            "loss_mask": np.where(positions > 0, scored, 0).astype(np.int32),
        }

    def _read(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scored) of a piece; the packer's own EOS is no part of the document."""
        document, start, stop = (int(x[piece]) for x in (self.packing.document, self.packing.start, self.packing.stop))
        length = int(self.documents.lengths[document])
        ids, scored = self.documents.read(document, min(start, length), min(stop, length))
        scored = np.ones(len(ids), np.int32) if scored is None else scored
        if stop > length:
            assert self.documents.eos_id is not None
            ids, scored = np.append(ids, np.int32(self.documents.eos_id)), np.append(scored, np.int32(1))
        return ids, scored

    def identity(self) -> dict[str, Any]:
        """What the windows are, as a dict that JSON can hold: equal for equal windows in the same order."""
        crc = 0
        for x in (self.packing.first, self.packing.document, self.packing.start, self.packing.stop):
            crc = zlib.crc32(x.astype("<i8").data, crc)
        table = {"seq_len": self.packing.seq_len, "packing": self.packing.kind, "windows": len(self), "pieces": crc}
        return self.documents.identity() | table


def pack(
    documents: Documents, seq_len: int, packing: str = "concat", *, min_tokens: int = 0, whole: bool = False
) -> Windows:
    """The windows of documents; arguments and errors as plan_packing's. The log has the account of the tokens."""
    lengths = documents.lengths + ((documents.lengths > 0) & (documents.eos_id is not None))
    table = plan_packing(lengths, seq_len, packing, min_tokens=min_tokens, whole=whole)
    log.info("packed %s", table.line())
    return Windows(documents, table)


def pack_documents(documents: Iterable[np.ndarray], seq_len: int, *, eos_id: int | None) -> np.ndarray:
    """Returns windows [num, seq_len] int32: all documents in a row, EOS after each, cut.

    documents: ids [tokens] of each; an empty one adds nothing. What is left after the last whole
    window is dropped, and the log says how much. Windows run across the ends of documents.
    Raises UserError if the corpus is shorter than one window. arXiv:2309.12307.
    """
    if eos_id is None:
        raise UserError(
            "the tokenizer names no end of text, which parts the documents of a window: "
            "set eos_token in tokenizer_config.json."
        )
    windows = pack(InMemory(documents, eos_id), seq_len)
    return np.stack([windows[i]["tokens"] for i in range(len(windows))])
