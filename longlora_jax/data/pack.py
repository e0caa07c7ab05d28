"""Documents to windows of equal length: concatenated with EOS and cut, as in the paper."""

import logging
from collections.abc import Iterable

import numpy as np

from longlora_jax.errors import UserError

log = logging.getLogger(__name__)


def pack_documents(documents: Iterable[np.ndarray], seq_len: int, *, eos_id: int | None) -> np.ndarray:
    """Returns windows [num, seq_len] int32: all documents in a row, EOS after each, cut.

    documents: ids [tokens] of each; an empty one adds nothing. What is left after the last whole
    window is dropped, and the log says how much. Windows run across the ends of documents.
    Raises UserError if the corpus is shorter than one window. arXiv:2309.12307.
    """
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len} has no target to score: set it to 2 or more.")
    if eos_id is None:
        raise UserError(
            "the tokenizer names no end of text, which parts the documents of a window: "
            "set eos_token in tokenizer_config.json."
        )
    eos = np.array([eos_id], np.int32)
    pieces = [piece for ids in documents if len(ids) for piece in (ids, eos)]
    stream = np.concatenate([np.empty(0, np.int32), *pieces], dtype=np.int32)
    num = len(stream) // seq_len
    if not num:
        raise UserError(
            f"a window of {seq_len:,} tokens is longer than the corpus ({len(stream):,} tokens): "
            "lower seq_len or give more text."
        )
    log.info(
        "packed %s tokens of %s documents into %s windows of %s, %s left over",
        *(f"{n:,}" for n in (len(stream), len(pieces) // 2, num, seq_len, len(stream) % seq_len)),
    )
    return stream[: num * seq_len].reshape(num, seq_len)
