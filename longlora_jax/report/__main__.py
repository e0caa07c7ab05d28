"""One HTML page about one or several runs: what they are, how they learned, what they can do.

python -m longlora_jax.report RUN [RUN ...] [--perplexity FILE ...] [--needle FILE ...] [--passkey FILE ...]
    [--topics FILE ...] [--longqa FILE ...]
RUN is a workdir of train.py, of a run that is done or under way. Results of evaluations that lie in it as JSON files
are shown as well. The page is one file, fetches nothing and holds no script.
"""

import argparse
import json
import os
from statistics import median
from typing import Any

from longlora_jax import errors
from longlora_jax.errors import UserError
from longlora_jax.fields import flat
from longlora_jax.files import write_text
from longlora_jax.report.charts import MOST_FAINT, SMOOTH_SHARE, Line, chip, legend, line_chart, short
from longlora_jax.report.evals import KINDS, Evaluation, grids, perplexities, read_evaluations
from longlora_jax.report.markup import Html, fold, page, table, tag
from longlora_jax.report.runs import Run, census, defaults, model_of, read_runs

# Metric: (title, unit or note, whether to smooth, whether the axis starts at 0). Others follow in their own order.
CHARTS = {
    "train/loss": ("Training loss", "nats a token", True, False),
    "eval/perplexity": ("Perplexity on held-out text", "full attention", False, False),
    "eval/loss": ("Loss on held-out text", "nats a token, full attention", False, False),
    "train/learning_rate": ("Learning rate", "", False, True),
    "train/grad_norm": ("Gradient norm", "before clipping", True, False),
    "perf/tokens_per_second": ("Tokens a second", "all devices together", True, True),
    "perf/step_seconds": ("Seconds a step", "", True, True),
    "perf/peak_memory_gib": ("Peak memory, GiB", "the fullest device of the first process", False, True),
}
HIDDEN = {"step", "eval/tokens"}


def main(argv: list[str] | None = None) -> None:
    """Reads, renders and writes; argv without the program's name, None for the process's own."""
    args = _parser().parse_args(argv)
    runs = read_runs(args.runs)
    evaluations, left_out = read_evaluations({kind: getattr(args, kind) for kind in KINDS}, runs)
    _write(args.out, render(runs, evaluations, left_out))
    logged = ", ".join(f"{run.name} at step {run.step:,} of {run.config['steps']:,}" for run in runs)
    print(f"{args.out}: {logged}; {len(evaluations)} evaluation{'s' * (len(evaluations) != 1)}")


def _parser() -> argparse.ArgumentParser:
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.report",
        description=(__doc__ or "").partition("\n")[0],
        epilog="JSON files of results that lie in a RUN are found without being named.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="workdir of train.py")
    for kind in KINDS:
        what = f"what python -m longlora_jax.evals.{kind} --json wrote"
        parser.add_argument(f"--{kind}", metavar="FILE", nargs="+", default=[], help=what)
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    return parser


def _write(path: str, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another --out") from error


def render(runs: list[Run], evaluations: list[Evaluation], left_out: list[str]) -> Html:
    """The page of some runs and what evaluations found; left_out: what is wrong with files that are not shown."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    body = [tag("h1", title), tag("p", "Report of longlora_jax", class_="soft"), *_notices(runs, left_out)]
    body.append(tag("div", [_card(run) for run in runs], class_="cards"))
    body += _section("Training", _curves(runs))
    for heading, parts in (
        ("Perplexity by length", perplexities(evaluations, runs)),
        ("Passkey retrieval", grids("passkey", evaluations, runs)),
        ("Needle in a haystack", grids("needle", evaluations, runs)),
        ("The first topic of a long talk", grids("topics", evaluations, runs)),
        ("Questions about long texts", grids("longqa", evaluations, runs)),
    ):
        body += _section(heading, parts)
    body += _section("Parameters", _census(runs))
    body += _section("Config", _settings(runs))
    return page(f"{title} · longlora_jax", body)


def _section(heading: str, parts: list[Html]) -> list[Html]:
    return [tag("h2", heading), *parts] if parts else []


def _notices(runs: list[Run], left_out: list[str]) -> list[Html]:
    texts = [f"{fault}. It is left out." for fault in left_out]
    texts += [f"{run.name}: no step has been logged yet." for run in runs if not run.lines]
    for run in runs:
        for key, steps in run.not_finite().items():
            more = f" and {len(steps) - 1:,} more" if len(steps) > 1 else ""
            texts.append(f"{run.name}: {key} is not a finite number at step {steps[0]:,}{more}.")
    return [tag("p", text, class_="notice", role="status") for text in texts]


def _card(run: Run) -> Html:
    """What a run is, and its newest numbers."""
    when = f"last written {run.written}" if run.written else "nothing written yet"
    state = f"step {run.step:,} of {run.config['steps']:,} · {when} · under way, or stopped"
    state = f"done, {run.step:,} steps" if run.is_done else state
    tiles = [tag("div", tag("b", value), tag("span", name)) for value, name in _numbers(run)]
    facts = [(tag("dt", name), tag("dd", value)) for name, value in _facts(run).items() if value]
    return tag(
        "section",
        tag("h3", chip(run.letter, ord(run.letter) - ord("A")), run.name),
        tag("p", state, class_="soft"),
        tag("div", tiles, class_="tiles") if tiles else "",
        tag("dl", [list(pair) for pair in facts]),
        class_="card",
    )


def _numbers(run: Run) -> list[tuple[str, str]]:
    found = []
    if (loss := run.last("train/loss")) is not None:
        found.append((f"{loss:.4f}", "training loss, last"))
    if (perplexity := run.last("eval/perplexity")) is not None:
        found.append((short(perplexity), "held-out perplexity"))
    if rates := [rate for _, rate in run.series("perf/tokens_per_second")]:
        found.append((short(median(rates)), "tokens/s, median"))
        found.append((short(run.step * run.config["batch_size"] * run.config["seq_len"]), "tokens"))
        found.append((_duration(run.seconds), "in steps"))
    if (memory := run.last("perf/peak_memory_gib")) is not None:
        found.append((f"{memory:.2f} GiB", "peak memory"))
    return found


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.1f} min" if minutes < 90 else f"{hours:.1f} h"


def _facts(run: Run) -> dict[str, str]:
    """Model, window, attention and recipe of a run, each in a line."""
    c, model = run.config, model_of(run)
    base = os.path.basename(c.get("init_from", "").rstrip("/")) or "random weights"
    groups = census(run).values()
    trains, total = sum(g["trainable"] for g in groups), sum(sum(g.values()) for g in groups)
    scaling = model.rope_scaling
    rope = f"{scaling.rope_type} ×{scaling.factor:g}" if scaling else "not scaled"
    before = scaling.original_max_position_embeddings if scaling else None
    window = f"{c['seq_len']:,} tokens"
    if before and before != c["seq_len"]:
        window = f"{before:,} → {window}"
    lora, data, attention = c.get("lora", {}), c.get("data", {}), c.get("attention", {})
    pattern = attention.get("pattern", "")
    if pattern and pattern != "full":
        group = attention.get("group_size") or round(c["seq_len"] * attention.get("group_ratio", 0.25))
        pattern += f", groups of {group:,} tokens"
        if attention.get("full_last"):
            pattern += f"; full in the last {attention['full_last']:.0%} of the steps"
        if attention.get("full_every"):
            pattern += f"; full in every {attention['full_every']}th step"
    targets = ", ".join(str(t).removesuffix("_proj") for t in lora.get("targets", []))
    adapters = f"LoRA of rank {lora.get('rank')} on {targets}"
    recipe = {"lora": adapters, "longlora": f"{adapters}; embedding and norms too", "full": "every weight"}
    recipe |= {"lora_norm": f"{adapters}; norms too", "lora_embedding": f"{adapters}; embedding too"}
    optim, source = c.get("optim", {}), data.get("source", "")
    rate = f"learning rate {short(optim.get('learning_rate', 0))}, {optim.get('schedule')}"
    where = os.path.basename(str(data.get("path", "")).rstrip("/"))
    if source == "python":
        where = f"files of {where or 'the interpreter'}"
    more = f" and {len(c['mixture'])} more" if c.get("mixture") else ""
    return {
        "model": f"{base}: {model.num_hidden_layers} layers of {model.hidden_size:,}, {short(total)} parameters",
        "window": f"{window}, rope {rope}",
        "attention": pattern,
        "trains": f"{recipe.get(c.get('mode', ''), c.get('mode', ''))} ({short(trains)} parameters)",
        "steps": f"{c['steps']:,} of {c['batch_size']:,} × {c['seq_len']:,} tokens, {rate}",
        "data": f"{source} {where}{more}".strip(),
    }


def _curves(runs: list[Run]) -> list[Html]:
    logged = dict.fromkeys(key for run in runs for line in run.lines for key in line if key not in HIDDEN)
    if not logged:
        return []
    figures = []
    for key in [*(key for key in CHARTS if key in logged), *(key for key in logged if key not in CHARTS)]:
        title, note, smooth, zero = CHARTS.get(key, (key, "", True, False))
        lines = [
            Line(run.letter if len(runs) > 1 else "", i, run.series(key)) for i, run in enumerate(runs)
        ]  # fmt: skip
        figures.append(
            line_chart(
                title,
                lines,
                x_label="step",
                caption=f"{note[:1].upper()}{note[1:]}." if note else "",
                smooth=smooth,
                zero=zero,
            )
        )
    parts = [legend([(run.letter, i, run.name) for i, run in enumerate(runs)])] if len(runs) > 1 else []
    if max(len(run.lines) for run in runs) >= 2 * SMOOTH_SHARE:
        how = "Loss, gradient norm and speed are means over the last twentieth of a run, the numbers at their ends too."
        parts.append(tag("p", how + (" Faint: each step." if len(runs) <= MOST_FAINT else ""), class_="soft"))
    return [*parts, tag("div", figures, class_="charts")]


def _census(runs: list[Run]) -> list[Html]:
    parts = []
    for run in runs:
        groups = census(run)
        rows: list[list[Any]] = [[n, f"{g['trainable']:,}", f"{g['frozen']:,}"] for n, g in groups.items()]
        trains, frozen = (sum(g[kind] for g in groups.values()) for kind in ("trainable", "frozen"))
        rows.append(["all", f"{trains:,}", f"{frozen:,}"])
        share = f"{run.name}: {trains:,} of {trains + frozen:,} train ({trains / (trains + frozen or 1):.2%})"
        body = table(["group", "trainable", "frozen"], rows, class_="numbers")
        parts.append(fold([chip(run.letter, ord(run.letter) - ord("A")), share], body, is_open=len(runs) == 1))
    return parts


def _settings(runs: list[Run]) -> list[Html]:
    """Config fields side by side: those that differ from the defaults, the model's, all others."""
    usual, configs = defaults(), [flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    shape = [name for name in names if name == "model" or name.startswith("model.")]
    plain = [name for name in names if name not in shape and name != "base_fingerprint"]
    absent = object()
    changed = [n for n in plain if any(c.get(n, absent) not in (absent, usual.get(n, absent)) for c in configs)]
    rest = [name for name in names if name not in changed and name not in shape]
    head = ["setting", *(run.name for run in runs)]

    def rows(names: list[str], *, with_default: bool = False) -> list[list[Any]]:
        return [
            [name, *(_value_cell(c, name, len({json.dumps(x.get(name)) for x in configs}) > 1) for c in configs)]
            + ([_text(usual[name]) if name in usual else "–"] if with_default else [])
            for name in names
        ]

    return [
        fold(
            f"Changed from the defaults ({len(changed)})",
            table([*head, "default"], rows(changed, with_default=True), class_="settings"),
            is_open=True,
        ),
        fold(f"The model ({len(shape)})", table(head, rows(shape), class_="settings")),
        fold(f"All others ({len(rest)})", table(head, rows(rest), class_="settings")),
    ]


def _value_cell(config: dict[str, Any], name: str, differs: bool) -> Html:
    return tag("td", _text(config[name]) if name in config else "–", class_="differs" if differs else None)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value) or "()"
    return json.dumps(value)


if __name__ == "__main__":
    errors.run(main)
