"""Which runs the paper's tables are made of: names, what each changes in configs/paper.py, and the paper's numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from longlora_jax.errors import UserError

NOTHING: Mapping[str, object] = MappingProxyType({})
LINEAR, YARN = {}, {"rope.type": "yarn"}
FULL_TUNING = {"mode": "full"}


@dataclass(frozen=True)
class Row:
    """A line of a table.

    changes: fields of configs/paper.py; share: of --steps, 0 for the base under the row's scaling, untrained; paper:
    the paper's number for it, "" where the paper has none or we do not know it.
    """

    name: str
    label: str
    changes: Mapping[str, object]
    share: float = 1.0
    paper: str = ""

    def run(self, steps: int, common: Mapping[str, object] = NOTHING) -> "Run":
        """The run behind the row, where 1.0 stands for so many steps; rows of several tables may share one.

        common: changes of all rows; what is not trained has none of them.
        """
        changes = {**common, **self.changes} if self.share else self.changes
        changes = tuple(sorted((key, str(value)) for key, value in changes.items()))
        return Run(changes, max(round(steps * self.share), 1) if self.share else 0)


@dataclass(frozen=True)
class Run:
    """What is trained: changes of configs/paper.py as (field, value), and the steps; 0: nothing."""

    changes: tuple[tuple[str, str], ...]
    steps: int

    @property
    def name(self) -> str:
        """The name of its folder, and of its numbers in the JSON."""
        parts = [f"{field.rpartition('.')[2]}-{value}" for field, value in self.changes]
        return "_".join([*(parts or ["longlora"]), f"{self.steps}steps" if self.steps else "untrained"])

    def flags(self) -> list[str]:
        """The changes as train.py takes them."""
        return [f"--config.{field}={value}" for field, value in self.changes]


@dataclass(frozen=True)
class Table:
    """A table of the paper: paper says what its own numbers are of; both_patterns: test under the training's too."""

    name: str
    title: str
    paper: str
    rows: tuple[Row, ...]
    both_patterns: bool = False


PILOT = "7B, full fine-tuning, PG19 at 32,768"
TABLES = (
    Table(
        "parts",
        "What is trained",
        "7B, PG19 at 32,768",
        (
            Row("lora", "LoRA", {"mode": "lora"}, paper="11.44"),
            Row("norms", "LoRA + norms", {"mode": "lora_norm"}, paper="10.49"),
            Row("embedding", "LoRA + embedding", {"mode": "lora_embedding"}, paper="8.29"),
            Row("longlora", "LoRA + norms + embedding (LongLoRA)", {}, paper="8.12"),
            Row("full", "full fine-tuning", FULL_TUNING, paper="8.08"),
        ),
    ),
    Table(
        "patterns",
        "The attention pattern of training, tested with full attention",
        PILOT,
        (
            Row("full", "full", FULL_TUNING | {"attention.pattern": "full"}, paper="8.04"),
            Row("short", "short (no shift)", FULL_TUNING | {"attention.pattern": "short"}, paper="9.47"),
            Row("s2", "s2", FULL_TUNING, paper="8.08"),
            Row("s2_swap", "s2_swap", FULL_TUNING | {"attention.pattern": "s2_swap"}),
            Row("s2_wrap", "s2_wrap (sees the future)", FULL_TUNING | {"attention.pattern": "s2_wrap"}),
            Row("dilated", "dilated", FULL_TUNING | {"attention.pattern": "dilated"}),
            Row("block_sparse", "block_sparse", FULL_TUNING | {"attention.pattern": "block_sparse"}),
            Row("stride_sparse", "stride_sparse", FULL_TUNING | {"attention.pattern": "stride_sparse"}),
        ),
    ),
    Table(
        "scaling",
        "Linear interpolation and YaRN",
        "linear interpolation alone",
        (
            Row("linear_0", "linear, untrained", LINEAR, share=0),
            Row("yarn_0", "YaRN, untrained", YARN, share=0),
            Row("linear_lora", "linear, LoRA", LINEAR | {"mode": "lora"}),
            Row("yarn_lora", "YaRN, LoRA", YARN | {"mode": "lora"}),
            Row("linear", "linear, LongLoRA", LINEAR),
            Row("yarn", "YaRN, LongLoRA", YARN),
            Row("linear_full", "linear, full fine-tuning", LINEAR | FULL_TUNING),
            Row("yarn_full", "YaRN, full fine-tuning", YARN | FULL_TUNING),
        ),
    ),
    Table(
        "gap",
        "Trained under S2-Attn, tested with full attention: the gap, and what closes it",
        "no such table",
        (
            Row("s2", "s2", {}),
            Row("last_10", "s2, the last 10% of the steps full", {"attention.full_last": 0.1}),
            Row("last_30", "s2, the last 30% of the steps full", {"attention.full_last": 0.3}),
            Row("every_10", "s2, every 10th step full", {"attention.full_every": 10}),
            Row("every_2", "s2, every second step full", {"attention.full_every": 2}),
            Row("full", "full", {"attention.pattern": "full"}),
        ),
        both_patterns=True,
    ),
    Table(
        "groups",
        "Group size as a share of the window",
        "7B, PG19 at 16,384",
        (
            Row("full", "full attention", FULL_TUNING | {"attention.pattern": "full"}, paper="7.82"),
            Row("1_2", "1/2", FULL_TUNING | {"attention.group_size": 504}, paper="7.84"),
            Row("1_4", "1/4", FULL_TUNING, paper="7.86"),
            Row("1_6", "1/6", FULL_TUNING | {"attention.group_size": 168}, paper="7.94"),
            Row("1_8", "1/8", FULL_TUNING | {"attention.group_size": 126}, paper="7.98"),
        ),
    ),
    Table(
        "rank",
        "Rank of LoRA, nothing beside it trained",
        "7B, PG19 at 32,768: 11.44 to 11.98 from rank 8 to 256",
        tuple(
            Row(f"{rank}", f"rank {rank}", {"mode": "lora"} | ({"lora.rank": rank} if rank != 8 else {}))
            for rank in (8, 16, 32, 64)
        ),
    ),
    Table(
        "steps",
        "Perplexity against steps (LongLoRA)",
        "a picture",
        (
            Row("0", "untrained", LINEAR, share=0),
            Row("1_4", "a quarter of the steps", {}, share=0.25),
            Row("1_2", "half of the steps", {}, share=0.5),
            Row("1", "all steps", {}),
            Row("2", "twice the steps", {}, share=2.0),
            Row("2_last_10", "twice the steps, the last 10% full", {"attention.full_last": 0.1}, share=2.0),
            Row("2_full", "twice the steps, full attention", {"attention.pattern": "full"}, share=2.0),
        ),
    ),
)


def scored_twice(run: Run, steps: int, common: Mapping[str, object] = NOTHING) -> bool:
    """Whether a table shows a run under its training's pattern too."""
    return any(row.run(steps, common) == run for table in TABLES if table.both_patterns for row in table.rows)


def chosen(names: list[str]) -> list[tuple[Table, tuple[Row, ...]]]:
    """The tables and rows that `--rows` names: TABLE or TABLE/ROW, in the order of TABLES; all for an empty list.

    Raises UserError for a name that is none.
    """
    known = {table.name for table in TABLES} | {f"{table.name}/{row.name}" for table in TABLES for row in table.rows}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--rows {','.join(unknown)} is no table and no row: use names of --list, as "
            f"{', '.join(table.name for table in TABLES)} or parts/lora"
        )
    found = []
    for table in TABLES:
        rows = tuple(r for r in table.rows if not names or table.name in names or f"{table.name}/{r.name}" in names)
        if rows:
            found.append((table, rows))
    return found
