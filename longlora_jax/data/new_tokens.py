"""Tokens that a tokenizer lacks: a copy of its folder with them, as transformers reads it."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from longlora_jax.data.tokenizer import Tokenizer, load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.files import read_json

CONFIG = "tokenizer_config.json"
# Models lie beside their tokenizers: weights are not copied.
_NOT_COPIED = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".msgpack", ".h5")


def add_tokens(source: str, target: str, tokens: Sequence[str]) -> int:
    """Copies the files of a tokenizer's folder to a new one in which these tokens are special; returns the largest id.

    Ids follow the largest that there is; a token that has one keeps it. Raises UserError for one that cannot be added.
    """
    tokenizer = load_tokenizer(source)
    _check(tokens)
    folder = Path(target)
    folder.mkdir(parents=True)
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix not in _NOT_COPIED and file.name != "model.safetensors.index.json":
            shutil.copyfile(file, folder / file.name)
    config = read_json(str(folder / CONFIG)) if (folder / CONFIG).exists() else {}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    table = {str(i): {"content": text, **flags} for text, i in tokenizer.added_tokens().items()}
    table |= config.get("added_tokens_decoder", {})
    new = [token for token in tokens if tokenizer.token_id(token) is None]
    ids = {token: tokenizer.max_id + 1 + n for n, token in enumerate(new)}
    table |= {str(i): {"content": token, **flags} for token, i in ids.items()}
    (folder / CONFIG).write_text(json.dumps(config | {"added_tokens_decoder": table}, indent=2, ensure_ascii=False))
    made = load_tokenizer(target)
    for token, i in ids.items():
        if made.token_id(token) != i:
            raise UserError(
                f"new_tokens={token!r} cannot be added to the tokenizer in {source}: its files decide otherwise"
            )
    return made.max_id


def load_with_tokens(folder: str, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer of a folder with these special tokens, whether the folder has them or not."""
    tokenizer = load_tokenizer(folder)
    _check(tokens)
    if all(tokenizer.token_id(token) is not None for token in tokens):
        return tokenizer
    with tempfile.TemporaryDirectory() as aside:
        add_tokens(folder, f"{aside}/tokenizer", tokens)
        return load_tokenizer(f"{aside}/tokenizer")


def _check(tokens: Sequence[str]) -> None:
    for token in tokens:
        if not token or token.strip() != token:
            raise UserError(f"new_tokens={token!r}: give a word without blanks at its ends, such as <tool>")
        if tokens.count(token) > 1:
            raise UserError(f"new_tokens={token!r} is given twice: leave one out")
