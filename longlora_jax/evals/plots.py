"""Pictures of evaluations."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from longlora_jax.files import write_bytes

# Of the palettes of Okabe and Ito and of Tol, safe for colour-blind readers, what is dark enough for text on white.
HIGHLIGHT = "#D55E00"
COLOURS = ("#0072B2", "#555555", "#009E73", "#CC79A7", "#332288", "#999933")
MARKERS = "osD^vP*"
LOG_FROM = 4  # a range of perplexities wider than this many times is drawn on a log axis


def plot_perplexity(
    rows: Mapping[str, Sequence[tuple[int, float]]],
    path: str,
    *,
    title: str,
    highlight: str | None = None,
    window: int | None = None,
    window_label: str = "window of the model",
) -> None:
    """Draws perplexity by length, one line a label, each named at its right end.

    rows: label -> [(length in tokens, perplexity)]; path: .png, .svg or .pdf, replaced when the picture is complete;
    highlight: the label whose line is drawn thick; window: a length to mark by a dashed line.
    """
    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [ppl for points in rows.values() for _, ppl in points]
    lengths = sorted({length for points in rows.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    if max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
        ratio = max(values) / min(values)  # fewer ticks in a decade the more decades there are
        steps = (1, 1.5, 2, 3, 5, 7) if ratio < 15 else (1, 2, 5) if ratio < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=99))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    ends = []
    for index, (label, points) in enumerate(rows.items()):
        x, y = zip(*sorted(points), strict=True)
        thick = label == highlight
        colour = HIGHLIGHT if thick else COLOURS[index % len(COLOURS)]
        style = {"linewidth": 3 if thick else 1.8, "markersize": 8 if thick else 5.5, "zorder": 4 if thick else 3}
        axes.plot(x, y, color=colour, marker=MARKERS[index % len(MARKERS)], **style)
        ends.append((label, x[-1], y[-1], colour, thick))
    if window is not None and lengths[0] <= window <= lengths[-1]:
        axes.axvline(window, color="#888888", linewidth=1, linestyle=(0, (4, 4)), zorder=1)
        side = "left" if window**2 < lengths[0] * lengths[-1] else "right"  # towards the middle of the picture
        note = f"{window_label}: {window:,}"
        axes.annotate(note, (window, 1), xycoords=("data", "axes fraction"), ha=side, va="bottom", color="#666666")
    axes.set_title(title, loc="left", fontweight="bold", pad=22)
    axes.set_xlabel("length of the window in tokens")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _name_ends(axes, ends)
    save(figure, path)


def plot_grid(
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    path: str,
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    after: int | None = None,
    note: str = "",
) -> None:
    """Draws values [rows, columns] from 0 to 1 (NaN: not measured) as a heat map with a text in each cell.

    path: .png, .svg or .pdf, replaced when the picture is complete; after: a dashed line behind so many columns, if it
    parts some from others, with a note above it.
    """
    width, height = max(5.5, 1.6 + 0.95 * len(columns)), 1.9 + 0.55 * len(rows)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("#eeeeee")
    # The ends differ for colour-blind readers too, and half right is light.
    colours = LinearSegmentedColormap.from_list("wrong to right", [HIGHLIGHT, "#f2e9dc", COLOURS[0]])
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = np.isfinite(value) and abs(value - 0.5) > 0.3
            axes.text(j, i, texts[i][j], ha="center", va="center", color="white" if dark else "black", fontsize=10)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if after is not None and 0 < after < len(columns):
        axes.axvline(after - 0.5, color="#333333", linewidth=1.4, linestyle=(0, (4, 3)))
        side = "right" if 2 * after > len(columns) else "left"  # towards the middle of the picture
        place, where = (after - 0.5, 1.01), ("data", "axes fraction")
        axes.annotate(note, place, xycoords=where, ha=side, va="bottom", color="#666666", fontsize=9)
    axes.set_title(title, loc="left", fontweight="bold", pad=20)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.colorbar(image, ticks=[0, 0.5, 1], pad=0.02)
    save(figure, path)


def save(figure: Figure, path: str) -> None:
    """Writes a picture as write_bytes does; path: .png, .svg or .pdf."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:])
    write_bytes(path, picture.getvalue())


def _name_ends(axes, ends) -> None:
    """Writes each label to the right of its line's last point, moved up or down until no two overlap."""
    axes.figure.canvas.draw()  # fixes the axes' limits and size
    height = 11 * axes.figure.dpi / 72 * 1.25  # of a line of text, in pixels
    ends = sorted(ends, key=lambda end: end[2])
    to_pixels = axes.transData
    wanted = [to_pixels.transform((x, y))[1] for _, x, y, _, _ in ends]
    placed = list(wanted)
    for _ in range(100):  # neighbours that are too near push each other apart by equal parts
        for i in range(1, len(placed)):
            if (overlap := height - (placed[i] - placed[i - 1])) > 0:
                placed[i - 1], placed[i] = placed[i - 1] - overlap / 2, placed[i] + overlap / 2
    for (label, x, y, colour, thick), pixel in zip(ends, placed, strict=True):
        offset = (pixel - to_pixels.transform((x, y))[1]) * 72 / axes.figure.dpi
        axes.annotate(
            f"{label}  {y:,.0f}" if y >= 1000 else f"{label}  {y:.3g}",
            (x, y),
            xytext=(9, offset),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            color=colour,
            fontweight="bold" if thick else "normal",
            annotation_clip=False,
        )
