"""Runs for reports to be about, and their pages taken apart."""

import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path

from tiny import tiny_config

from longlora_jax.config import AttentionConfig, Config, DataConfig, EvalConfig, LoraConfig, OptimConfig
from longlora_jax.files import write_json
from longlora_jax.report import __main__ as report


class Page(HTMLParser):
    """A page taken apart: its texts, tables and tags; fails where the tags do not fit each other."""

    VOID = ("meta",)

    def __init__(self, text: str):
        super().__init__()
        self.source, self.open, self.tags = text, [], []
        self.texts: list[tuple[str, str]] = []  # (innermost tag, text)
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if "tr" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style")

    def row(self, name: str) -> list[str]:
        """The cells beside a row's name."""
        return next(row[1:] for row in self.rows if row and row[0] == name)


def config(**changes) -> Config:
    plain = Config(
        seq_len=64,
        steps=40,
        batch_size=4,
        init_from="/models/base",
        model=tiny_config(num_hidden_layers=3),
        lora=LoraConfig(rank=3, targets=("q_proj", "o_proj", "down_proj")),
        attention=AttentionConfig(full_last=0.25),
        data=DataConfig(path="/books/all.txt", hold_out=("a", "b")),
        eval=EvalConfig(every=10),
        optim=OptimConfig(learning_rate=3e-4),
    )
    return dataclasses.replace(plain, **changes)


def line(step: int, **values) -> dict:
    usual = {"train/loss": 3 - step / 50, "train/grad_norm": 0.5, "train/learning_rate": 3e-4}
    speed = {"perf/tokens_per_second": 1000.0 + step, "perf/step_seconds": 0.25}
    return {"step": step, **usual, **speed, **values}


def make_run(folder: Path, lines: list[dict], run_config: Config | None = None) -> str:
    folder.mkdir(parents=True)
    write_json(str(folder / "config.json"), dataclasses.asdict(run_config or config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(folder)


def read(tmp_path, *args: str) -> Page:
    out = tmp_path / "page.html"
    report.main([*args, "--out", str(out)])
    return Page(out.read_text(encoding="utf-8"))


def result(length: int, ppl: float, **more) -> dict:
    return {"seq_len": length, "stride": length, "perplexity": ppl, "nll": math.log(ppl), "stderr": 0.01, **more}
