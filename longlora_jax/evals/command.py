"""What the commands of evaluations share: checks that cost nothing before hours are spent."""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from longlora_jax.attention.rope import ROPE_TYPES
from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError, number
from longlora_jax.files import check_writable

log = logging.getLogger(__name__)

# Of the settings in a file of results: fields that say where something lies, which may be spelled in many ways, and
# those that say what it is.
PLACES = {"model": "weights", "data": "data_digests", "haystack": "haystack_digest"}


def check_outputs(json: str | None, plot: str | None) -> None:
    """Raises UserError if a file of results or a picture could not be written."""
    for path in filter(None, (json, plot)):
        check_writable(path)
    if plot and Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot} must end in .png, .svg or .pdf")


def add_rope_flags(add: Callable[..., Any], length: str) -> None:
    """The flags of an untrained scaling of positions; add: a parser's add_argument, length: what it is stretched to."""
    add(
        "--rope_type",
        choices=[name for name in ROPE_TYPES if name != "longrope"],  # that one comes with trained factors
        help="stretch the model's positions for lengths beyond its window, untrained (default: as the model is)",
    )
    add(
        "--rope_factor",
        type=number(float, 1),
        metavar="F",
        help=f"with --rope_type: times the model's original window (default: {length} / original, rounded up)",
    )


def rope_override(args: Namespace) -> dict[str, Any] | None:
    """The scaling that add_rope_flags' flags ask for, as files of results say it, or None. Raises UserError."""
    if args.rope_factor and not args.rope_type:
        raise UserError("--rope_factor needs --rope_type: say which scaling")
    return {"rope_type": args.rope_type, "rope_factor": args.rope_factor} if args.rope_type else None


def quantization_of(args: Namespace) -> str | None:
    """--quantize as files of results say it: None for none, as in files of earlier versions, which do not say it."""
    return None if args.quantize == "none" else args.quantize


def note_window(lengths: Iterable[int], config: ModelConfig) -> None:
    """Says which lengths are more than the model's own window: a question worth asking, but not by mistake."""
    own = config.max_position_embeddings
    if beyond := [f"{length:,}" for length in lengths if length > own]:
        log.info("%s tokens are more than the model's own window of %s", ", ".join(beyond), f"{own:,}")
