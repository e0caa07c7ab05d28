"""The main job on a laptop: extend the shipped LLaMA 8 times, export it, and show what that brought.

`make quickstart` runs it. Every step but the evaluation is one of the commands that a user of a large model
types, and is printed before it runs.
"""

import argparse
import dataclasses
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from longlora_jax import errors
from longlora_jax.data import HELD_OUT, load_tokenizer, read_documents
from longlora_jax.errors import UserError
from longlora_jax.evals.perplexity import evaluate, on_device, stretch_rope
from longlora_jax.evals.plots import plot_perplexity
from longlora_jax.files import write_json
from longlora_jax.weights.load import OpenModel, open_model

BASE = "models/tiny-python-llama"
DTYPE = "float32"
LENGTHS = (256, 512, 1024, 2048)
TRAININGS = (
    ("quickstart", "extended", "extend the window to 2,048 tokens with LongLoRA (1 to 3 minutes)"),
    ("quickstart_control", "control", "control: the same scaling and tokens at the old window (1 to 3 minutes)"),
)
BASE_ROW, EXTENDED_ROW = "base as it is", "extended by LongLoRA"
CONTROL_ROW = "control: YaRN x8, same tokens at 256"


def main() -> None:
    """Trains, exports, evaluates, prints the table and writes quickstart.json and quickstart.png."""
    parser = argparse.ArgumentParser(
        prog="python -m longlora_jax.quickstart", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--steps", type=int, help="training steps (default: as configs/quickstart.py says)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each held-out file to score")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")
    args = parser.parse_args()
    if not Path(BASE).is_dir():
        raise UserError(f"there is no {BASE} here: run make quickstart in the root of the repository")
    if args.tokens < max(LENGTHS):
        raise UserError(f"--tokens {args.tokens} of a file do not fill its longest window: give {max(LENGTHS)} or more")
    began = time.perf_counter()
    for folder in (args.out / name for name in ("extended", "extended-hf", "control")):
        shutil.rmtree(folder, ignore_errors=True)  # a quickstart shows the whole job; a run of yours would resume
    steps = [f"--config.steps={args.steps}"] if args.steps else []
    for number, (config, name, what) in enumerate(TRAININGS, 1):
        _step(number, what)
        _call("train.py", "--config", f"configs/{config}.py", "--workdir", str(args.out / name), *steps)
    _step(3, "export the extended model as a Hugging Face folder")
    _call("convert_weights.py", "to-hf", str(args.out / "extended"), str(args.out / "extended-hf"))
    _step(4, "evaluate with full attention on held-out files of this Python's library (1 to 3 minutes)")
    table = evaluate_all(args.out, args.tokens)
    minutes = (time.perf_counter() - began) / 60
    write_json(str(args.out / "quickstart.json"), {"minutes": minutes, "rows": table})
    plot_perplexity(
        {name: [(r["seq_len"], r["perplexity"]) for r in results] for name, results in table.items()},
        str(args.out / "quickstart.png"),
        title="A LLaMA with a window of 256 tokens, extended 8 times",
        highlight=EXTENDED_ROW,
        window=256,
        window_label="the base's window",
    )
    print(f"\nPerplexity under full attention of files it never saw: {', '.join(HELD_OUT)}\n")
    print(format_table(table))
    print(f"\n{minutes:.1f} minutes. Picture: {args.out}/quickstart.png")
    print(f"The extended model, as transformers and others read it: {args.out}/extended-hf")


def evaluate_all(folder: Path, scored_tokens: int) -> dict[str, list[dict]]:
    """Every row of the table: {row: one result of perplexity.evaluate for each of LENGTHS}.

    scored_tokens: how much of each held-out file; the same tokens at every length.
    """
    base, control, extended = (open_model(str(p), DTYPE) for p in (BASE, folder / "control", folder / "extended-hf"))
    tokenizer = load_tokenizer(BASE)
    documents = [tokenizer.encode(d.text)[:scored_tokens] for d in read_documents("python", "", only=HELD_OUT)]
    rows = {BASE_ROW: (base, None)}
    rows |= {f"base, {kind} x8, untrained": (base, kind.lower()) for kind in ("linear", "NTK", "YaRN")}
    rows |= {CONTROL_ROW: (control, None), EXTENDED_ROW: (extended, None)}
    return {name: _evaluate_row(name, model, kind, documents) for name, (model, kind) in rows.items()}


def _evaluate_row(name: str, opened: OpenModel, rope_type: str | None, documents) -> list[dict]:
    """A model at all lengths; an untrained scaling is the one for the longest length, as a user would set it."""
    model = on_device(opened, DTYPE)
    if rope_type:
        model = dataclasses.replace(model, config=stretch_rope(model.config, max(LENGTHS), rope_type))
    # As many tokens at once as the longest window has: on a CPU more at once took longer, not less.
    rows = {t: max(LENGTHS) // t for t in LENGTHS}
    results = [evaluate(model, documents, t, batch_size=rows[t], label=f"{name}, {t:,} tokens") for t in LENGTHS]
    for result in results:
        del result["windows_detail"]
    return results


def format_table(table: dict[str, list[dict]]) -> str:
    """Perplexity by length, and over the last quarter of the longest window, as Markdown."""
    head = ["", *(f"{t:,}" for t in LENGTHS), f"last quarter of {LENGTHS[-1]:,}"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for name, results in table.items():
        cells = [f"{r['perplexity']:.2f}" for r in results] + [f"{results[-1]['last_quarter']['perplexity']:.2f}"]
        lines.append([f"**{name}**" if name == EXTENDED_ROW else name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    )


def _step(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def _call(*command: str) -> None:
    print(f"$ {shlex.join(['python', *command])}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise UserError("the step above failed: mend what it says and run make quickstart again")


if __name__ == "__main__":
    errors.run(main)
