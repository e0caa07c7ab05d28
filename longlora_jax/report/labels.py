"""What results are called on the page: their model, and the settings by which they differ from others there."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from longlora_jax.evals.command import PLACES
from longlora_jax.files import one_line
from longlora_jax.report.runs import Run

Head = dict[str, Any]
# Said always, in words.
_IN_WORDS = ("attention", "rope_override", "quantize")
# No settings: what a head holds of the results, and a stride, which each result says of itself.
_NO_SETTINGS = {"task", "results", "summary", "by_length", "skipped", "given_stride", *_IN_WORDS}
# Earlier versions did not write them: that they are not there is no difference.
_DIGESTS = {"config", "tokenizer", "chat_format", *PLACES.values()}


def labels(heads: Sequence[Head], runs: list[Run]) -> list[tuple[str, Run | None]]:
    """What each of some files of results is called, and the run whose workdir or checkpoint its model is.

    Those of different settings are called differently, as far as their heads say the settings.
    """
    named = [_name(head, runs) for head in heads]
    texts = [", ".join([name, *_in_words(head)]) for (name, _), head in zip(named, heads, strict=True)]
    for key in dict.fromkeys([*PLACES, *(key for head in heads for key in head if key not in _NO_SETTINGS)]):
        alike = defaultdict(list)
        for i, text in enumerate(texts):
            alike[text].append(i)
        for same in alike.values():
            for i, value in zip(same, _values(key, [heads[i] for i in same]), strict=False):
                texts[i] += f", {one_line(value, 80)}"
    return [(text, run) for text, (_, run) in zip(texts, named, strict=True)]


def _name(head: Head, runs: list[Run]) -> tuple[str, Run | None]:
    model = str(head.get("model", "a model"))
    path = PurePath(model)
    step = path.name if path.name.isdigit() and path.parent.name == "checkpoints" else ""
    folder = str(path.parent.parent) if step else model
    for run in runs:
        if _place(folder) == _place(run.path):
            return f"{run.name}, {f'step {step}' if step else 'trained'}", run
    name = os.path.basename(folder.rstrip("/")) or folder
    bases = [run for run in runs if run.config.get("init_from") and _place(model) == _place(run.config["init_from"])]
    if bases:
        return f"{name}, before the training of {', '.join(run.letter for run in bases)}", None
    return f"{name}, step {step}" if step else name, None


def _place(path: Any) -> str:
    try:
        return os.path.realpath(path)
    except (TypeError, ValueError):  # a list of paths; a name that no path can have
        return json.dumps([_place(p) for p in path]) if isinstance(path, list) else str(path)


def _in_words(head: Head) -> list[str]:
    words = []
    if head.get("attention", "full") != "full":
        words.append(f"{head['attention']} attention")
    if override := head.get("rope_override"):
        given = override if isinstance(override, dict) else {"rope_type": override}
        factor = given.get("rope_factor")
        factor = f" ×{factor:g}" if isinstance(factor, int | float) else ""
        words.append(f"untrained {given.get('rope_type')} rope{factor}")
    if head.get("quantize"):
        words.append(f"in {head['quantize']}")
    return words


def _values(key: str, heads: Sequence[Head]) -> list[str]:
    """What to say of a setting for each of these heads; [] where there is nothing to tell them apart by."""
    values = [head.get(key) for head in heads]
    said = ["none" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
    marks = [_place(value) if key in PLACES else text for value, text in zip(values, said, strict=True)]
    is_open = key in _DIGESTS and None in values
    digests = [head.get(PLACES[key]) for head in heads] if key in PLACES else []
    if digests and None not in digests:
        digests = [json.dumps(digest) for digest in digests]
        if len(set(marks)) < len(set(digests)):
            key, said = PLACES[key], [digest.strip('"') for digest in digests]
        marks = digests
    return [f"{key.replace('_', ' ')} {text}" for text in said] if len(set(marks)) > 1 and not is_open else []
