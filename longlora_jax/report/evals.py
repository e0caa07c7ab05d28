"""Results of evaluations, as JSON files hold them, on the page: perplexity by length, grids by length and depth."""

import itertools
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_jax.errors import UserError
from longlora_jax.files import one_line
from longlora_jax.report.charts import Line, chip, heat_cell, line_chart, short
from longlora_jax.report.labels import labels
from longlora_jax.report.markup import Html, table, tag
from longlora_jax.report.runs import Run, parse_numbers

# The fields by which a result is known, those with more first: a needle's is a passkey's with a score, a passkey's is
# one of topics with a depth.
KINDS = {
    "perplexity": {"seq_len", "perplexity"},
    "needle": {"length", "depth", "score"},
    "passkey": {"length", "depth", "trials", "correct"},
    "topics": {"length", "trials", "correct"},
    "longqa": {"tokens", "exact_match", "f1"},
}


@dataclass
class Evaluation:
    """A file of results: its path, its kind (a key of KINDS), what it says of itself, its results."""

    path: str
    kind: str
    head: dict[str, Any]
    results: list[dict[str, Any]]


def read_evaluations(given: dict[str, list[str]], runs: list[Run]) -> tuple[list[Evaluation], list[str]]:
    """The files given by kind, then those that lie in the workdirs; and what is wrong with those that cannot be read.

    Raises UserError if a given one is of no use.
    """
    left_out: list[str] = []
    found = [e for kind, paths in given.items() for path in paths for e in _read_given(path, kind)]
    seen = {os.path.realpath(e.path) for e in found}
    for path in (p for run in runs for p in sorted(Path(run.path).glob("*.json"))):
        if path.is_file() and os.path.realpath(path) not in seen:
            try:
                found += _read(str(path))
            except UserError as error:
                left_out.append(str(error))
    return found, left_out


def _read_given(path: str, kind: str) -> list[Evaluation]:
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: give a file that python -m longlora_jax.evals.{kind} --json wrote")
    found = _read(path)
    if not found or any(e.kind != kind for e in found):
        fields = ", ".join(sorted(KINDS[kind]))
        raise UserError(f"{path} holds no results of evals.{kind}: each must have {fields}")
    return found


def _read(path: str) -> list[Evaluation]:
    """What a JSON file holds of evaluations; [] if it holds none. The table of make quickstart is several."""
    try:
        content = parse_numbers(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(str(error), 200)}") from error
    if not isinstance(content, dict):
        return []
    parts: list[tuple[dict, Any]]
    if isinstance(rows := content.get("rows"), dict):
        parts = [
            ({"model": name, "data": f"those of {os.path.basename(path)}"}, results) for name, results in rows.items()
        ]
    else:
        parts = [(content, content.get("results"))]
    return [Evaluation(path, kind, head, results) for head, results in parts if (kind := _kind(results))]


def _kind(results: Any) -> str | None:
    if not isinstance(results, list) or not results or not all(isinstance(r, dict) for r in results):
        return None
    for kind, fields in KINDS.items():
        if all(fields <= set(r) and all(_is_score(r, f) for f in fields) and _is_sound(r) for r in results):
            return kind
    return None


def _is_sound(result: dict[str, Any]) -> bool:
    """Whether lengths and depths of a result are some: its scores may be anything, NaN too."""
    lengths = [result[key] for key in ("seq_len", "length", "stride", "tokens") if result.get(key) is not None]
    depth, quarter = result.get("depth", 0), result.get("last_quarter") or {}
    return (
        all(_is_number(t) and 1 <= t < 1e12 and t == int(t) for t in lengths)
        and (_is_number(depth) and 0 <= depth < math.inf)
        and isinstance(quarter, dict)
    )


def _is_score(result: dict[str, Any], field: str) -> bool:
    value = result[field]
    return _is_number(value) or (field == "exact_match" and isinstance(value, bool))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def perplexities(evaluations: list[Evaluation], runs: list[Run]) -> list[Html]:
    """Perplexity by length: a chart and a table for each set of documents."""
    by_data: dict[str, list[Evaluation]] = defaultdict(list)
    for evaluation in (e for e in evaluations if e.kind == "perplexity"):
        data = evaluation.head.get("data", "")
        names = [os.path.basename(str(d)) for d in (data if isinstance(data, list) else [data])]
        by_data[_and_more(names)].append(evaluation)
    return [part for where, found in by_data.items() for part in _perplexity_of(where, _rows(found, runs), runs)]


def _rows(evaluations: list[Evaluation], runs: list[Run]) -> dict[tuple[str, str], dict[int, dict]]:
    """{(what it is called, letter of its run or ""): {length: result}}; no result takes the place of another."""
    rows: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    called = labels([e.head for e in evaluations], runs)
    for evaluation, (name, run) in zip(evaluations, called, strict=True):
        for result in evaluation.results:
            length, stride = result["seq_len"], result.get("stride")
            strided = f"{name}, stride {stride:,}" if stride else f"{name}, no stride"
            in_file = f"{name}, {os.path.basename(evaluation.path)}"
            keys = [(name, run.letter if run else ""), (in_file, ""), (f"{name}, {evaluation.path}", "")]
            if rows[keys[0]].get(length, result).get("stride") != stride:
                keys = [(strided, ""), (f"{strided}, {evaluation.path}", "")]
            # One file may have two results of a length: the last place has no end.
            numbered = ((f"{keys[-1][0]} ({i})", "") for i in itertools.count(2))
            key = next(key for key in itertools.chain(keys, numbered) if rows[key].get(length, result) == result)
            rows[key][length] = result
    return rows


def _and_more(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _perplexity_of(where: str, rows: dict, runs: list[Run]) -> list[Html]:
    letters = [run.letter for run in runs]
    lengths = sorted({length for results in rows.values() for length in results})
    lines, body, numbered = [], [], 0
    for (name, letter), results in rows.items():
        if letter and letter not in [line.key for line in lines]:
            key, colour = letter, letters.index(letter)
        else:
            numbered += 1
            key, colour = str(numbered), len(runs) + numbered - 1
        lines.append(Line(key, colour, [(t, r["perplexity"]) for t, r in sorted(results.items())]))
        cells = [_perplexity_cell(results.get(length)) for length in lengths]
        quarter = (results.get(lengths[-1]) or {}).get("last_quarter") or {}
        last = quarter.get("perplexity")
        body.append([[chip(key, colour), name], *cells, f"{last:.2f}" if _is_number(last) else "–"])
    how = "Lower is better. Full attention unless named otherwise."
    if any((r.get("stride") or length) < length for results in rows.values() for length, r in results.items()):
        how += " Windows that overlap (stride below the length) score only what is new in them."
    head = ["", *(f"{length:,}" for length in lengths), f"last quarter of {lengths[-1]:,}"]
    parts = [tag("div", table(head, body, class_="numbers"), tag("p", how, class_="soft"))]
    if len(lengths) > 1:
        label = "length of the window in tokens"
        parts.insert(0, line_chart("Perplexity by length", lines, x_label=label, x_ticks=lengths, log_from=4))
    return [tag("p", f"Documents: {where}") if where else Html(), tag("div", parts, class_="pair")]


def _perplexity_cell(result: dict[str, Any] | None) -> Any:
    if result is None:
        return "–"
    perplexity, error = result["perplexity"], result.get("stderr")
    text = f"{perplexity:.2f}" if perplexity < 1e5 else short(perplexity)
    hint = ", ".join(
        f"{key} {result[key]:,.6g}"
        for key in ("tokens", "windows", "stride", "offset", "nll")
        if _is_number(result.get(key))
    )
    if not _is_number(error):
        return tag("td", text, title=hint)
    # stderr is of the mean nll; a step of it multiplies the perplexity by exp(stderr).
    return tag("td", text, tag("small", f" ± {perplexity * error:.2g}"), title=hint)


NOTES = {
    **dict.fromkeys(("passkey", "needle"), "Depth: where in the context it lies, 0% the beginning."),
    "topics": "Right: the first topic of a long conversation is named.",
    "longqa": "Shares of exact matches and mean F1 by the tokens of the prompts.",
}


def grids(kind: str, evaluations: list[Evaluation], runs: list[Run]) -> list[Html]:
    """A heat table for each file of results of a kind: lengths across; down depths, if there are some, or scores."""
    figures = []
    shown = [e for e in evaluations if e.kind == kind]
    for evaluation, (name, run) in zip(shown, labels([e.head for e in shown], runs), strict=True):
        title = [chip(run.letter, runs.index(run)), name] if run else name
        note = f"{os.path.basename(evaluation.path)}. {NOTES[kind]}"
        if kind == "longqa":
            note = f"{note} Data: {os.path.basename(str(evaluation.head.get('data', '')))}."
        made = _questions(evaluation.results) if kind == "longqa" else _grid(kind, evaluation.results)
        figures.append(tag("figure", tag("h3", title), made, tag("figcaption", note)))
    return [tag("div", figures, class_="pair")] if figures else []


def _grid(kind: str, results: list[dict[str, Any]]) -> Html:
    cells: dict[tuple[float, float], list[dict]] = defaultdict(list)
    for result in results:
        cells[0 if kind == "topics" else result["depth"], result["length"]].append(result)
    depths, lengths = (sorted({key[i] for key in cells}) for i in (0, 1))
    top = max([1.0, *(r["score"] for r in results if math.isfinite(r["score"]))]) if kind == "needle" else 1.0
    show = _passkey_cell if kind != "needle" else lambda found: _needle_cell(found, 1 if top <= 1 else top)
    if kind == "topics":
        return table(
            ["", *(f"{n:,}" for n in lengths)], [["right", *(show(cells[0, n]) for n in lengths)]], class_="heat"
        )
    rows = [
        [f"{depth:.0%}" if depth <= 1 else f"{depth:g}%", *(show(cells[depth, length]) for length in lengths)]
        for depth in depths
    ]
    return table(["depth", *(f"{length:,}" for length in lengths)], rows, class_="heat")


def _questions(results: list[dict[str, Any]]) -> Html:
    sizes: dict[int, list[dict]] = defaultdict(list)
    for result in results:
        sizes[1 << (int(result["tokens"]) - 1).bit_length()].append(result)
    parts = {f"{size:,}": sizes[size] for size in sorted(sizes)} | {"all": results}

    def cell(found: list[dict], key: str) -> Html:
        mean = sum(r[key] for r in found) / len(found)
        return heat_cell(mean, f"{mean:.2f}", f"{len(found):,} questions")

    names = {"exact_match": "exact match", "f1": "F1"}
    rows = [[name, *(cell(found, key) for found in parts.values())] for key, name in names.items()]
    return table(["tokens up to", *parts], rows, class_="heat")


def _passkey_cell(found: list[dict]) -> Html:
    if not found:
        return tag("td", "–")
    correct, trials = (sum(r[key] for r in found) for key in ("correct", "trials"))
    return heat_cell(correct / trials if trials else math.nan, f"{correct}/{trials}", f"{correct} of {trials} right")


def _needle_cell(found: list[dict], top: float) -> Html:
    if not found:
        return tag("td", "–")
    score = sum(r["score"] for r in found) / len(found)
    return heat_cell(score / top, f"{score:.2g}", f"score {score:.4g}")
