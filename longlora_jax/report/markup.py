"""HTML tags, in which markupsafe escapes what is not Html yet, and the look of the page."""

from typing import Any

from markupsafe import Markup as Html
from markupsafe import escape

_VOID = {"meta"}


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element: tag("td", "<b>", class_="wide") is <td class="wide">&lt;b&gt;</td>.

    A child is Html, text or a list of children; attributes that are None are left out, and "_" in a name is "-".
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.strip("_").replace("_", "-")}="{escape(value)}"')
    head = Html(f"<{' '.join(words)}>")
    return head if name in _VOID else head + _join(children) + Html(f"</{name}>")


def _join(children: Any) -> Html:
    return Html().join(_join(child) if isinstance(child, list | tuple) else child for child in children)


def table(head: list[Any], rows: list[list[Any]], **attributes: Any) -> Html:
    """A table whose first column names the row; it scrolls by itself where the page is narrow."""
    first = [tag("th", cell, scope="col") for cell in head]
    body = [tag("tr", tag("th", row[0], scope="row"), [cell if _is_cell(cell) else tag("td", cell) for cell in row[1:]])
            for row in rows]  # fmt: skip
    whole = tag("table", tag("thead", tag("tr", first)), tag("tbody", body), **attributes)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label="table")


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, Html) and cell.startswith("<td")


def fold(title: Any, *children: Any, is_open: bool = False) -> Html:
    """A part of the page that opens and closes."""
    return tag("details", tag("summary", title), *children, open="" if is_open else None)


def page(title: str, body: list[Html]) -> Html:
    """The whole file: it fetches nothing, and its policy forbids it to."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(_STYLE)),
    )
    return Html("<!doctype html>\n") + tag("html", head, tag("body", tag("main", body)), lang="en") + "\n"


# Colours of runs: of the palettes of Okabe and Ito and of Tol, darkened (or, on black, lightened) until text in them
# reads well.
COLOURS = 7
_STYLE = """
:root { --ground: #fff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #59636e; --line: #dfe3e8; --mark: #fff3d6;
  --c0: #0072b2; --c1: #b84f00; --c2: #007a59; --c3: #a8457f; --c4: #332288; --c5: #6f6f1f; --c6: #555; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --panel: #1d2125; --ink: #e6e9ec; --soft: #a3adb8; --line: #343a41; --mark: #43371a;
    --c0: #56b4e9; --c1: #f0a04b; --c2: #3cc9a0; --c3: #e79cc4; --c4: #a79bea; --c5: #cfcf6a; --c6: #bbb; } }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: anywhere; background: var(--ground); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.55rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 34px 0 10px; }
h3 { font-size: 1rem; margin: 0 0 6px; }
p { margin: 4px 0 10px; } .soft, figcaption { color: var(--soft); font-size: .86rem; }
.notice { background: var(--mark); border-radius: 6px; padding: 8px 12px; }
.cards, .charts, .pair { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); align-items: start; }
.pair > *, .cards > * , .charts > * { min-width: 0; }
.card, figure { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px; margin: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px 22px; margin: 10px 0 12px; }
.tiles b { display: block; font-size: 1.4rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .82rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
svg { display: block; width: 100%; height: auto; max-width: 30rem; margin: 0 auto; }
svg text { font-size: 11px; fill: var(--soft); } svg text.end { font-weight: 600; fill: var(--c); }
svg .grid { stroke: var(--line); } svg .faint { opacity: .3; } svg circle { fill: var(--c); }
svg path { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; } svg path.faint { stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 0 0 12px; padding: 0; }
.chip { display: inline-block; min-width: 1.5em; padding: 0 .35em; margin-right: .45em; border-radius: 5px;
  background: var(--c); color: var(--ground); font-weight: 700; text-align: center; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: 8px; }
.scroll { overflow-x: auto; max-width: 100%; }
table { overflow-wrap: normal; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; } tbody th { font-weight: 500; }
.numbers td, .numbers thead th + th { text-align: right; padding: 4px 0 4px 16px; white-space: nowrap; }
.numbers tbody th { min-width: 8.5em; } .numbers small { display: block; color: var(--soft); }
.settings td { max-width: 26rem; overflow-wrap: anywhere; min-width: 7rem; } .differs { background: var(--mark); }
.settings tbody th { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86rem; }
.heat th { border: 0; vertical-align: middle; padding: 4px 8px; font-weight: 500; color: var(--soft);
  white-space: nowrap; }
.heat td { border: 2px solid var(--panel); border-radius: 6px; min-width: 3.2rem; padding: 7px 4px;
  text-align: center; }
.heat thead th + th { text-align: center; }
@media (max-width: 480px) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } main { padding: 14px 12px 40px; }
  figure, .card { padding: 12px; } }
""" + "".join(f".s{i} {{ --c: var(--c{i}); }}\n" for i in range(COLOURS))  # fmt: skip
