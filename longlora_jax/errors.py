"""What the user got wrong, or the machine has run out of: one clear line on standard error and exit code 2."""

import argparse
import errno
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A fault that the user can mend: what was given, what is needed, what to change."""


_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or choose another folder"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN), "look at the disk or its mount"),
}


def in_plain_words(error: BaseException) -> str | None:
    """What the machine has run out of or lost, and what to do, in one line; None if the error is another one."""
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: {_DISK[error.errno]}, and start again"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in text:
        return (
            f"out of memory ({text[:200].rstrip(' .') or 'of this machine'}): lower batch_size or raise accumulation, "
            "set remat=block, raise chunks, lower loss_chunk, or take more devices; "
            "python -m longlora_jax.plan says what fits"
        )
    return None


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose faults are UserErrors: one line, without the usage before it."""

    def error(self, message: str):
        """Raises UserError."""
        raise UserError(f"{message} (see --help)")


def run(main: Callable[[], None]) -> None:
    """Runs a command; a UserError becomes one line on standard error and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
