"""Questions whose answer lies somewhere in a long prompt, asked over a grid of lengths and depths.

Depth is the share of the filling, in characters, that comes before what is to be found: 0 is the beginning, 1 the end.
Length is that of the whole prompt in tokens, template and all; a prompt that cannot have it exactly has a few less, and
the results say how many it has. A result is written as soon as it is there, and a grid that was broken off goes on.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longlora_jax import errors
from longlora_jax.data import read_text
from longlora_jax.errors import UserError, number, numbers
from longlora_jax.evals.command import add_rope_flags, check_outputs, note_window, quantization_of, rope_override
from longlora_jax.evals.plots import plot_grid
from longlora_jax.evals.reader import TEMPLATES, TOKENS_AT_ONCE, Reader
from longlora_jax.evals.results import Results, digest
from longlora_jax.evals.scoring import stretch_rope
from longlora_jax.model_config import ModelConfig
from longlora_jax.progress import progress_bar
from longlora_jax.weights.workdir import at_step

Z = 1.959964  # of the normal distribution, for 95%
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


class Task(NamedTuple):
    """What is asked, and when an answer is right.

    ask(reader, length, depth, rng) -> (ids [tokens] of a prompt, what is expected); judge(answer, expected) -> its
    score from 0 to 1, which is right; stop(answer so far) -> whether to write no more; graded: results have a score.
    settings: what else the results depend on, for the head of the JSON.
    """

    name: str
    ask: Callable[[Reader, int, float, np.random.Generator], tuple[np.ndarray, str]]
    judge: Callable[[str, str], float]
    stop: Callable[[str], bool]
    max_new_tokens: int
    settings: dict[str, Any]
    graded: bool = False


def wilson(correct: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a share of right answers (E. B. Wilson, 1927, without correction for continuity)."""
    share, z2 = correct / trials, Z * Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # Rounding would leave a trace below 0 and above 1.
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == trials else middle + half)


def split_at_sentence(text: str, depth: float) -> tuple[str, str]:
    """(before, after) of a text, parted at the end of a sentence that is nearest to this depth, or at its beginning.

    A text without any end is parted at its own ends. At depth 1 a last sentence that is cut comes after the place.
    """
    ends = [m.end() for m in re.finditer(r"[.!?][\"'”’)]*(?:\s+|$)", text)] or [len(text)]
    place = min([0, *ends], key=lambda end: abs(end - depth * len(text)))
    return text[:place], text[place:]


def grid_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The flags that all grids have."""
    parser = errors.ArgumentParser(
        prog=f"python -m longlora_jax.evals.{name}",
        description=f"{description} Called again with the same --json it computes only what is missing there.",
        epilog=f"Example: python -m longlora_jax.evals.{name} --model runs/my_run {example}",
    )
    add_model_flags(parser)
    add = parser.add_argument
    add(
        "--lengths",
        required=True,
        type=numbers(int, 1),
        metavar="T[,T...]",
        help="lengths of the whole prompt in tokens: 1024,4096. Lengths beyond the model's window are asked too",
    )
    add("--trials", type=number(int, 1), default=5, metavar="N", help="questions for each result (default: 5)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of what is to be found (default: 0)")
    add_rope_flags(add, "the longest of --lengths")
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that lets a model answer."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, converted checkpoint or training workdir")
    add("--step", metavar="N", help=errors.STEP_HELP)
    add("--json", metavar="FILE", help="where to write the results, and where to find those of an earlier call")
    add("--plot", metavar="FILE.png", help="where to draw them")
    template_help = "ask through the tokenizer's chat template, or not (default: auto, where there is one)"
    add("--template", choices=TEMPLATES, default="auto", help=template_help)
    dtype_help = "of weights, activations and cache (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    add("--quantize", choices=errors.QUANTIZE, default="none", help=errors.QUANTIZE_HELP)
    rows_help = f"prompts read at once: speed and memory only (default: {TOKENS_AT_ONCE} tokens' worth)"
    add("--batch_size", type=number(int, 1), metavar="N", help=rows_help)


def add_depths(parser: argparse.ArgumentParser) -> None:
    """The flag of grids that hide something at a depth."""
    depths_help = "where it lies: 0 the beginning, 1 the end (default: 0,0.25,0.5,0.75,1)"
    parser.add_argument("--depths", type=numbers(float, 0, 1), default=DEPTHS, metavar="D[,D...]", help=depths_help)


def read_haystack(path: str) -> tuple[str, dict[str, str]]:
    """The text of a file, without blank ends, and what results that begin it anywhere say of it.

    Raises UserError if there is none.
    """
    if not (text := read_text(path).strip()):
        raise UserError(f"{path} is empty: give a text")
    return text, {"haystack": path, "haystack_digest": digest(text), "haystack_begins": "anywhere"}


def begun_anywhere(text: str, rng: np.random.Generator) -> str:
    """A text turned so that it begins with some sentence of its own, and what came before it follows the end.

    So the questions of one depth stand in other places of a haystack, and their answers tell more than one would.
    """
    before, after = split_at_sentence(text, rng.random())
    return f"{after.rstrip()}\n\n{before.rstrip()}".strip()


def run_grid(task: Task, args: argparse.Namespace, depths: Sequence[float] | None) -> list[dict[str, Any]]:
    """Asks what is not in args.json yet and returns all results; depths None: there are none in the results.

    Prints a table, writes args.json and draws args.plot. Raises UserError.
    """
    errors.start_logging()
    check_outputs(args.json, args.plot)
    override = rope_override(args)
    args.model = at_step(args.model, args.step)

    def stretch(config: ModelConfig) -> ModelConfig:
        return config if override is None else stretch_rope(config, max(args.lengths), *override.values())

    how = {name: getattr(args, name) for name in ("template", "dtype", "batch_size", "quantize")}
    reader = Reader(args.model, **how, stretch=stretch)
    head = {"task": task.name, "model": args.model, **reader.identity, "dtype": args.dtype}
    head |= {"template": reader.template, "seed": args.seed}
    head |= {"quantize": quantization_of(args), "rope_override": None}
    if override and (scaling := reader.config.rope_scaling):  # what was left open goes by the lengths
        head["rope_override"] = {"rope_type": scaling.rope_type, "rope_factor": scaling.factor}
    key = ("length",) if depths is None else ("length", "depth")
    results = Results(args.json, head | task.settings, key)
    cells = [{"length": t} | ({} if depths is None else {"depth": d}) for t in args.lengths for d in depths or [0.0]]
    missing = [cell for cell in cells if not results.find(**cell, trials=args.trials)]
    # A length that cannot be is told before hours are spent on the others; of the longest, for all questions.
    for i, cell in enumerate(sorted(missing, key=lambda cell: -cell["length"])):
        for trial in range(1 if i else args.trials):
            _ask(task, reader, cell, args.seed, trial)
    note_window(args.lengths, reader.config)
    done = (len(cells) - len(missing)) * args.trials
    with progress_bar(len(cells) * args.trials, label=task.name, unit="prompt", start=done) as bar:
        for cell in missing:
            asked = [_ask(task, reader, cell, args.seed, trial) for trial in range(args.trials)]
            answers = reader.answer([ids for ids, _ in asked], task.max_new_tokens, task.stop)
            results.add(cell | _judged(task, asked, answers))
            bar.update(args.trials)
    _print(results.rows, args.model, task.graded)
    if args.plot:
        _plot(task, results.rows, args, reader.config.max_position_embeddings)
    return results.rows


def _ask(task: Task, reader: Reader, cell: dict[str, Any], seed: int, trial: int) -> tuple[np.ndarray, str]:
    # The same questions at every depth: what differs between results is the place.
    rng = np.random.default_rng([seed, cell["length"], trial])
    return task.ask(reader, cell["length"], cell.get("depth", 0.0), rng)


def _judged(task: Task, asked: list[tuple[np.ndarray, str]], answers: list[str]) -> dict[str, Any]:
    scores = [task.judge(answer, expected) for answer, (_, expected) in zip(answers, asked, strict=True)]
    correct = sum(score == 1 for score in scores)
    low, high = wilson(correct, len(scores))
    row: dict[str, Any] = {"tokens": min(len(ids) for ids, _ in asked), "trials": len(scores), "correct": correct}
    row |= {"low": low, "high": high} | ({"score": float(np.mean(scores))} if task.graded else {})
    said = [{"expected": e, "answer": a} for (_, e), a in zip(asked, answers, strict=True)]
    return row | {"answers": said}


def _print(rows: list[dict[str, Any]], model: str, graded: bool) -> None:
    print(model)
    print(" length  depth  tokens    right  95% interval" + ("  score" if graded else ""))
    for r in rows:
        depth, right = f"{r['depth']:.2f}" if "depth" in r else "-", f"{r['correct']}/{r['trials']}"
        score = f"{r['score']:>9.2f}" if graded else ""
        print(f"{r['length']:>7} {depth:>6} {r['tokens']:>7} {right:>8}  {r['low']:.2f} to {r['high']:.2f}{score}")


def _plot(task: Task, rows: list[dict[str, Any]], args: argparse.Namespace, window: int) -> None:
    lengths, depths = sorted({r["length"] for r in rows}), sorted({r.get("depth", 0.0) for r in rows})
    values = np.full((len(depths), len(lengths)), np.nan)
    texts = [["" for _ in lengths] for _ in depths]
    for r in rows:
        i, j = depths.index(r.get("depth", 0.0)), lengths.index(r["length"])
        values[i, j] = r["score"] if task.graded else r["correct"] / r["trials"]
        texts[i][j] = f"{r['score']:.2f}" if task.graded else f"{r['correct']}/{r['trials']}"
    placed = "depth" in rows[0]
    plot_grid(
        values,
        texts,
        args.plot,
        columns=[f"{length:,}" for length in lengths],
        rows=[f"{depth:.0%}" for depth in depths] if placed else [""],
        title=f"{Path(args.model).resolve().name}: {task.name}",
        x_label="length of the prompt in tokens",
        y_label="depth" if placed else "",
        after=sum(length <= window for length in lengths),
        note=f"window of the model: {window:,}",
    )
