"""The paper's tables in miniature: trains every row that is not finished, scores it, and prints all tables."""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from longlora_jax import errors
from longlora_jax.errors import UserError, number
from longlora_jax.files import read_json, write_json
from longlora_jax.paper import results, runs, tables

STEPS = 200
# The runs behind docs/paper.md: how long a row takes, before one of it has been run here.
MEASURED = "docs/runs/paper/paper.json"


def _parser() -> errors.ArgumentParser:
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.paper",
        description="Trains the shipped small LLaMA once for each row of the LongLoRA paper's tables, scores it under "
        "full attention on files that it never saw, and prints the tables beside the paper's numbers. Called again it "
        "goes on where it was, and only prints what is finished. docs/paper.md has the results.",
        epilog="Example: python -m longlora_jax.paper --rows parts,patterns/short --seeds 3",
    )
    add = parser.add_argument
    add("--rows", default="", metavar="NAME[,NAME...]", help="tables, or rows as TABLE/ROW (default: all)")
    add(
        "--steps",
        type=number(int, 1),
        default=STEPS,
        metavar="N",
        help="training steps of a row (default: %(default)s)",
    )
    rows_help = "rows of 1,008 tokens in a step (default: as configs/paper.py says)"
    add("--batch_size", type=number(int, 1), metavar="N", help=rows_help)
    add("--dtype", choices=("float32", "bfloat16"), help="of training and scoring (default: as configs/paper.py says)")
    add("--seeds", type=number(int, 1), default=1, metavar="N", help="runs of each row, seeds 0 to N - 1 (default: 1)")
    add("--workdir", type=Path, default=Path("runs/paper"), help="folder of all runs (default: %(default)s)")
    jobs_help = "runs at the same time, for a GPU that one of them does not fill (default: %(default)s)"
    add("--jobs", type=number(int, 1), default=1, metavar="N", help=jobs_help)
    add("--list", action="store_true", help="say what would run and how long it takes, and run nothing")
    add("--show", action="store_true", help="print and draw what is finished, and run nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    errors.start_logging()
    args = _parser().parse_args(argv)
    chosen = tables.chosen([name for name in args.rows.split(",") if name])
    if not os.path.isdir(runs.BASE):
        raise UserError(f"there is no {runs.BASE} here: run this in the root of the repository")
    common = {name: value for name in ("batch_size", "dtype") if (value := getattr(args, name))}
    needed = list(dict.fromkeys(row.run(args.steps, common) for _, rows in chosen for row in rows))
    if args.list:
        print(listing(args.workdir, chosen, args.steps, args.seeds, common))
        return
    if not args.show:
        # All rows with one seed first: a table with one seed says more than a row with three.
        left = [
            (run, seed)
            for seed in range(args.seeds)
            for run in needed
            if (run.steps or not seed) and not runs.finished(args.workdir, run, seed)
        ]
        # Processes that train and score take turns on a GPU: none may take its memory before it needs it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        make_all(args.workdir, left, args.jobs, lambda run: tables.scored_twice(run, args.steps, common))
    content = runs.gather(args.workdir, needed, steps=args.steps, common=common)
    if not content["runs"]:
        raise UserError(f"{args.workdir} holds no finished row of {args.steps} steps: leave out --show to train some")
    write_json(str(args.workdir / "paper.json"), content)
    results.draw(content, chosen, str(args.workdir / "paper.png"))
    print(f"\n{results.format_tables(content, chosen)}")
    print(f"\nNumbers: {args.workdir}/paper.json, picture: {args.workdir}/paper.png")


def make_all(
    workdir: Path, left: Sequence[tuple[tables.Run, int]], jobs: int, twice: Callable[[tables.Run], bool]
) -> None:
    """Makes every (run, seed), so many at the same time, and says what is finished as it is. Raises UserError."""

    def say(i: int, result: dict[str, Any]) -> None:
        what = f"[{i}/{len(left)}] {result['run']}, seed {result['seed']}"
        print(f"{what}: perplexity {result['perplexity']:.2f} in {result['seconds']:.0f} s", flush=True)

    if jobs == 1:
        for i, (run, seed) in enumerate(left, 1):
            print(f"\n[{i}/{len(left)}] {run.name}, seed {seed}", flush=True)
            say(i, runs.make(workdir, run, seed, twice=twice(run)))
        return
    if any(run.steps for run, _ in left):
        runs.prepare(workdir)  # once, before all of them look for it
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(runs.make, workdir, run, seed, twice=twice(run)) for run, seed in left]
        try:
            for i, ended in enumerate(as_completed(waiting), 1):
                say(i, ended.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def listing(
    workdir: Path, chosen: results.Chosen, steps: int, seeds: int, common: Mapping[str, object] = tables.NOTHING
) -> str:
    """Every row with its steps, what is finished of it, and the hours that are left."""
    measured, source = _measured(workdir)
    if not measured:
        raise UserError(f"nothing is measured yet in {workdir} or {MEASURED}: run one row first")
    lines = [f"{'row':<24} {'steps':>6} {'finished':>9} {'hours left':>11}"]
    total, seen = 0.0, set()
    for table, rows in chosen:
        for row in rows:
            run = row.run(steps, common)
            wanted = seeds if run.steps else 1
            done = sum(runs.finished(workdir, run, seed) is not None for seed in range(wanted))
            hours = (wanted - done) * _seconds(run, measured) / 3600
            shared = " (shared with a row above)" if run in seen else ""
            total += 0.0 if shared else hours
            seen.add(run)
            lines.append(
                f"{f'{table.name}/{row.name}':<24} {run.steps:>6} {f'{done} of {wanted}':>9} {hours:>11.2f}{shared}"
            )
    return "\n".join([*lines, f"{total:.1f} hours in all, by the seconds a step of {source}"])


def _measured(workdir: Path) -> tuple[list[dict[str, Any]], str]:
    """Results with a measured step, of this workdir or else of the runs behind docs/paper.md, and what they are of."""
    here = [runs.read_result(path) for path in sorted((workdir / runs.RESULTS).glob("*.json"))]
    if here := [r for r in here if r["step_seconds"]]:
        return here, str(workdir)
    if not os.path.exists(MEASURED):
        return [], MEASURED
    there = read_json(MEASURED)
    common = ", ".join(f"{name} {value}" for name, value in there.get("common", {}).items())
    source = f"{MEASURED}, which are those of {there['devices']}{f' with {common}' if common else ''}"
    return [r for found in there["runs"].values() for r in found if r["step_seconds"]], source


def _seconds(run: tables.Run, measured: list[dict[str, Any]]) -> float:
    """Of a run from start to end: its steps, and what starting, compiling and scoring took beside them."""
    same = [r for r in measured if r["changes"] == dict(run.changes)] or measured
    step = statistics.median(r["step_seconds"] for r in same)
    beside = statistics.median(max(r["seconds"] - r["steps"] * r["step_seconds"], 0.0) for r in measured)
    return run.steps * step + beside


if __name__ == "__main__":
    errors.run(main)
