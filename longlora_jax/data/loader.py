"""Windows to batches: shuffled anew each epoch, mixed by weight, without end, at a position that can be saved.

Which windows make batch n is a function of the data, the seed and n alone. So the position is a step, and every host
and every worker process can make its part of a batch by itself, however many of them there are.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from longlora_jax.data.pack import Windows
from longlora_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

FEW_STEPS = 10  # an epoch that takes so many steps is worth a line of the log each time
AHEAD = 2  # batches that wait for their step, of this process or of each worker


class Batches:
    """An endless iterator of batches.

    A batch holds `tokens`, `segment_ids`, `positions` and `loss_mask`, each [B, T] int32;
    loss_mask[t] says whether token t is scored as a target. step counts the batches handed out.
    parts: the windows that are mixed; shares: [parts], of the rows of a batch, by the weights.
    segmented: whether a row may hold more than one segment, or padding.
    """

    def __init__(
        self,
        parts: Sequence["Windows | Joined"],
        *,
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
        workers: int = 0,
    ):
        if batch_size < 1 or not 0 <= seed < 2**32:
            raise UserError(
                f"batch_size={batch_size}, seed={seed}: the first is at least 1, the second from 0 to 2**32 - 1."
            )
        self.shares = np.asarray(weights, np.float64) / sum(weights)
        self.segmented = any(part.segmented for part in parts)
        self.step = 0
        self.parts, self._batch_size, self._seed, self._workers = parts, batch_size, seed, workers
        self._rows = np.arange(batch_size) if rows is None else rows
        self._identity = {
            "data": [part.identity() for part in parts],
            "weights": list(map(float, weights)),
            "batch_size": batch_size,
            "seed": seed,
        }
        self._stream: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._start()
            self._end = weakref.finalize(self, self._stream.close)  # at the latest when this process ends
        try:
            batch = next(self._stream)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):  # grain has no class of its own for it
                raise
            raise UserError(
                f"a worker process of the loader was ended from outside ({_exit_code(error)}): if this machine is out "
                "of memory, set workers lower, or 0"
            ) from error
        if self._workers:  # their memory is shared, and would still be there when this process ends
            batch = {name: np.array(x) for name, x in batch.items()}
        self.step += 1
        for i, (before, now) in enumerate(zip(self.epochs(self.step - 1), self.epochs(self.step), strict=True)):
            # A corpus of a few batches ends at every step or two: then only every doubling is news.
            ends, rare = int(now) > int(before), now - before < 1 / FEW_STEPS
            if ends and (rare or int(now).bit_length() > int(before).bit_length()):
                what = "the corpus" if len(self.parts) == 1 else f"corpus {i + 1} of {len(self.parts)}"
                log.info("after step %d %s has been read %d times", self.step, what, int(now))
        return batch

    def _start(self):
        """The stream of batches from self.step on."""
        import grain  # imports jax where it is installed: readers and tokenizers do without
        from absl import flags

        rows = _Rows(self.parts, self._identity["weights"], self._batch_size, self._seed, self._rows, self.step)
        batches = grain.MapDataset.source(rows)
        if not self._workers:
            return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
        batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if not flags.FLAGS.is_parsed():  # grain reads absl's flags, which only absl's own commands parse
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=AHEAD)
        return iter(batches.mp_prefetch(options, worker_init_fn=_begin_worker))

    def epochs(self, steps: int) -> list[float]:
        """How often each part of the data has been read after so many steps."""
        rows = steps * self._batch_size * self.shares
        return [float(n) / len(part) for n, part in zip(rows, self.parts, strict=True)]

    def identity(self) -> dict[str, Any]:
        """What the batches are made of, as a dict that JSON can hold: equal where all batches are equal."""
        return self._identity

    def get_state(self, step: int | None = None) -> dict[str, Any]:
        """Returns the position after `step` batches (those handed out) as a dict that JSON can hold."""
        return {**self._identity, "step": self.step if step is None else step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position: the next batch is the one that followed get_state().

        Raises UserError if the state is of other data, packing, weights, batch size or seed.
        """
        if different := list(_differences({**state, "step": 0}, {**self._identity, "step": 0})):
            raise UserError(
                f"the saved position belongs to other data: {'; '.join(different)}: resume with the config and the "
                "data of the run, or start in a new workdir."
            )
        self.close()
        self.step = state["step"]

    def close(self) -> None:
        """Ends the reader thread or the worker processes."""
        if self._stream is not None:
            self._end()
        self._stream = None


class _Rows:
    """Batch `first` and all after it, at random access: the rows of this host, read in whichever process asks."""

    def __init__(self, parts, weights: Sequence[float], batch_size: int, seed: int, rows: np.ndarray, first: int):
        import grain

        # Each part in an order of its own: the same corpus in two packings must not come in step.
        shuffled = [grain.MapDataset.source(p).shuffle((seed + i) % 2**32).repeat() for i, p in enumerate(parts)]
        self._windows: Any = shuffled[0] if len(parts) == 1 else grain.MapDataset.mix(shuffled, weights)
        self._batch_size, self._rows, self._first = batch_size, rows, first

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        start = (self._first + index) * self._batch_size
        return _stack([self._windows[start + int(row)] for row in self._rows])


def _begin_worker(index: int, count: int) -> None:
    """In a worker process: Ctrl-C and SIGTERM are for the main process, and its end, however it comes, the worker's."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch():
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _exit_code(error: RuntimeError) -> str:
    words = str(error).partition("exit code ")[2].split()
    return f"exit code {words[0].rstrip('.')}" if words else "no exit code"


def _differences(saved: Any, ours: Any, name: str = "") -> Iterator[str]:
    """What differs between two trees of dicts and lists, by name."""
    if isinstance(saved, list) and isinstance(ours, list) and len(saved) == len(ours):
        saved, ours = dict(enumerate(saved)), dict(enumerate(ours))
    if isinstance(saved, dict) and isinstance(ours, dict):
        for key in dict.fromkeys((*saved, *ours)):
            inner = f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}".lstrip(".")
            yield from _differences(saved.get(key), ours.get(key), inner)
    elif saved != ours:
        yield f"{name} was {_short(saved)}, is {_short(ours)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class Joined:
    """Ids [num, T] as windows of one segment each, every token scored but the first."""

    segmented = False

    def __init__(self, ids: np.ndarray):
        if ids.ndim != 2 or not len(ids):
            raise UserError(f"windows of shape {ids.shape}: pass [num, seq_len], num > 0.")
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Batch:
        """As Windows does."""
        return as_batch(self._ids[index])

    def identity(self) -> dict[str, Any]:
        """As Windows does."""
        return {"windows": list(self._ids.shape), "crc32": zlib.crc32(np.ascontiguousarray(self._ids).data)}


def batches(
    windows: "np.ndarray | Windows | Sequence[Windows]",
    *,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    weights: Sequence[float] | None = None,
    workers: int = 0,
) -> Batches:
    """Returns the batches of windows; the last of an epoch runs into the next.

    windows: ids [num, seq_len], Windows, or a list of Windows to mix: rows come from them in turn by their weights
    (default: equal). rows: those of each batch that are handed out, by default all. workers: processes that read
    ahead, 0 is a thread of this one.
    Batch n is a function of (windows, weights, batch_size, seed, n) alone, whoever takes which of its rows.
    """
    given: Any = windows if isinstance(windows, list | tuple) else [windows]
    parts = [Joined(part) if isinstance(part, np.ndarray) else part for part in given]
    weights = [1.0] * len(parts) if weights is None else weights
    return Batches(parts, weights=weights, batch_size=batch_size, seed=seed, rows=rows, workers=workers)


def in_order(
    windows: np.ndarray | Windows, *, batch_size: int, rows: np.ndarray, max_windows: int | None = None
) -> Iterator[Batch]:
    """Batches of windows as they come, once, these rows of each; rows after the last window score nothing."""
    part = Joined(windows) if isinstance(windows, np.ndarray) else windows
    num = min(len(part), max_windows or len(part))
    for first in range(0, num, batch_size):
        there = first + rows < num
        batch = _stack([part[int(i)] for i in np.where(there, first + rows, 0)])
        batch["loss_mask"] *= there[:, None].astype(np.int32)
        yield batch


def as_batch(tokens: np.ndarray) -> Batch:
    """Windows [..., T] as a batch: one segment each, every token scored but the first."""
    positions = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.ones(tokens.shape, np.int32),
        "positions": positions.copy(),
        "loss_mask": (positions > 0).astype(np.int32),  # nothing stands before the first token
    }


def _stack(examples: list[Batch]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
