"""Results of an evaluation in a JSON file, written as they come, so that a command that was broken off goes on."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from longlora_jax.data import Tokenizer
from longlora_jax.errors import UserError
from longlora_jax.evals.command import PLACES
from longlora_jax.files import holds_nothing, one_line, read_json, write_json
from longlora_jax.weights.load import OpenModel
from longlora_jax.weights.workdir import checkpoint_fingerprint, fingerprint

log = logging.getLogger(__name__)


def digest(content: str | memoryview) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text, or of the memory of an array."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def weights_of(opened: OpenModel) -> str:
    """What tells the weights of a model from others at its path: the step of a run and a digest, or a digest alone.

    A file of many gigabytes is read at 64 places, so that no adapter merged into it is missed.
    """
    if opened.step is not None:
        return f"step {opened.step}, {checkpoint_fingerprint(opened.workdir, opened.step)[:16]}"
    return fingerprint(opened.tokenizer_dir, windows=64, size_of_each=1 << 14)[:16]


def identity(opened: OpenModel, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """What results depend on of a model, for their head: its weights, its config; with its tokenizer, how it is asked.

    Of the config, what differs from a plain LLaMA: a field that a later version adds changes nothing.
    """
    c = opened.config
    set_fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if getattr(c, f.name) != f.default}
    found = {"weights": weights_of(opened), "config": digest(json.dumps(set_fields, default=dataclasses.asdict))}
    if tokenizer:
        asked = json.dumps(dataclasses.asdict(opened.chat_format()))
        found |= {"tokenizer": tokenizer.fingerprint[:16], "chat_format": digest(asked)}
    return found


class Results:
    """The results of a command, and its JSON file if it has one: those of an earlier call of the same settings count.

    head: the settings, all of what results depend on beside their key; key: the fields by which a result is known.
    A place is not compared if the head has a digest of what lies there, nor if it is in by_row: fields of the head
    whose content each result knows.
    Results of other settings are replaced, and the log says so. Raises UserError for a file of something
    else; one with nothing in it is written over.
    """

    def __init__(self, path: str | None, head: dict[str, Any], key: Sequence[str], by_row: Sequence[str] = ()):
        self._path, self._key = path, tuple(key)
        self.head = json.loads(json.dumps(head))  # as it is read back: tuples are lists
        self.rows: list[dict[str, Any]] = []
        if not path or not os.path.isfile(path) or holds_nothing(path):
            return
        found = read_json(path)
        rows = found.get("results")
        if not isinstance(rows, list) or not all(isinstance(r, dict) and set(key) <= set(r) for r in rows):
            raise UserError(f"{path} holds something else than such results: give another --json, or remove it")
        for name, value in self.head.items():
            if name in by_row or self.head.get(PLACES.get(name, "")) is not None:
                continue
            if value is not None and name not in found:
                log.warning("%s does not say its %s, as in earlier versions: it is written anew", path, name)
                return
            if found.get(name) != value:
                had, has = (one_line(json.dumps(v), 80) for v in (found.get(name), value))
                log.warning("%s holds results with %s %s, these are with %s: it is written anew", path, name, had, has)
                return
        self.rows = rows

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The result with these values."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())), None)

    def keep(self, is_right: Callable[[dict[str, Any]], bool], why: str) -> None:
        """Leaves out the results that are not right any more, and the log says how many and why."""
        kept = [row for row in self.rows if is_right(row)]
        if left := len(self.rows) - len(kept):
            log.warning("%s: %d of %d results are left out: %s", self._path, left, len(self.rows), why)
        self.rows = kept

    def add(self, row: dict[str, Any]) -> None:
        """Adds a result, in the place of one of the same key, and writes them all, in the order of their keys."""
        self.rows = [old for old in self.rows if any(old[k] != row[k] for k in self._key)]
        self.rows = sorted([*self.rows, row], key=lambda r: [r[k] for k in self._key])
        self.write()

    def write(self, **more: Any) -> None:
        """Writes the file, with more of what belongs to all results."""
        if self._path:
            write_json(self._path, self.head | more | {"results": self.rows})
