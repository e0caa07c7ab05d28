"""Tokens that a tokenizer lacks: a copy of its folder with them, as transformers reads it."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from longlora_jax.data.tokenizer import Tokenizer, load_tokenizer
from longlora_jax.data.tokenizer_files import build_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.files import read_json

CONFIG, VOCABULARY = "tokenizer_config.json", "tokenizer.json"
# Models lie beside their tokenizers: weights are not copied.
_NOT_COPIED = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".msgpack", ".h5")


def add_tokens(source: str, target: str, tokens: Sequence[str]) -> int:
    """Copies the files of a tokenizer's folder to a new one in which these tokens are special; returns the largest id.

    Ids follow the largest that there is. A token that has one keeps it; what was an ordinary piece is found before a
    text is split from now on. Raises UserError for a token that cannot be added.
    """
    tokenizer, before = load_tokenizer(source), build_tokenizer(source).backend.get_added_tokens_decoder()
    _check(tokens)
    folder = Path(target)
    folder.mkdir(parents=True)
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix not in _NOT_COPIED and file.name != "model.safetensors.index.json":
            shutil.copyfile(file, folder / file.name)
    config = read_json(str(folder / CONFIG)) if (folder / CONFIG).exists() else {}
    ids = {token: i for token in tokens if (i := tokenizer.token_id(token)) is not None}
    lacking = [token for token in tokens if token not in ids]
    ids |= {token: tokenizer.max_id + 1 + n for n, token in enumerate(lacking)}
    table = {str(i): _described(token) for i, token in before.items()} | config.get("added_tokens_decoder", {})
    new = {token: i for token, i in ids.items() if token not in tokenizer.added_tokens()}
    table |= {str(i): _described(AddedToken(token, normalized=False, special=True)) for token, i in new.items()}
    _write(folder / CONFIG, config | {"added_tokens_decoder": table})
    if (folder / VOCABULARY).exists():  # for programs that read it alone
        content = read_json(str(folder / VOCABULARY))
        named = {int(i): {"id": int(i)} | token for i, token in table.items()}
        named |= {token["id"]: token for token in content.get("added_tokens") or ()}
        _write(folder / VOCABULARY, content | {"added_tokens": [named[i] for i in sorted(named)]})
    made = load_tokenizer(target)
    for token, i in ids.items():
        if made.added_tokens().get(token) != i:
            raise UserError(
                f"new_tokens={token!r} cannot be added to the tokenizer in {source}: its files decide otherwise"
            )
    return made.max_id


def _described(token: AddedToken) -> dict[str, Any]:
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return {"content": token.content} | {flag: getattr(token, flag) for flag in flags}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def load_with_tokens(folder: str, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer of a folder with these special tokens, whether the folder has them or not."""
    tokenizer = load_tokenizer(folder)
    _check(tokens)
    if tokenizer.added_tokens().keys() >= set(tokens):
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
