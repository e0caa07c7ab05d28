"""The tables of SmolLM2 in docs/measured.md and README.md are those of the committed results."""

import re
from pathlib import Path

import pytest

from benchmarks import smollm2

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("i", range(3), ids=["novels", "mathematics", "passkeys"])
def test_measured_shows_the_results(i):
    """Catches: a number that was typed, or results that were made again without the table."""
    assert smollm2.tables()[i] in (ROOT / "docs" / "measured.md").read_text()


def test_readme_shows_the_results():
    """Catches: README's first table, and its table of twice the window, left as they were."""
    cells = {}
    for line in smollm2.tables()[0].splitlines():
        label, *values = (cell.strip(" *") for cell in line.strip("|").split("|"))
        cells[label] = values
    lengths, seen = cells.pop("novels"), 0
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    for table in (table for table in tables if "SmolLM2, perplexity of novels" in table):
        rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()]
        at = [lengths.index(length) for length in rows[0][1:]]
        for label, *values in rows[2:]:
            assert [value or "-" for value in values] == [cells[label][i] for i in at], label
            seen += 1
    assert seen >= 7
