"""What the user got wrong, or the machine has run out of: one clear line on standard error and exit code 2."""

import argparse
import errno
import logging
import math
import os
import select
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A fault that the user can mend: what was given, what is needed, what to change."""


_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or choose another folder"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN), "look at the disk or its mount"),
}


TRAINING = (
    "lower batch_size or raise accumulation, set remat=block, raise chunks, lower loss_chunk, or take more devices; "
    "python -m longlora_jax.plan says what fits"
)
COMMAND = "give it less at once (shorter texts, smaller batches or chunks, --dtype bfloat16), or take a larger machine"


def in_plain_words(error: BaseException, advice: str = TRAINING) -> str | None:
    """What the machine has run out of or lost, and what to do, in one line; None if the error is another one.

    advice: what to do about memory.
    """
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: {_DISK[error.errno]}, and start again"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in text:
        return f"out of memory ({text[:200].rstrip(' .') or 'of this machine'}): {advice}"
    return None


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose faults are UserErrors: one line, without the usage before it."""

    def error(self, message: str):
        """Raises UserError."""
        raise UserError(f"{message} (see --help)")


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False, wanted: str = ""):
    """The type of a flag, for argparse: an int or float (kind) from least (above: not least itself) to most.

    wanted: what a fault asks for, if that is more than the bound that is broken.
    """

    def read(text: str):
        value = kind(text)
        bound = f"at most {most}" if value > most else f"{'above' if above else 'at least'} {least}"
        if not least <= value <= most or value == math.inf or (above and value == least):  # NaN is below as well
            raise argparse.ArgumentTypeError(f"{text} must be {wanted or bound}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it: invalid whole number value
    return read


def numbers(kind: type, least: float, most: float = math.inf):
    """The type of a flag that takes several such numbers with commas between them."""
    one = number(kind, least, most)

    def read(text: str):
        return [one(part) for part in text.split(",")]

    read.__name__ = f"list of {one.__name__}s"
    return read


# Of every command that reads a run (see weights/workdir.at_step).
QUANTIZE = ("nf4", "int8")
QUANTIZE_HELP = (
    "keep the blocks' matrices in memory in 4 or 8 bits, as bitsandbytes quantizes them (default: as they are)"
)
STEP_HELP = "of a run: the checkpoint of this step, or best, that of the lowest eval/loss (default: the newest)"
# Of every command that reads a prompt: what generate/session.chunk_size takes.
CHUNK_HELP = "speed and memory only (default: 4096 on GPUs, else 512)"


def start_logging() -> None:
    """Shows what the package has to say on standard error, and of others warnings alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("longlora_jax").setLevel(logging.INFO)


def run(main: Callable[[], None]) -> None:
    """Runs a command: what the user or the machine lacks is one line on standard error and exit code 2.

    Ctrl-C is exit code 130; where nobody reads the output any more (`| head`) it ends quietly, with 141 as others do.
    """
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(141)
        if not (reason := str(error) if isinstance(error, UserError) else in_plain_words(error, COMMAND)):
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


def _nobody_reads() -> bool:
    """Whether it is standard output that broke; if so, what is left of it goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken
