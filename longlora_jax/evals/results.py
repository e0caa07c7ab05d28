"""Results of an evaluation in a JSON file, written as they come, so that a command that was broken off goes on."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlora_jax.errors import UserError
from longlora_jax.files import holds_nothing, one_line, read_json, write_json
from longlora_jax.weights.workdir import fingerprint, is_workdir, split_step

log = logging.getLogger(__name__)


def weights_of(path: str, tokenizer_dir: str) -> str:
    """What tells the weights of a model folder from others: the step of a run, or a digest."""
    path, step = split_step(path)
    if step is not None:
        return f"step {step}"
    if is_workdir(path):
        steps = [int(p.name) for p in Path(path, "checkpoints").iterdir() if p.name.isdigit()]
        return f"step {max(steps)}"
    return fingerprint(tokenizer_dir)[:16]


class Results:
    """The results of a command, and its JSON file if it has one: those of an earlier call of the same settings count.

    head: the settings, all of what results depend on beside their key; key: the fields by which a result is known.
    Results of other settings are replaced, and the log says so. Raises UserError for a file of something
    else; one with nothing in it is written over.
    """

    def __init__(self, path: str | None, head: dict[str, Any], key: Sequence[str]):
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
            if found.get(name) != value:
                had, has = (one_line(json.dumps(v), 80) for v in (found.get(name), value))
                log.warning("%s holds results with %s %s, these are with %s: it is written anew", path, name, had, has)
                return
        self.rows = rows

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The result with these values."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a result, in the place of one of the same key, and writes them all, in the order of their keys."""
        self.rows = [old for old in self.rows if any(old[k] != row[k] for k in self._key)]
        self.rows = sorted([*self.rows, row], key=lambda r: [r[k] for k in self._key])
        self.write()

    def write(self, **more: Any) -> None:
        """Writes the file, with more of what belongs to all results."""
        if self._path:
            write_json(self._path, self.head | more | {"results": self.rows})
