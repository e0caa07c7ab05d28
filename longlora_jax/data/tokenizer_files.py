"""The files of a tokenizer's folder, and what each of them decides: in transformers' order, without transformers.

tokenizer.json, else tokenizer.model (SentencePiece), else what transformers can read, is the vocabulary. Tokens beside
it stand in tokenizer_config.json (added_tokens_decoder), or, where that has no such table, in added_tokens.json; which
tokens are BOS, EOS and so on in special_tokens_map.json or tokenizer_config.json, likewise.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from longlora_jax.data.sentencepiece_model import SentencePieceModel, special_pieces
from longlora_jax.errors import UserError
from longlora_jax.files import one_line, read_json, refuse_pointer

log = logging.getLogger(__name__)

ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What transformers' classes take a role to be that no file names.
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_DEFAULTS = {
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer"), _LLAMA),
    "GPT2Tokenizer": dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"),
}
_FILES = "tokenizer.json, tokenizer.model, vocab.json with merges.txt"


class SpecialTokens(NamedTuple):
    """What the small files beside a vocabulary say."""

    config: dict[str, Any]  # tokenizer_config.json
    roles: dict[str, AddedToken | None]  # {"bos": the token}; None: named as none; a role that nobody names is left out
    added: dict[int, AddedToken]  # by the ids that the files give them
    further: list[AddedToken]  # special tokens without a role or an id

    def defaults(self) -> dict[str, str]:
        """The texts of roles that transformers' class takes where no file names one."""
        name = self.config.get("tokenizer_class")
        return _DEFAULTS.get(name.removesuffix("Fast"), {}) if isinstance(name, str) else {}


class Built(NamedTuple):
    """A tokenizer out of its files: what encodes, the text of each role, and the digest of what decides ids."""

    backend: Any  # tokenizers.Tokenizer or SentencePieceModel
    roles: dict[str, str]
    fingerprint: str


def build_tokenizer(folder: str) -> Built:
    """Builds the tokenizer of a folder out of all of its files; raises UserError if there is none that can be read."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"the folder {folder!r} does not exist: name a folder with a tokenizer.")
    for name in ("tokenizer.json", "tokenizer.model"):
        refuse_pointer(str(path / name))
    if (path / "tokenizer.json").is_file():
        return _from_json(path)
    if (path / "tokenizer.model").is_file() and not _is_tiktoken(path / "tokenizer.model"):
        return _from_sentencepiece(path)
    return _with_transformers(folder)


def read_special_tokens(folder: str) -> SpecialTokens:
    """What the small files in a folder say of its special and added tokens; raises UserError, naming file and key."""
    path = Path(folder)
    given = {
        name: read_json(str(path / name)) if (path / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    config, named = given["tokenizer_config.json"], given["special_tokens_map.json"]
    table = config.get("added_tokens_decoder")
    # transformers takes the older files only where the newer table is not there; a role that only they have is used.
    merged = config | named if table is None else named | config
    roles = {role: _token(merged[key], key, path) for role in ROLES if (key := f"{role}_token") in merged}
    further = _further(merged, path)
    special = {token.content for token in [*roles.values(), *further] if token is not None}
    if table is not None:
        added = _decoder(table, path)
    else:
        added = {}
        for text, i in given["added_tokens.json"].items():
            if not text or type(i) is not int or not 0 <= i < 2**31:
                raise UserError(f"{path / 'added_tokens.json'}: {text!r:.40} is {i!r:.40}, it must be the token's id")
            added[i] = AddedToken(text, special=text in special, normalized=text not in special)
    return SpecialTokens(config, roles, added, further)


def special_texts(folder: str) -> dict[str, str]:
    """{role: text of its token} of a folder, as a chat template is told them; raises UserError, naming file and key."""
    special, model = read_special_tokens(folder), Path(folder, "tokenizer.model")
    texts = special.defaults()
    if not Path(folder, "tokenizer.json").is_file() and model.is_file() and not _is_tiktoken(model):
        with in_one_line(f"{model} cannot be read as a SentencePiece model"):
            texts = texts | _own_roles(model.read_bytes())
    named = {role: token.content for role, token in special.roles.items() if token is not None}
    return {role: text for role, text in texts.items() if role not in special.roles} | named


def _own_roles(content: bytes) -> dict[str, str]:
    """Those of a SentencePiece model itself. LLaMA's tokenizers have no padding unless a file says so."""
    if not content:
        raise ValueError("it is empty")
    own = special_pieces(content)
    return {role: own[role] for role in own if role != "pad"}


def _token(value: Any, key: str, path: Path) -> AddedToken | None:
    """A token as these files spell it: its text, or a table of text and flags."""
    if value is None or isinstance(value, str):
        return AddedToken(value, special=True, normalized=False) if value else None
    text = value.get("content") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text:
        raise UserError(f"the tokenizer in {path}: {key} is no text: mend tokenizer_config.json.")
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(text, **flags | {"special": True})


def _decoder(table: Any, path: Path) -> dict[int, AddedToken]:
    """added_tokens_decoder: {id as a word: the token}."""
    added = {}
    for key, value in table.items() if isinstance(table, dict) else [("?", table)]:
        text = value.get("content") if isinstance(value, dict) else None
        if not (key.isdecimal() and int(key) < 2**31) or not isinstance(text, str) or not text:
            raise UserError(
                f"{path / 'tokenizer_config.json'}: added_tokens_decoder has {one_line(f'{key}: {value!r}', 80)}, "
                "it must map ids to tokens with a content: fetch it again"
            )
        flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
        added[int(key)] = AddedToken(text, **flags)
    return added


def _further(merged: dict[str, Any], path: Path) -> list[AddedToken]:
    """Special tokens of no role of ours: additional_special_tokens, extra_special_tokens, image_token and the like."""
    values: list[tuple[str, Any]] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        several = merged.get(key)
        several = list(several.values()) if isinstance(several, dict) else several
        values += [(key, value) for value in several] if isinstance(several, list) else []
    roles = {f"{role}_token" for role in ROLES}
    values += [(k, v) for k, v in merged.items() if k.endswith("_token") and k not in roles and isinstance(v, str)]
    tokens = [_token(value, key, path) for key, value in values]
    return [token for token in tokens if token is not None]


def _from_json(path: Path) -> Built:
    with in_one_line(f"{path / 'tokenizer.json'} cannot be read"):
        content = (path / "tokenizer.json").read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(content)
    # It may carry the cut and the padding of the run that saved it.
    backend.no_truncation()
    backend.no_padding()
    special = read_special_tokens(str(path))
    before = _shown_tokens(backend)
    named = [token for token in special.roles.values() if token is not None] + special.further
    texts = {token.content for token in named}
    for token in special.added.values():
        token.special = token.special or token.content in texts
    backend.add_tokens([*(token for _, token in sorted(special.added.items())), *named])
    for i, token in special.added.items():
        if (found := backend.token_to_id(token.content)) != i:
            log.warning(
                "%s: the added token %r has id %s, not %d as its files say: there is no token before it",
                *(path, token.content, found, i),
            )
    roles = {role: token.content for role, token in special.roles.items() if token is not None}
    for role, text in special.defaults().items():
        if role not in special.roles and backend.token_to_id(text) is not None:
            roles[role] = text
    after = _shown_tokens(backend)
    # As ever where tokenizer.json says it all: runs and prepared corpora keep this digest.
    more = b"" if after == before else json.dumps(after).encode()
    return Built(backend, roles, hashlib.sha256(content + more).hexdigest())


def _shown_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    return [f"{i} {token!r}" for i, token in sorted(backend.get_added_tokens_decoder().items())]


def _from_sentencepiece(path: Path) -> Built:
    file = path / "tokenizer.model"
    special = read_special_tokens(str(path))
    with in_one_line(f"{file} cannot be read as a SentencePiece model"):
        content = file.read_bytes()
        own = _own_roles(content)
        plain = SentencePieceModel(content, {})
    roles = {role: AddedToken(text, special=True, normalized=False) for role, text in own.items()}
    roles |= {role: token for role, token in special.roles.items() if token is not None}
    roles = {role: token for role, token in roles.items() if special.roles.get(role, token) is not None}
    added = dict(special.added)
    ids = {token.content: i for i, token in added.items()}
    for token in [*roles.values(), *special.further]:
        i = ids.get(token.content, plain.token_to_id(token.content))
        i = max(plain.largest_id(), *added, -1) + 1 if i is None else i
        ids[token.content] = i
        added.setdefault(i, token)
        added[i].special = True

    def whether(key: str, default: bool) -> bool:
        value = special.config.get(key)
        return value if isinstance(value, bool) else default

    before = [ids[roles["bos"].content]] if "bos" in roles and whether("add_bos_token", True) else []
    after = [ids[roles["eos"].content]] if "eos" in roles and whether("add_eos_token", False) else []
    legacy = whether("legacy", False)
    backend = SentencePieceModel(content, added, before=before, after=after, legacy=legacy)
    said = [f"{i} {token!r}" for i, token in sorted(added.items())]
    digest = hashlib.sha256(content + json.dumps([said, before, after, legacy]).encode())
    return Built(backend, {role: token.content for role, token in roles.items()}, digest.hexdigest())


def _is_tiktoken(file: Path) -> bool:
    """Whether it is Llama 3's tokenizer.model: lines of base64 and a rank, of tiktoken and not of SentencePiece."""
    with open(file, "rb") as opened:
        word, _, rank = opened.readline(200).strip().partition(b" ")
    return bool(word) and rank.isdigit()


def _with_transformers(folder: str) -> Built:
    names = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
    there = [name for name in names if Path(folder, name).is_file()]
    advice = "copy tokenizer.json and tokenizer_config.json of the model into it."
    if not there:
        raise UserError(f"{folder} has no tokenizer (none of {_FILES}): {advice}")
    for name in (*there, "merges.txt"):
        refuse_pointer(str(Path(folder, name)))
    try:
        from transformers import AutoTokenizer  # seconds to import: only where nothing else will do

        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = auto.backend_tokenizer
    except Exception as error:  # missing packages and files that are no tokenizer, of many classes
        reason = one_line(str(error) or type(error).__name__, 200)
        tried = f"transformers cannot read its {' and '.join(there)} ({reason})"
        raise UserError(f"{folder} has no tokenizer.json, and {tried}: {advice}") from error
    log.info("%s has no tokenizer.json: read by transformers' %s", folder, type(auto).__name__)
    backend.no_truncation()
    backend.no_padding()
    vocab = json.dumps(sorted(backend.get_vocab(with_added_tokens=True).items()))
    roles = {role: token for role in ROLES if isinstance(token := getattr(auto, f"{role}_token", None), str)}
    return Built(backend, roles, hashlib.sha256(vocab.encode()).hexdigest())


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Makes UserError of what the tokenizers library raises: bare Exception, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({one_line(str(error), 200)}): copy the tokenizer again.") from error
