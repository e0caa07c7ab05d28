"""Text to token ids and back, as the model's own tokenizer does; transformers is rarely needed."""

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers

from longlora_jax.data.source import Document
from longlora_jax.errors import UserError

log = logging.getLogger(__name__)

DOCUMENTS_AT_ONCE = 64  # enough to keep every core of the tokenizers library busy


class Tokenizer:
    """A model's tokenizer: encode, decode, and its special ids, None where it has none."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
    ):
        # A saved tokenizer.json may carry the cut and the padding of the run that saved it.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids [tokens] int32 of a text, with BOS where this tokenizer adds one."""
        return np.array(self._backend.encode(text).ids, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Returns encode(text) of every text, computed on all cores."""
        return [np.array(e.ids, np.int32) for e in self._backend.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of ids; special tokens are spelled out unless they are skipped."""
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)


def load_tokenizer(folder: str) -> Tokenizer:
    """Loads the tokenizer of a model folder: tokenizer.json, or else what transformers can read.

    tokenizer.json alone says whether BOS is added: transformers 5, too, ignores add_bos_token of
    tokenizer_config.json beside it. Raises UserError if there is no tokenizer that can be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"the folder {folder!r} does not exist: name a folder with a tokenizer.")
    if not (path / "tokenizer.json").is_file():
        return _load_with_transformers(folder)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path / 'tokenizer.json'} cannot be read ({error}): copy it again.") from error
    config = _read_json(path / "special_tokens_map.json")
    config |= _read_json(path / "tokenizer_config.json")
    ids = {role: backend.token_to_id(_content(config.get(f"{role}_token")) or "") for role in ("bos", "eos", "pad")}
    return Tokenizer(backend, bos_id=ids["bos"], eos_id=ids["eos"], pad_id=ids["pad"])


def tokenize_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, max_tokens: int = 0
) -> Iterator[np.ndarray]:
    """Yields the ids [tokens] int32 of each document, in order, as encode() gives them.

    max_tokens: stop after so many tokens, within a document if need be; 0 reads everything.
    """
    documents = iter(documents)
    left = max_tokens or float("inf")
    while left > 0 and (chunk := list(islice(documents, DOCUMENTS_AT_ONCE))):
        for ids in tokenizer.encode_batch([document.text for document in chunk]):
            if left <= 0:
                break
            yield ids[: min(left, len(ids))]
            left -= len(ids)
    if left <= 0:
        log.info("stopped reading the corpus after max_tokens=%d", max_tokens)


def _load_with_transformers(folder: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer  # seconds to import: only where nothing else will do

        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = auto.backend_tokenizer
    except Exception as error:  # missing packages and files that are no tokenizer, of many classes
        raise UserError(
            f"{folder} has no tokenizer.json and transformers finds no other tokenizer there: "
            "copy tokenizer.json and tokenizer_config.json of the model into it."
        ) from error
    log.info("%s has no tokenizer.json: read by transformers' %s", folder, type(auto).__name__)
    return Tokenizer(backend, bos_id=auto.bos_token_id, eos_id=auto.eos_token_id, pad_id=auto.pad_token_id)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again.") from error


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
