"""Rows of conversations as training examples: rendered and tokenized as at inference, and the answers alone are scored.

The ids of an example are those of its whole text, and those of a prompt in it are the ones that a model is given when
it is to answer: nothing of a prompt is scored, and the token that ends an answer is.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from longlora_jax.config import DataConfig
from longlora_jax.data.chat_template import ChatTemplate, TemplateFault
from longlora_jax.data.dialogue import Dialogue, Example, Renderer, encode_dialogues
from longlora_jax.data.formats import Reading, Row
from longlora_jax.data.rows import Conversation, Malformed, conversation_of, parse_columns
from longlora_jax.data.tokenizer import Tokenizer
from longlora_jax.errors import UserError
from longlora_jax.files import one_line

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 64  # enough to keep every core of the tokenizers library busy


def read_examples(
    rows: Iterable[Row],
    reading: Reading,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    data: DataConfig | None = None,
    *,
    window: int = 0,
) -> Iterator[Example]:
    """Yields the examples of each row, in order; the log says what became of the rows, and which fields nobody reads.

    data: what is done with rows: columns, last_turn_only, too_long, and max_tokens: whole examples, until there are so
    many tokens. window: tokens of the longest example that there is room for; 0: any. Rows without an answer are left
    out; those that are no conversation, or that the template refuses, are bad rows (see Reading). Every example has a
    target. Raises UserError if no row makes an example, or the first is longer than max_tokens.
    """
    data = data or DataConfig()
    columns, counts, lost = parse_columns(data.columns), Counter(), Counter()
    render = Renderer(template, tokenizer.added_tokens(), last_turn_only=data.last_turn_only)
    unknown: Counter[str] = Counter()

    def encoded(rows: Iterator[Row]) -> Iterator[tuple[Row, Example]]:
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            counts["rows"] += len(chunk)
            dialogues: list[tuple[Row, Dialogue]] = []
            for row in chunk:
                try:
                    said = conversation_of(row.value, columns)
                    made = render(said)
                except (TemplateFault, Malformed) as fault:
                    reading.bad(row.where, str(fault))
                    lost["malformed"] += 1
                    continue
                unknown.update(said.unknown)
                unknown.update(sorted(_without_place(said, template)))
                dialogues += [(row, dialogue) for dialogue in made]
                lost["without an answer to learn"] += not made
            made = encode_dialogues([dialogue for _, dialogue in dialogues], tokenizer)
            yield from zip((row for row, _ in dialogues), made, strict=True)

    for row, example in encoded(iter(rows)):
        if window and len(example[0]) > window:
            example = _cut(example, row, window, data.too_long, counts, lost)
        if example is None:
            continue
        if data.max_tokens and counts["tokens"] + len(example[0]) > data.max_tokens:
            if not counts["examples"]:
                raise UserError(
                    f"max_tokens={data.max_tokens} is less than the {len(example[0]):,} tokens of the first example: "
                    "give more, or 0 to read all"
                )
            log.info("stopped reading the corpus before max_tokens=%d", data.max_tokens)
            break
        counts["examples"] += 1
        counts["tokens"] += len(example[0])
        counts["scored"] += int(example[1].sum())
        yield example
    left_out = _listed(lost)
    if not counts["examples"]:
        raise UserError(f"none of {counts['rows']:,} rows makes an example: {left_out}; give rows that hold answers")
    log.info(
        "%s rows make %s examples of %s tokens, %s of them scored; left out: %s",
        *(f"{counts[name]:,}" for name in ("rows", "examples", "tokens", "scored")),
        left_out,
    )
    if counts["cut"]:
        side = "beginning" if data.too_long == "cut_left" else "end"
        log.info("%s examples have lost their %s: they are longer than the window", f"{counts['cut']:,}", side)
    for note, number in render.notes.items():
        if number:
            log.info("%s %s", f"{number:,}", note)
    if unknown:
        fields = ", ".join(f"{one_line(name, 50)} ({n:,} rows)" for name, n in unknown.most_common(20))
        log.warning("fields that nothing reads: %s; data.columns=ours=theirs says what one is", fields)


def _without_place(said: Conversation, template: ChatTemplate) -> set[str]:
    """Fields of messages, and variables, of which the template does not even have the name."""
    given = {name for message in said.messages for name, value in message.items() if value} - {"role", "content"}
    lost = {f"{name} of messages" for name in given if name not in template.source}
    return lost | {name for name in said.variables if name not in template.source}


def _cut(
    example: Example, row: Row, window: int, too_long: str, counts: Counter[str], lost: Counter[str]
) -> Example | None:
    """What is left of an example that is longer than the window; None: nothing."""
    tokens = f"{len(example[0]):,} tokens"
    if too_long == "stop":
        raise UserError(
            f"{row.where} makes an example of {tokens}, the window has {window:,}: raise seq_len, or set "
            "data.too_long to drop, cut_left or cut_right"
        )
    if too_long == "drop":
        lost[f"longer than the window of {window:,} tokens"] += 1
        return None
    here = slice(-window, None) if too_long == "cut_left" else slice(window)
    ids, scored = (part[here] for part in example)
    # Nothing stands before the first token of a row: it cannot be learnt.
    if not scored[1:].any():
        lost["without an answer in what a cut leaves"] += 1
        return None
    counts["cut"] += 1
    return ids, scored


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items() if n) or "none"
