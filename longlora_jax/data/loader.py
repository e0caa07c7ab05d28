"""Windows to batches: shuffled anew each epoch, without end, at a position that can be saved."""

import logging
from typing import Any

import numpy as np

from longlora_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


class Batches:
    """An endless iterator of batches whose order is a function of the windows and a seed alone.

    A batch holds `tokens`, `segment_ids`, `positions` and `loss_mask`, each [B, T] int32;
    loss_mask[t] says whether token t is scored as a target. step counts the batches handed out.
    """

    def __init__(self, windows: np.ndarray, *, batch_size: int, seed: int):
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
        dataset = source.shuffle(seed=seed).repeat()
        # Nothing remains of an endless repeat; counting a remainder overflows at batch_size 1.
        dataset = dataset.batch(batch_size, drop_remainder=True).map(as_batch)
        # No threads: the windows lie in memory, and grain's default would hold 500 batches ready.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self.step = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
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
        self._iterator.set_state({"next_index": state["step"]})
        self.step = state["step"]


def batches(windows: np.ndarray, *, batch_size: int, seed: int) -> Batches:
    """Returns the batches of windows [num, seq_len] int32; the last of an epoch runs into the next.

    Batch n is a function of (windows, batch_size, seed, n) alone.
    """
    return Batches(windows, batch_size=batch_size, seed=seed)


def as_batch(tokens: np.ndarray) -> Batch:
    """Windows [B, T] as a batch: one segment each, every token scored but the first."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.ones(tokens.shape, np.int32),
        "positions": positions.copy(),
        "loss_mask": (positions > 0).astype(np.int32),  # nothing stands before the first token
    }
