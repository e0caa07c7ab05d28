"""The numbers of a run as they come: steps that were skipped, losses that jump, and the end where nothing is right."""

import collections
import logging
import math
import os
import statistics
from typing import Any

import jax
import numpy as np

from longlora_jax.data import Batches
from longlora_jax.errors import UserError
from longlora_jax.parallel import distributed

log = logging.getLogger("longlora_jax")

_KNOWN = 100  # logged losses that a new one is held against
_FEWEST = 20  # with fewer of them nothing is said
_SIGMAS, _SHARE = 6, 0.1  # a jump is so many standard deviations above the median, and at least this share of it


class Health:
    """Looks at the steps that are logged; max_bad_steps: so many skipped in a row end the run."""

    def __init__(self, max_bad_steps: int, *, skipped: int = 0):
        self._max_bad_steps, self._skipped = max_bad_steps, skipped
        self._losses: collections.deque[float] = collections.deque(maxlen=_KNOWN)

    def look(self, step: int, values) -> dict[str, float]:
        """What to log of a step beside its loss: {"train/skipped": those of the whole run}, {} where there are none."""
        loss, skipped = float(values["loss"]), int(values["skipped"])
        if skipped > self._skipped:
            log.warning(
                "step %d: loss %g, gradient %g; %d steps without an update since the last line, %d in all",
                *(step, loss, float(values["grad_norm"]), skipped - self._skipped, skipped),
            )
        elif self._jumped(loss):
            log.warning("step %d: loss %g, the median before it is %g", step, loss, statistics.median(self._losses))
        if math.isfinite(loss):
            self._losses.append(loss)
        self._skipped = skipped
        return {"train/skipped": skipped} if skipped else {}

    def check(self, step: int, values, data: Batches, workdir: str) -> None:
        """Raises UserError if too many steps in a row were skipped; the batch of the last one is left in the workdir.

        step: how many are done. Of several processes each leaves the rows that it has read.
        """
        in_a_row = int(values["in_a_row"])
        if in_a_row < self._max_bad_steps:
            return
        data.set_state(data.get_state(step - 1))
        mine = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
        path = os.path.join(workdir, f"bad_batch_{step}{mine}.npz")
        batch: dict[str, Any] = {"step": step, **next(data)}
        np.savez_compressed(path, **batch)
        distributed.check_same("bad batch", dict)  # all have written theirs before the first one ends all
        raise UserError(
            f"steps {step - in_a_row + 1} to {step} were skipped, their loss or gradient is not finite: look at "
            f"{path}, the batch of the last one; start a new workdir with other data or a lower optim.learning_rate"
        )

    def _jumped(self, loss: float) -> bool:
        if len(self._losses) < _FEWEST:
            return False
        median = statistics.median(self._losses)
        # The median of the distances, times 1.4826, is the standard deviation of a normal distribution.
        sigma = 1.4826 * statistics.median(abs(x - median) for x in self._losses)
        return loss > median + max(_SIGMAS * sigma, _SHARE * median)
