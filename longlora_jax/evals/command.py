"""What the commands of evaluations share: typed flags, and checks that cost nothing before hours are spent."""

import argparse
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError

log = logging.getLogger(__name__)


def number(kind: type, least: float, *, above: bool = False, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag, for argparse: an int or float from least (above: not least itself) to most."""

    def read(text: str):
        value = kind(text)
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} must be at most {most}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it: invalid whole number value
    return read


def numbers(kind: type, least: float, *, most: float = math.inf) -> Callable[[str], list]:
    """The type of a flag that takes several numbers with commas between them."""
    one = number(kind, least, most=most)

    def read(text: str):
        return [one(part) for part in text.split(",")]

    read.__name__ = f"list of {one.__name__}s"
    return read


def start_logging() -> None:
    """Shows what the package has to say on standard error, and of others warnings alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("longlora_jax").setLevel(logging.INFO)


def check_outputs(json: str | None, plot: str | None) -> None:
    """Raises UserError if a file of results or a picture could not be written."""
    for path in filter(None, (json, plot)):
        folder = Path(path).absolute().parent
        if Path(path).is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{path} cannot be written: give a file in an existing folder that you may write to")
    if plot and Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot} must end in .png, .svg or .pdf")


def note_window(lengths: Iterable[int], config: ModelConfig) -> None:
    """Says which lengths are more than the model's own window: a question worth asking, but not by mistake."""
    own = config.max_position_embeddings
    if beyond := [f"{length:,}" for length in lengths if length > own]:
        log.info("%s tokens are more than the model's own window of %s", ", ".join(beyond), f"{own:,}")
