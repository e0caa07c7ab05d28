"""A file lock on a workdir, so that two runs never write to one: the second is told who is there."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from longlora_jax.errors import UserError
from longlora_jax.parallel import distributed

LOCK = "run.lock"  # who has the workdir, as JSON; it stays when the run has ended, the lock on it does not
_NONE_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class WorkdirLock:
    """An advisory lock (flock) of the run's first process: `with WorkdirLock(workdir) as lock:`, then lock.acquire().

    The system releases it when the process ends, however it ends. File systems that have no such locks go without.
    """

    def __init__(self, workdir: str):
        self._path = Path(workdir) / LOCK
        self._file: Any = None

    def acquire(self) -> None:
        """Takes the lock, and makes the workdir if there is none. Raises UserError if another process has it."""
        if not distributed.is_first():
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            folder = self._path.parent
            raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --workdir") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NONE_HERE:
                return
            raise UserError(
                f"{self._path.parent} is in use by {self._holder()}: wait until that run has ended, end it, or choose "
                "another --workdir"
            ) from error
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}, self._file)
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            found = json.loads(self._file.read())
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
