"""Windows to batches: shuffled anew each epoch, without end, at a position that can be saved.

Of a run of several processes each holds all windows, since where a window begins depends on every document before it,
and makes of each batch the rows that it is asked for.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from longlora_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


class Batches:
    """An endless iterator of batches whose order is a function of the windows and a seed alone.

    A batch holds `tokens`, `segment_ids`, `positions` and `loss_mask`, each [B, T] int32;
    loss_mask[t] says whether token t is scored as a target. step counts the batches handed out.
    rows: those of each batch that are handed out, by default all.
    """

    def __init__(self, windows: np.ndarray, *, batch_size: int, seed: int, rows: np.ndarray | None = None):
        if windows.ndim != 2 or not len(windows):
            raise UserError(f"windows of shape {windows.shape}: pass [num, seq_len], num > 0.")
        if batch_size < 1 or not 0 <= seed < 2**32:
            raise UserError(
                f"batch_size={batch_size}, seed={seed}: the first is at least 1, the second from 0 to 2**32 - 1."
            )
        import grain  # imports jax where it is installed: readers and tokenizers do without

        self._num_windows, self._batch_size = len(windows), batch_size
        self.tokens_per_epoch = windows.size
        self.steps_per_epoch = len(windows) / batch_size
        self._identity = {
            "windows": list(windows.shape),
            "batch_size": batch_size,
            "seed": seed,
        }
        source = grain.MapDataset.source(windows)  # pyright: ignore[reportArgumentType]  # any array will do
        self._order = source.shuffle(seed=seed).repeat()
        self._rows = np.arange(batch_size) if rows is None else rows
        self.step = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        first = self.step * self._batch_size
        windows: list[Any] = [self._order[first + int(row)] for row in self._rows]
        batch = as_batch(np.stack(windows))
        whole_before = self._epochs_read()
        self.step += 1
        if (whole := self._epochs_read()) > whole_before:
            log.info("after step %d the corpus has been read %d times", self.step, whole)
        return batch

    def _epochs_read(self) -> int:
        return self.step * self._batch_size // self._num_windows

    def get_state(self) -> dict[str, Any]:
        """Returns the position as a dict that JSON can hold."""
        return {**self._identity, "step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position: the next batch is the one that followed get_state().

        Raises UserError if the state is of other windows, another batch size or another seed.
        """
        saved = {name: state.get(name) for name in self._identity}
        if saved != self._identity:
            raise UserError(
                f"the saved data position belongs to {saved}, this run has {self._identity}: "
                "resume with the config of the run, or start in a new workdir."
            )
        self.step = state["step"]


def batches(windows: np.ndarray, *, batch_size: int, seed: int, rows: np.ndarray | None = None) -> Batches:
    """Returns the batches of windows [num, seq_len] int32; the last of an epoch runs into the next.

    Batch n is a function of (windows, batch_size, seed, n) alone, whoever takes which of its rows.
    """
    return Batches(windows, batch_size=batch_size, seed=seed, rows=rows)


def in_order(windows: np.ndarray, *, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
    """Batches of windows as they come, once, these rows of each; rows after the last window score nothing."""
    for first in range(0, len(windows), batch_size):
        there = first + rows < len(windows)
        batch = as_batch(windows[np.where(there, first + rows, 0)])
        batch["loss_mask"] *= there[:, None].astype(np.int32)
        yield batch


def as_batch(tokens: np.ndarray) -> Batch:
    """Windows [B, T] as a batch: one segment each, every token scored but the first."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.ones(tokens.shape, np.int32),
        "positions": positions.copy(),
        "loss_mask": (positions > 0).astype(np.int32),  # nothing stands before the first token
    }
