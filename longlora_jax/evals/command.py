"""What the commands of evaluations share: checks that cost nothing before hours are spent."""

import logging
from collections.abc import Iterable
from pathlib import Path

from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.files import check_writable

log = logging.getLogger(__name__)


def check_outputs(json: str | None, plot: str | None) -> None:
    """Raises UserError if a file of results or a picture could not be written."""
    for path in filter(None, (json, plot)):
        check_writable(path)
    if plot and Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot} must end in .png, .svg or .pdf")


def note_window(lengths: Iterable[int], config: ModelConfig) -> None:
    """Says which lengths are more than the model's own window: a question worth asking, but not by mistake."""
    own = config.max_position_embeddings
    if beyond := [f"{length:,}" for length in lengths if length > own]:
        log.info("%s tokens are more than the model's own window of %s", ", ".join(beyond), f"{own:,}")
