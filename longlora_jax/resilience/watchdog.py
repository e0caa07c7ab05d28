"""Watchdog of a run: after SIGTERM or Ctrl-C the run saves and ends, and a run that stalls is ended.

Both with exit code 75; the same command goes on from the newest checkpoint. Ours because the preemption service of jax
needs several processes, and no part of jax or orbax ends a step or a save that hangs.
"""

import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from longlora_jax.parallel import distributed

log = logging.getLogger("longlora_jax")

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, start it again
_POLL_SECONDS = 0.5
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# A signal may reach a process twice, from the terminal or the scheduler and from a script around it.
_SAME_SECONDS = 1.5
_GRACE_SECONDS = 600  # to save after SIGTERM; most schedulers send SIGKILL long before
_HERE = str(Path(__file__).parents[2])


class Watchdog:
    """A thread beside the steps of a run. `with Watchdog(stall_seconds) as watchdog:` in the main thread.

    stall_seconds: a run that completes no step for so long is ended.
    """

    def __init__(self, stall_seconds: float):
        self._stall_seconds = stall_seconds
        self._step: int | None = None  # the last one that is done; None before the first batch is there
        self._last: int | None = None  # the step at which to save and end
        self._deadline = float("inf")
        self._told = float("inf")  # when this process had its own first signal; others of the run may have theirs
        self._asked, self._deciding, self._over = False, threading.Lock(), threading.Event()

    def __enter__(self) -> "Watchdog":
        # Python runs its handlers between two lines of Python, and a step or a save that hangs has none. The number of
        # the signal goes into a pipe at once.
        self._pipe, pipe = os.pipe()
        os.set_blocking(pipe, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._fd = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()
        os.close(signal.set_wakeup_fd(self._fd))
        os.close(self._pipe)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def begin(self, step: int) -> None:
        """From here on, so many are done already: signals wait for the next step, and it must come in time."""
        with self._deciding:
            self._step, self._deadline = step, time.monotonic() + self._stall_seconds

    def due(self, step: int) -> bool:
        """Whether to save and end after this step, which is done; in all processes it is the same step."""
        with self._deciding:
            self._step = step
            if not self._asked:
                self._deadline = time.monotonic() + self._stall_seconds
            return self._last is not None and step >= self._last

    def _watch(self) -> None:
        while not self._over.is_set():
            if select.select([self._pipe], [], [], _POLL_SECONDS)[0]:
                for number in os.read(self._pipe, 64):
                    if number in _SIGNALS:
                        self._terminate(_SIGNALS[signal.Signals(number)])
            if self._last is None and distributed.is_stop_asked():
                self._decide()
            if time.monotonic() > self._deadline:
                self._end_stalled()

    def _terminate(self, name: str) -> None:
        if self._step is None:
            distributed.end_all(f"{name} before the first step: nothing to save, start the same command again", AGAIN)
        now = time.monotonic()
        if now > self._told + _SAME_SECONDS:
            distributed.end_all(f"a second {name}: ended without waiting for the save, start the same command again to "
                                "go on from the newest checkpoint", AGAIN)  # fmt: skip
        self._told = min(self._told, now)
        if self._asked:  # by another process, or by the same signal
            return
        log.info("%s: saving after this step", name)
        self._asked, self._deadline = True, now + _GRACE_SECONDS
        distributed.ask_to_stop()
        self._decide()

    def _decide(self) -> None:
        """Names the step at which all end: one that none of them has passed. Their threads agree while steps run."""
        with self._deciding:  # who comes to the end of a step now waits for the answer
            self._asked, self._deadline = True, min(self._deadline, time.monotonic() + _GRACE_SECONDS)
            self._last = distributed.highest(-1 if self._step is None else self._step) + 1

    def _end_stalled(self) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        ours = [f for f in traceback.extract_stack(frame) if f.filename.startswith(_HERE)]
        where = f" ({Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line})" if ours else ""
        seconds = (
            f"{_GRACE_SECONDS:g} seconds after it was asked to end"
            if self._asked
            else f"{self._stall_seconds:g} seconds"
        )
        distributed.end_all(
            f"step {self._step} is done, and nothing has moved for {seconds}{where}: look at the disks and the other "
            "hosts, or raise --stall_seconds; the same command goes on from the newest checkpoint",
            AGAIN,
        )
