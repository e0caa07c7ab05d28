"""Questions about long texts: exact match and F1 of a model's answers over a file of contexts, questions and answers.

A row has `context`, `question` or `instruction`, and `answer` or `output`: a text, or a list of texts each of which is
right. The model reads the context, a blank line and the question. Rows that do not fit are left out and counted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longlora_jax import errors
from longlora_jax.data.formats import Reading, Row, read_file_rows
from longlora_jax.errors import UserError, number
from longlora_jax.evals.answers import exact_match, f1
from longlora_jax.evals.command import check_outputs, quantization_of
from longlora_jax.evals.plots import plot_grid
from longlora_jax.evals.reader import Reader
from longlora_jax.evals.results import Results, digest
from longlora_jax.evals.retrieval import add_model_flags, wilson
from longlora_jax.progress import progress_bar
from longlora_jax.weights.workdir import at_step


class Question(NamedTuple):
    """A question about a context, and the answers that are right."""

    context: str
    question: str
    answers: list[str]


def read_question(row: Row) -> Question:
    """The question of a row. Raises UserError that says where the row is and what it lacks."""

    def field(*names: str) -> Any:
        for name in names:
            if row.value.get(name):
                return row.value[name]
        raise UserError(
            f"{row.where} has no {' or '.join(names)}, it has {', '.join(map(str, row.value)) or 'nothing'}"
        )

    context, question, answers = field("context"), field("question", "instruction"), field("answer", "output")
    answers = answers if isinstance(answers, list) else [answers]
    if not all(isinstance(text, str) for text in (context, question, *answers)):
        raise UserError(f"{row.where}: context, question and answer must be texts, the answer a list of texts at most")
    return Question(context, question, answers)


def prompt(reader: Reader, question: Question) -> np.ndarray:
    """The ids [tokens] of what the model reads."""
    return reader.ids(f"{question.context}\n\n{question.question}", "" if reader.chat else "\nAnswer:")


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of exact matches, with their interval, and the mean F1 of results."""
    correct = sum(r["exact_match"] for r in rows)
    low, high = wilson(correct, len(rows))
    share = {"questions": len(rows), "exact_match": correct / len(rows), "low": low, "high": high}
    return share | {"f1": float(np.mean([r["f1"] for r in rows]))}


def by_length(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """summary() of the results by the tokens of their prompts, up to each power of two that there are."""
    sizes = {1 << (r["tokens"] - 1).bit_length() for r in rows}
    return {size: summary([r for r in rows if size // 2 < r["tokens"] <= size]) for size in sorted(sizes)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.evals.longqa",
        description="Questions about long texts: how many answers of a model are right (exact match), and what they "
        "share with the right ones (F1). Called again with the same --json it goes on where it was broken off.",
        epilog="Example: python -m longlora_jax.evals.longqa --model runs/my_run --data eval.jsonl --json longqa.json",
    )
    add_model_flags(parser)
    add = parser.add_argument
    data_help = "JSON Lines, JSON or Parquet: rows of context, question (or instruction) and answer (or output)"
    add("--data", required=True, metavar="FILE", help=data_help)
    max_help = "leave out rows of more, prompt and answer together (default: the model's window)"
    add("--max_tokens", type=number(int, 1), metavar="N", help=max_help)
    add("--max_new_tokens", type=number(int, 1), default=64, metavar="N", help="of an answer (default: %(default)s)")
    add("--limit", type=number(int, 1), metavar="N", help="ask the first N rows that fit (default: all)")
    args = parser.parse_args(argv)
    errors.start_logging()
    check_outputs(args.json, args.plot)
    rows = _read(args.data)
    args.model = at_step(args.model, args.step)
    reader = Reader(
        args.model, template=args.template, dtype=args.dtype, batch_size=args.batch_size, quantize=args.quantize
    )
    most = (args.max_tokens or reader.config.max_position_embeddings) - args.max_new_tokens
    prompts = {row: prompt(reader, question) for row, question in enumerate(rows)}
    fitting = [row for row, ids in prompts.items() if len(ids) <= most]
    skipped = len(rows) - len(fitting)
    if not fitting:
        shortest = min(map(len, prompts.values()))
        raise UserError(
            f"none of the {len(rows)} rows of {args.data} fits: the shortest prompt has {shortest} tokens, there is "
            f"room for {most} beside --max_new_tokens {args.max_new_tokens}: raise --max_tokens"
        )
    head = {"task": "longqa", "model": args.model, **reader.identity, "data": args.data, "dtype": args.dtype}
    head |= {"quantize": quantization_of(args)}
    head |= {"template": reader.template, "max_new_tokens": args.max_new_tokens}
    results = Results(args.json, head, ["row"], by_row=["data"])
    digests = {row: digest(json.dumps(question)) for row, question in enumerate(rows)}
    results.keep(lambda r: r.get("digest", "") == digests.get(r["row"]), f"{args.data} has other questions there now")
    asked = fitting[: args.limit]
    missing = [row for row in asked if not results.find(row=row)]
    size = args.batch_size or 1

    def stop(text: str) -> bool:
        return not reader.chat and "\n" in text.strip()

    with progress_bar(len(asked), label="longqa", unit="question", start=len(asked) - len(missing)) as bar:
        for batch in (missing[i : i + size] for i in range(0, len(missing), size)):
            answers = reader.answer([prompts[row] for row in batch], args.max_new_tokens, stop)
            for row, answer in zip(batch, map(str.strip, answers), strict=True):
                answer = answer if reader.chat else answer.split("\n")[0]  # a token may go on behind the line's end
                known = {"row": row, "digest": digests[row], "tokens": len(prompts[row])}
                results.add(known | _judged(rows[row], answer))
                bar.update()
    _report(results, asked, skipped, most, args)


def _read(path: str) -> list[Question]:
    try:
        rows = [read_question(row) for row in read_file_rows(path, Reading())]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise UserError(f"{path} has no rows: give a file with questions")
    return rows


def _judged(question: Question, answer: str) -> dict[str, Any]:
    scores = {"exact_match": exact_match(answer, question.answers), "f1": f1(answer, question.answers)}
    return scores | {"question": question.question, "expected": question.answers, "answer": answer}


def _report(results: Results, asked: Sequence[int], skipped: int, most: int, args) -> None:
    now = set(asked)  # an earlier call may have asked more
    found = [row for row in results.rows if row["row"] in now]
    whole, parts = summary(found), by_length(found)
    print(args.model)
    print("tokens up to  questions  exact match     F1")
    for name, part in [*((f"{size:,}", part) for size, part in parts.items()), ("all", whole)]:
        print(f"{name:>12} {part['questions']:>10} {part['exact_match']:>12.3f} {part['f1']:>6.3f}")
    print(f"{skipped} rows left out: their prompts have more than {most:,} tokens")
    if args.json:
        lengths = [{"tokens_up_to": size, **part} for size, part in parts.items()]
        results.write(skipped=skipped, summary=whole, by_length=lengths)
    if args.plot:
        shown = {f"{size:,}": part for size, part in parts.items()} | {"all": whole}
        values = np.array([[part[key] for part in shown.values()] for key in ("exact_match", "f1")])
        counts = [f"{name}\n({part['questions']})" for name, part in shown.items()]
        plot_grid(
            values,
            [[f"{value:.2f}" for value in row] for row in values],
            args.plot,
            columns=counts,
            rows=["exact match", "F1"],
            title=f"{Path(args.model).resolve().name}: questions about long texts",
            x_label="tokens of the prompt, up to (questions)",
            y_label="",
        )


if __name__ == "__main__":
    errors.run(main)
