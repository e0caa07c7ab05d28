"""What the runs brought: tables in Markdown, and a picture."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from longlora_jax.evals.plots import COLOURS, HIGHLIGHT, save
from longlora_jax.paper.tables import NOTHING, Row, Run, Table

Chosen = Sequence[tuple[Table, Sequence[Row]]]


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, its standard error over seeds: s / sqrt(n); None of a single one)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def results_of(content: dict[str, Any], row: Row) -> list[dict[str, Any]]:
    """The results of a row, one a seed, in what runs.gather returns."""
    return content["runs"].get(_run(row, content).name, [])


def _run(row: Row, content: dict[str, Any]) -> Run:
    return row.run(content["steps"], content.get("common", NOTHING))


def _shown(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    mean, error = summary(numbers)
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


def format_table(table: Table, rows: Sequence[Row], content: dict[str, Any]) -> str:
    """One table: perplexity as mean ± standard error over seeds, the seeds, and the paper's number."""
    own = ["under its training's pattern"] if table.both_patterns else []
    paper = ["the paper"] if any(row.paper for row in table.rows) else []
    lines = [["", "perplexity, full attention", *own, "seeds", "steps", *paper]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])
    for row in rows:
        results = results_of(content, row)
        cells = [_shown([r["perplexity"] for r in results])]
        cells += [_shown([r["pattern_perplexity"] for r in results])] if own else []
        cells += [f"{len(results)}" if row.share else "–", f"{_run(row, content).steps}"]
        lines.append([row.label, *cells, *([row.paper or "–"] if paper else [])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    )


def format_tables(content: dict[str, Any], chosen: Chosen) -> str:
    """All tables of which a row is finished, each under its title and the source of the paper's numbers."""
    parts = [
        f"## {table.title}\n\nIn the paper: {table.paper}.\n\n{format_table(table, rows, content)}"
        for table, rows in chosen
        if any(results_of(content, row) for row in rows)
    ]
    return "\n\n".join(parts)


def draw(content: dict[str, Any], chosen: Chosen, path: str) -> None:
    """A picture with a panel for each table: every seed a dot, their mean a line.

    path: .png, .svg or .pdf, replaced when the picture is complete. Draws nothing if no row is finished.
    """
    panels = [
        (table, found)
        for table, rows in chosen
        if (found := [(row, results) for row in rows if (results := results_of(content, row))])
    ]
    if not panels:
        return
    heights = [len(found) + 1.6 for _, found in panels]
    figure = Figure(figsize=(8.5, 0.36 * sum(heights) + 0.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (table, found) in zip(grid[:, 0], panels, strict=True):
        _panel(axes, table, found)
    grid[-1, 0].set_xlabel("perplexity of held-out files under full attention (lower is better)")
    save(figure, path)


def _panel(axes, table: Table, found) -> None:
    means = []
    for place, (row, results) in enumerate(found):
        values = [r["perplexity"] for r in results]
        mean, error = summary(values)
        means.append(mean)
        colour = COLOURS[0] if row.share else COLOURS[1]
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.6)
        axes.plot([mean], [place], "|", color=HIGHLIGHT, markersize=13, markeredgewidth=2)
        text = f"  {mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        axes.annotate(text, (max(values), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(found)), [row.label for row, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    if max(means) > 4 * min(means):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.3 if axes.get_xscale() == "log" else high + 0.3 * (high - low))
    axes.set_title("\n".join(textwrap.wrap(table.title, 64)), loc="left", fontsize=10.5, fontweight="bold")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
