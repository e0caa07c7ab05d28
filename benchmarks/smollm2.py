"""SmolLM2's tables and picture out of the results in docs/runs/smollm2: python -m benchmarks.smollm2 [--plot FILE.png]

The tables are those of docs/measured.md: perplexity by length, of the same targets in every row, and passkeys found.
"""

import argparse
from pathlib import Path

from longlora_jax import errors
from longlora_jax.evals.plots import plot_perplexity
from longlora_jax.files import read_json

RUNS = Path(__file__).parents[1] / "docs" / "runs" / "smollm2"
LENGTHS = (2048, 4096, 8192, 16_384, 32_768)
TWICE, FOUR_TIMES = "**LongLoRA to 16,384**", "**LongLoRA to 32,768**"
ROWS = {  # label: (folder, what its files of perplexity end in)
    "base as it is": ("base", ""),
    "base, YaRN x2, untrained": ("base", "_yarn2"),
    TWICE: ("16k_3e-4_again", ""),
    "full attention at 16,384": ("16k_full_3e-4", ""),
    "control: YaRN x2, same tokens at 8,192": ("control_8k_x2_3e-4", ""),
    "base, YaRN x4, untrained": ("base", "_yarn4"),
    FOUR_TIMES: ("32k_3e-4", ""),
    "control: YaRN x4, same tokens at 8,192": ("control_8k_x4_3e-4", ""),
}
WINDOW = 8192  # of the base
DRAWN = ("base as it is", "base, YaRN x4, untrained", "control: YaRN x4, same tokens at 8,192", FOUR_TIMES)
PASSKEY = {
    "base, YaRN x2, untrained": "base/passkey_yarn2.json",
    TWICE: "16k_3e-4_third/passkey.json",
    "base, YaRN x4, untrained": "base/passkey_yarn4.json",
    FOUR_TIMES: "32k_3e-4_again/passkey.json",
    "control: YaRN x4, same tokens at 8,192": "control_8k_x4_3e-4/passkey.json",
}


def perplexities(label: str, texts: str) -> dict[int, float]:
    """{length: perplexity} of a row, on "novels" or "math"."""
    folder, end = ROWS[label]
    return {
        r["seq_len"]: r["perplexity"]
        for r in read_json(str(RUNS / folder / f"perplexity_{texts}{end}.json"))["results"]
    }


def found(file: str) -> dict[int, str]:
    """{length: "right of asked"} of a passkey grid, all depths together; without a length that was broken off."""
    rows = read_json(str(RUNS / file))["results"]
    cells = {length: [r for r in rows if r["length"] == length] for length in {r["length"] for r in rows}}
    depths = max(map(len, cells.values()))
    cells = {length: cell for length, cell in cells.items() if len(cell) == depths}
    return {t: f"{sum(r['correct'] for r in c)} of {sum(r['trials'] for r in c)}" for t, c in cells.items()}


def table(title: str, lengths: tuple[int, ...], rows: dict[str, dict[int, str]]) -> str:
    """A table in Markdown, with a dash where a row has no result."""
    lines = [f"| {title} | " + " | ".join(f"{t:,}" for t in lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    lines += [" | ".join([f"| {label}", *(row.get(t, "-") for t in lengths)]) + " |" for label, row in rows.items()]
    return "\n".join(lines)


def tables() -> list[str]:
    """Novels, mathematics, passkeys."""

    def shown(value: float) -> str:
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"

    made = []
    for texts, title in (("novels", "novels"), ("math", "mathematics")):
        rows = {label: {t: shown(ppl) for t, ppl in perplexities(label, texts).items()} for label in ROWS}
        made.append(table(title, LENGTHS, rows))
    asked = (8192, 12_288, 16_384, 24_576, 32_768)
    return [*made, table("passkeys", asked, {label: found(file) for label, file in PASSKEY.items()})]


def main() -> None:
    """Prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__)
    parser.add_argument("--plot", metavar="FILE.png", help="where to draw perplexity by length, four times the window")
    args = parser.parse_args()
    print("\n\n".join(tables()))
    if args.plot:
        lines = {label.strip("*"): sorted(perplexities(label, "novels").items()) for label in DRAWN}
        # Beyond its window the base has perplexities of hundreds and thousands, which the table says.
        lines = {"base": [point for point in lines.pop(DRAWN[0]) if point[0] <= WINDOW]} | lines
        plot_perplexity(
            lines,
            args.plot,
            title="SmolLM2-135M-Instruct: six novels, under full attention",
            highlight=FOUR_TIMES.strip("*"),
            window=WINDOW,
            window_label="the base's window",
        )


if __name__ == "__main__":
    errors.run(main)
