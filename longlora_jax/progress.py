"""Progress of long work on standard error: tqdm, set up once for a terminal and for a log file."""

import sys

from tqdm import tqdm

_silent = False


def silence() -> None:
    """Draws no bar any more in this process: another one reports for it."""
    global _silent
    _silent = True


def progress_bar(total: int | None, *, label: str, unit: str, start: int = 0, delay: float = 0) -> tqdm:
    """A progress bar with the time left; where standard error is no terminal, a line of text now and then.

    total: None where nobody knows it, and so no time left. unit: "B" counts bytes, shown in MB and GB; anything else is
    counted as it is. delay: seconds before anything is drawn.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        delay=delay,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=0.5 if terminal else 15,
        maxinterval=0.5 if terminal else 15,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        disable=_silent,
    )
