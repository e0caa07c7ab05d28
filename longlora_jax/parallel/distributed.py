"""Several processes as one run: they meet, they agree, one of them speaks, and what ends one of them ends all.

jax.distributed joins their devices, and finds out from Cloud TPU, GKE, SLURM or Open MPI who takes part. In a run of
one process nothing here does anything.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # the processes' key-value store has no public name
from jax.errors import JaxRuntimeError
from tqdm import tqdm

from longlora_jax.errors import UserError, in_plain_words
from longlora_jax.parallel.rendezvous import rendezvous

_KEY = "longlora_jax"
_ALONE = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # launchers that say here how many processes they have started
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # jax knows Open MPI 4 and no other
# What jax says where no launcher is around, and in a process that has computed already: nobody waits for that one.
_NOBODY = ("coordinator_address should be defined", "jax.distributed.initialize() must be called before")
_LOST = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|CoordinationService")
_RESUME = "start the same command again on all hosts, the run resumes from its newest checkpoint"
_POLL_SECONDS = 0.5
_LAST_SECONDS = 3  # the first process waits so long for the others to end before it does
_ANSWER_SECONDS = 60  # a thread of each process answers every half second, whatever its steps do
_SHARED_SECONDS = 60  # a network file system may show a folder as it was so long ago
_FOREVER_MS = 7 * 24 * 3600 * 1000  # one host may fetch a model while the others wait; one that is lost ends the wait

_run: "_Run | None" = None


def join(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: int = 300,
    heartbeat_seconds: int = 60,
) -> None:
    """Makes this process one of a run of several, if the arguments or a launcher that jax knows say so.

    coordinator: HOST:PORT of process 0; without it, JAX_COORDINATOR_ADDRESS. start_seconds: how long the processes
    wait for each other; heartbeat_seconds: after so long without a sign of life a process is given up.
    To be called before jax computes anything. Raises UserError if the processes do not come together.
    """
    global _run
    named = coordinator or num_processes is not None or process_id is not None
    if num_processes == 1 or not named and any(os.environ.get(name) == "1" for name in _ALONE):
        return
    # SIGTERM is for resilience/watchdog.py.
    jax.config.update("jax_enable_preemption_service", False)
    limits: Any = {"initialization_timeout": start_seconds, "heartbeat_timeout_seconds": heartbeat_seconds}
    if named:
        address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        if not address or num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator={address} --num_processes={num_processes} --process_id={process_id}: give all three, "
                "HOST:PORT of process 0, how many processes there are, and which of them this is, from 0 on"
            )
        rendezvous(address, num_processes, process_id, start_seconds)
        jax.distributed.initialize(
            address, num_processes, process_id, cluster_detection_method="deactivate", **limits
        )  # fmt: skip
    elif not _join_cluster(limits):
        return
    if jax.process_count() > 1:
        _run = _Run()


def _join_cluster(limits: dict[str, Any]) -> bool:
    """Joins the processes of the cluster that jax finds itself in; False if it finds none."""
    try:
        jax.distributed.initialize(**limits)
    except Exception as error:  # those of HTTP, Kubernetes and sockets come through
        if str(error).startswith(_NOBODY):
            if count := next((os.environ[name] for name in _MPI if os.environ.get(name, "1") != "1"), ""):
                raise UserError(
                    f"MPI has started {count} processes, and jax cannot find out which of them this is: give "
                    "--coordinator HOST:PORT of process 0, --num_processes and --process_id"
                ) from error
            return False
        raise UserError(
            f"the processes of the cluster could not be joined ({_first_line(error)}): give --coordinator, "
            "--num_processes and --process_id, or --num_processes=1 to train in this process alone"
        ) from error
    return True


def is_first() -> bool:
    """Whether this is the process that speaks and writes for the run."""
    return _run is None or _run.index == 0


def check_same(point: str, values: Callable[[], dict[str, Any]]) -> None:
    """Waits until all processes have come to this point of the program, each with the values of process 0.

    point: a name, used once in a run; values: what JSON can hold, by name. Raises UserError where they differ.
    """
    if _run is not None:
        _run.check_same(point, values())


def check_shared(path: str) -> None:
    """Waits until process 0 has come here and raises UserError if a file that it has written is not here as well."""
    check_same(path, dict)
    deadline = time.monotonic() + _SHARED_SECONDS
    while _run is not None and not os.path.exists(path):
        if time.monotonic() > deadline:
            raise UserError(f"{path}, written by process 0, is not there: choose a --workdir that all hosts share")
        time.sleep(1)


@contextlib.contextmanager
def one_end() -> Iterator[None]:
    """Around all that a run does: what ends it in one process ends it in all, and the first one says why.

    A UserError ends with exit code 2, anything else with 1. This process does not come back from either.
    """
    if _run is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        _run.fail(error)
    _run.leave()


def end_all(reason: str, code: int) -> NoReturn:
    """Ends this process and all others of the run at once, from whatever thread: one line, and this exit code."""
    if _run is not None:
        _run.end_all({"reason": reason, "code": code, "lost": False, "process": _run.index})
    tqdm.write(f"error: {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ask_to_stop() -> None:
    """Tells all processes of the run that it should end early: is_stop_asked()."""
    if _run is not None:
        _run.ask_to_stop()


def is_stop_asked() -> bool:
    """Whether a process of the run has asked all to end early."""
    return _run is not None and _run.is_stop_asked()


def highest(number: int) -> int:
    """The highest of the numbers that the processes give; it waits for all of them, and is asked once in a run."""
    return number if _run is None else _run.highest(number)


class _Run:
    """This process as one of several: jax's key-value store, and a thread that watches it for the end."""

    def __init__(self):
        self.index, self._count = jax.process_index(), jax.process_count()
        self._store: Any = jax_distributed.global_state.client
        self._own: dict[str, Any] | None = None
        self._over, self._ending = threading.Event(), threading.Lock()
        # absl shows the stacks of all threads when a process aborts. Here that means that another one was lost.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        self._last_words = _LastWords(
            f"error: process {self.index} of {self._count} was killed, or has lost another one: {_RESUME}"
        )
        self._store.key_value_set(f"{_KEY}/host/{self.index}", socket.gethostname())
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def check_same(self, point: str, values: dict[str, Any]) -> None:
        key = f"{_KEY}/same/{point}"
        if self.index == 0:
            self._store.key_value_set(key, json.dumps(values))
        self._store.wait_at_barrier(key, _FOREVER_MS)
        first = json.loads(self._store.key_value_try_get(key))
        if other := [name for name, value in json.loads(json.dumps(values)).items() if value != first[name]]:
            raise UserError(
                f"{', '.join(other)} is not what process 0 has: start all processes with the same command and files"
            )

    def fail(self, error: BaseException) -> None:
        """Ends the run in all processes; the first to fail says why, but process 0 speaks for itself."""
        self.end_all(_fault(error) | {"process": self.index})

    def end_all(self, fault: dict[str, Any]) -> None:
        """Ends the run in all processes because of this fault, or of one that another process was faster to report."""
        if not fault["lost"]:
            self._own = fault
        first = f"{_KEY}/fault/first"
        try:
            self._store.key_value_set(first, json.dumps(fault))
        except JaxRuntimeError:  # another process was faster: it may be the one that this one has lost
            with contextlib.suppress(JaxRuntimeError):
                fault = json.loads(self._store.key_value_try_get(first))
        self._end(fault)

    def ask_to_stop(self) -> None:
        self._store.key_value_set(f"{_KEY}/stop/{self.index}", "")

    def is_stop_asked(self) -> bool:
        try:
            return bool(self._store.key_value_dir_get(f"{_KEY}/stop"))
        except JaxRuntimeError:  # process 0 is lost: jax is about to abort this one
            return False

    def highest(self, number: int) -> int:
        self._store.key_value_set(f"{_KEY}/number/{self.index}", str(number))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while len(numbers := self._store.key_value_dir_get(f"{_KEY}/number")) < self._count:
            if time.monotonic() > deadline:
                end_all(f"of {self._count} processes {len(numbers)} answered in {_ANSWER_SECONDS} s: {_RESUME}", 1)
            time.sleep(0.05)
        return max(int(value) for _, value in numbers)

    def leave(self) -> None:
        """Waits until all processes have come to their end."""
        self._over.set()
        self._watcher.join()
        jax.distributed.shutdown()
        self._last_words.cancel()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            with contextlib.suppress(JaxRuntimeError):  # process 0 is lost: jax is about to abort this one
                if found := self._store.key_value_dir_get(f"{_KEY}/fault"):
                    self._end(json.loads(found[0][1]))

    def _end(self, fault: dict[str, Any]) -> None:
        self._ending.acquire()  # for good
        missing, speak = set(range(self._count)), self.index == 0
        deadline = time.monotonic() + _LAST_SECONDS
        try:
            self._store.key_value_set(f"{_KEY}/gone/{self.index}", "")
            # Process 0 holds the store: it goes last, as jax aborts the others without a word when it goes.
            while self.index == 0 and missing and time.monotonic() < deadline:
                missing -= {int(key.rsplit("/")[-1]) for key, _ in self._store.key_value_dir_get(f"{_KEY}/gone")}
                time.sleep(0.05)
        except JaxRuntimeError:
            missing, speak = {0}, True
        fault = (self._own or fault) if self.index == 0 else fault
        if speak:
            tqdm.write(f"error: {self._line(fault, missing)}", file=sys.stderr)
        self._last_words.cancel()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(fault["code"])

    def _line(self, fault: dict[str, Any], missing: set[int]) -> str:
        if fault["lost"]:
            who = ", ".join(self._name(i) for i in sorted(missing)) or "another process"
            return f"lost {who} ({fault['reason']}): {_RESUME}"
        return fault["reason"] if fault["process"] == 0 else f"{self._name(fault['process'])}: {fault['reason']}"

    def _name(self, process: int) -> str:
        try:
            return f"process {process} on {self._store.key_value_try_get(f'{_KEY}/host/{process}')}"
        except JaxRuntimeError:
            return f"process {process}"


class _LastWords:
    """A shell that says something if this process ends before it is told that all is said.

    jax aborts a process that has lost process 0, or that hears of a lost one, from a thread of its own. After that
    nothing in the process can speak.
    """

    def __init__(self, text: str):
        # In a session of its own: Ctrl-C in a terminal goes to all processes that were started there.
        command = ["sh", "-c", 'read -r word || printf "\n%s\n" "$0" >&2', text]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def cancel(self) -> None:
        with contextlib.suppress(OSError):
            self._shell.communicate(b"\n")


def _fault(error: BaseException) -> dict[str, Any]:
    reason, lost = _first_line(error), False
    if isinstance(error, UserError) or in_plain_words(error):
        return {"reason": reason, "code": 2, "lost": lost}
    if isinstance(error, Exception) and _LOST.search(str(error)):
        lost = True
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    return {"reason": reason, "code": 130 if isinstance(error, KeyboardInterrupt) else 1, "lost": lost}


def _first_line(error: BaseException) -> str:
    if words := str(error) if isinstance(error, UserError) else in_plain_words(error):
        return words
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
