"""Charts as inline SVG: lines with a direct label at their end, and heat tables.

Ours because an SVG of matplotlib (which draws evals/plots.py) cannot stand in this page: its colours are fixed, where
these follow the page's light or dark ones; its points have no titles; it links to its own parts, which a page that
fetches nothing had better not; it is three times as large. And a report starts without matplotlib's second of imports.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longlora_jax.report.markup import COLOURS, Html, tag

WIDTH, HEIGHT = 360, 216  # of a chart, in units that are about a pixel each on a phone
LEFT, RIGHT, TOP, BOTTOM = 42, 72, 10, 38
MOST_POINTS = 400  # of a line: more than a chart this wide can show
MARKED = 30  # a line of at most so many points has its points marked
TEXT = 14  # height of a line of text
SMOOTH_SHARE = 20  # a smoothed line is the mean of the last so manieth part of its points
MOST_FAINT = 3  # with more lines than these, single points behind a smoothed line are only noise

Points = list[tuple[float, float]]


@dataclass
class Line:
    """A line of a chart: its key in the legend ("" where it is alone), its colour's number, its points (x, y)."""

    key: str
    colour: int
    points: Points


def colour_class(number: int) -> str:
    """The class that gives an element the colour of a line."""
    return f"s{number % COLOURS}"


def short(value: float) -> str:
    """A number in few characters and three or four significant digits: 0.00002 is 2e-5, 131072 is 131.1k."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= factor and (unit != "k" or size >= 1e4):
            return f"{value / factor:.4g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}" if size >= 0.01 else f"{value:.3g}"


def running_mean(points: Points, count: int) -> Points:
    """Each point's y replaced by the mean of the last `count` up to it; what is not finite is left out."""
    points = [p for p in points if math.isfinite(p[1])]
    means = []
    for i, (x, _) in enumerate(points):
        last = [y for _, y in points[max(0, i + 1 - count) : i + 1]]
        means.append((x, sum(last) / len(last)))
    return means


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points: the lowest and the highest of each stretch, and the last; so no peak is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers from low to high."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a log axis: 1, 2, 5 of each decade, or whole decades where there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = math.ceil(len(decades) / 6)
    steps = (1, 2, 5) if high < 500 * low else (1,)
    ticks = [s * 10.0**d for d in decades[::every] for s in steps]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


class _Axis:
    """From values to places between `start` and `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool, zero: bool = False):
        low, high = min(values), max(values)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low, high + pad) if zero else (low - pad, high + pad)
        self.low, self.high, self.log, self._start, self._end = low, high, log, start, end

    def __call__(self, value: float) -> float:
        f = math.log if self.log else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self._start + share * (self._end - self._start)


def line_chart(
    title: str,
    lines: list[Line],
    *,
    x_label: str,
    caption: str = "",
    smooth: bool = False,
    zero: bool = False,
    log_from: float = 30,
    x_ticks: list[float] | None = None,
) -> Html:
    """A figure with one line each, named at its right end by its key and its last value.

    smooth: draw the mean of the last twentieth of a line's points, over faint single ones; zero: the y axis
    starts at 0; log_from: values that differ by more than so many times are drawn on a log axis; x_ticks: the places
    to mark on a log x axis; None: a plain axis. What is not finite leaves a gap.
    """
    drawn = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not drawn:
        return tag("figure", tag("h3", title), tag("p", "no finite value logged", class_="soft"))
    values = [y for line in drawn for _, y in line.points if math.isfinite(y)]
    xs = [x for line in drawn for x, _ in line.points]
    log_y = not zero and min(values) > 0 and max(values) > log_from * min(values)
    across = _Axis(x_ticks or xs, LEFT + 4, WIDTH - RIGHT, log=bool(x_ticks))
    up = _Axis(values, HEIGHT - BOTTOM - (0 if zero else 8), TOP + 4, log=log_y, zero=zero)
    parts = _grid(across, up, x_ticks, x_label)
    ends = []
    for line in drawn:
        count = round(len(line.points) / SMOOTH_SHARE) if smooth else 1
        top = running_mean(line.points, count) if count > 1 else line.points
        body = [_path(line.points, across, up, class_="faint")] if count > 1 and len(drawn) <= MOST_FAINT else []
        dashes = None if line.colour < COLOURS else "6 3"  # a colour's second line
        body += [_path(top, across, up, stroke_dasharray=dashes), _marks(line, across, up)]
        last = next(y for _, y in reversed(top) if math.isfinite(y))
        ends.append((line, last, up(last)))
        parts.append(tag("g", body, class_=colour_class(line.colour)))
    parts += _end_labels(ends)
    svg = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title} by {x_label}")
    return tag("figure", tag("h3", title), svg, tag("figcaption", caption) if caption else "")


def _grid(across: _Axis, up: _Axis, x_ticks: list[float] | None, x_label: str) -> list[Html]:
    parts = []
    for value in log_ticks(up.low, up.high) if up.log else round_ticks(up.low, up.high, 5):
        y = f"{up(value):.1f}"
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(tag("text", short(value), x=LEFT - 6, y=f"{up(value) + 4:.1f}", text_anchor="end"))
    right = -math.inf  # where the label before this one ends
    for value in x_ticks or round_ticks(across.low, across.high, 4):
        label = f"{value:,.0f}" if x_ticks and value < 1e5 or value == int(value) and value < 1e4 else short(value)
        half = 3.5 * len(label)
        if across(value) - half > right + 4:
            parts.append(tag("text", label, x=f"{across(value):.1f}", y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
            right = across(value) + half
    parts.append(tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    return parts


def _path(points: Points, across: _Axis, up: _Axis, **look: str | None) -> Html:
    words = []
    for is_finite, stretch in itertools.groupby(points, key=lambda p: math.isfinite(p[1])):
        if is_finite:
            words.append("M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in thin(list(stretch))))
    return tag("path", d="".join(words), **look)


def _marks(line: Line, across: _Axis, up: _Axis) -> list[Html]:
    if len(line.points) > MARKED:
        return []
    return [
        tag("circle", tag("title", f"{x:,g}: {y:.6g}"), cx=f"{across(x):.1f}", cy=f"{up(y):.1f}", r=3)
        for x, y in line.points
        if math.isfinite(y)
    ]


def _end_labels(ends: list[tuple[Line, float, float]]) -> list[Html]:
    """Each line's key and last value in the right margin, at the height of its end or as near as no two overlap."""
    ends = sorted(ends, key=lambda end: end[2])
    places = [y for _, _, y in ends]
    for _ in range(200):  # neighbours that are too near push each other apart by equal parts
        for i in range(1, len(places)):
            if (overlap := TEXT - (places[i] - places[i - 1])) > 0:
                places[i - 1], places[i] = places[i - 1] - overlap / 2, places[i] + overlap / 2
        places = [min(max(place, TOP), HEIGHT - BOTTOM) for place in places]
    return [
        tag("text", f"{line.key} {short(value)}".strip(), x=WIDTH - RIGHT + 6, y=f"{place + 4:.1f}",
            class_=f"end {colour_class(line.colour)}")
        for (line, value, _), place in zip(ends, places, strict=True)
    ]  # fmt: skip


def legend(entries: list[tuple[str, int, Any]]) -> Html:
    """What the keys of lines stand for: (key, colour, name) each."""
    return tag("ul", [tag("li", chip(key, colour), name) for key, colour, name in entries], class_="legend")


def chip(key: str, colour: int) -> Html:
    """A key on its colour."""
    return tag("span", key, class_=f"chip {colour_class(colour)}")


def heat_cell(share: float, text: str, hint: str) -> Html:
    """A cell of a heat table: share 0 is pale, 1 is dark blue."""
    if not math.isfinite(share):
        return tag("td", text, title=hint)
    share = min(max(share, 0.0), 1.0)
    pale, dark = (236, 242, 248), (8, 69, 148)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(pale, dark, strict=True))
    ink = "#fff" if share > 0.5 else "#1b1f24"
    return tag("td", text, title=hint, style=f"background: rgb({red},{green},{blue}); color: {ink}")
