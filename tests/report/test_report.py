"""The page of a run: what it says is what the files hold, and it stands alone."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import config, line, make_run, read, result
from tiny import tiny_config

from longlora_jax.config import DataConfig
from longlora_jax.errors import UserError
from longlora_jax.evals import perplexity
from longlora_jax.files import write_json
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.model.trainable import census, trainable_mask
from longlora_jax.report import __main__ as report
from longlora_jax.report import charts, runs

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('&\"')</script>"


@pytest.fixture
def run(tmp_path) -> str:
    """A finished run of 40 steps, evaluated four times."""
    evals = {step: {"eval/loss": 2.5 - step / 100, "eval/perplexity": math.exp(2.5 - step / 100)} for step in (10, 40)}
    return make_run(tmp_path / "extended", [line(step, **evals.get(step, {})) for step in range(1, 41)])


# What it says


def test_numbers_are_those_of_the_files(run, tmp_path):
    """Catches: the first loss where the last belongs, a sum of seconds over lines instead of steps, a lost config."""
    page = read(tmp_path, run)
    tiles = dict(zip(*[iter([t for tag, t in page.texts if tag in ("b", "span")][1:])] * 2, strict=False))
    assert tiles["2.2000"] == "training loss, last"
    assert tiles["8.166"] == "held-out perplexity"  # exp(2.1)
    assert tiles["1,020"] == "tokens/s, median"  # of 1,001 to 1,040: 1,020.5, halves to even
    assert tiles["10.24k"] == "tokens" and tiles["10 s"] == "in steps"
    assert "done, 40 steps" in page.text
    for fact in ("s2, groups of 16 tokens; full in the last 25% of the steps", "base: 3 layers of 16", "text all.txt"):
        assert fact in page.text
    assert page.row("optim.learning_rate") == ["0.0003", "2e-05"]
    assert page.row("data.hold_out") == ["a, b", "()"]
    assert page.row("optim.beta2") == ["0.95"]  # as the default: among the others
    assert page.row("model.hidden_size") == ["16"]


def test_lines_are_drawn_where_the_values_are(tmp_path):
    """Catches: an axis upside down, a smoothed line that lags or leads, an end label that is not its line's end."""
    values = [4.0, 2.0, 3.0, 1.0]
    points = [(float(i), y) for i, y in enumerate(values)]
    svg = charts.line_chart("t", [charts.Line("A", 0, points)], x_label="step")
    places = [tuple(map(float, p.split())) for p in re.search(r'd="M([^"]*)"', svg)[1].split("L")]
    assert [x for x, _ in places] == pytest.approx([46, 46 + 242 / 3, 46 + 484 / 3, 288], abs=0.1)
    heights = [y for _, y in places]
    assert heights[0] == 14 and heights[3] == 170  # y of an SVG grows downwards
    assert [(heights[3] - y) / (heights[3] - heights[0]) for y in heights] == pytest.approx(
        [1, 1 / 3, 2 / 3, 0], abs=1e-2
    )
    assert ">A 1</text>" in svg and "0: 4</title>" in svg
    assert charts.running_mean(points, 2) == [(0, 4.0), (1, 3.0), (2, 2.5), (3, 2.0)]


def test_no_peak_is_lost_in_a_long_run():
    """Catches: a picture of every hundredth step, in which a spike of the loss is not there."""
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321], points[77_777] = (54_321.0, 99.0), (77_777.0, -99.0)
    kept = charts.thin(points)
    assert len(kept) <= 402 and kept == sorted(kept) and kept[-1] == points[-1]
    assert {points[54_321], points[77_777]} <= set(kept)


@pytest.mark.parametrize("values", [(1e-9, 2e-9), (0, 1), (3.2, 3.3), (0, 123456), (-5, 5), (1, 1 + 1e-9)])
def test_ticks_are_round_and_inside(values):
    """Catches: no tick at all, a hundred of them, ticks outside of the picture."""
    ticks = charts.round_ticks(*values, 5)
    span = values[1] - values[0]
    assert 2 <= len(ticks) <= 7
    assert all(values[0] - 0.01 * span <= t <= values[1] + 0.01 * span for t in ticks)


def test_short_numbers():
    """Catches: digits that matter cut off, 1000 of a unit."""
    known = {0.00002: "2e-5", 1.2345: "1.234", 0.0019971: "0.002", 0: "0", 5195.4: "5,195", 131072: "131.1k"}
    known |= {6.5e9: "6.5G", 0.5876: "0.5876", math.inf: "inf", -3.0: "-3"}
    assert {value: charts.short(value) for value in known} == known


@pytest.mark.parametrize("mode", ["longlora", "lora", "lora_norm", "lora_embedding", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_census_is_that_of_the_trainer(tmp_path, mode, tied):
    """Catches: adapters counted with the wrong sides, a group that trains in another mode, a tied lm_head."""
    model = tiny_config(num_hidden_layers=3, tie_word_embeddings=tied, attention_bias=True)
    path = make_run(tmp_path / "run", [], config(mode=mode, model=model))
    made = runs.read_runs([path])[0]
    shapes = abstract_params(Llama(model, lora=config().lora if mode != "full" else None))
    assert runs.census(made) == census(shapes, trainable_mask(shapes, mode))


def test_runs_side_by_side(run, tmp_path):
    """Catches: one run's values under the other's name, a difference that is not marked."""
    other = make_run(tmp_path / "control", [line(1), line(2)], config(seq_len=32))
    page = read(tmp_path, run, other)
    assert page.row("seq_len") == ["64", "32", "–"] and page.row("steps") == ["40", "40", "–"]
    marked = [attrs for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "differs"]
    assert len(marked) == 2
    assert "step 2 of 40" in page.text and "under way, or stopped" in page.text
    ends = [t for tag, t in page.texts if tag == "text" and t[:2] in ("A ", "B ")]
    assert "A 2.21" in ends and "B 2.96" in ends  # A's mean of its last two, B's own last value


def test_perplexity_before_and_after(tmp_path):
    """Catches: base and result under each other's name, lengths in the wrong column, files of one model drawn apart."""
    base = tmp_path / "base"
    base.mkdir()
    run = make_run(tmp_path / "extended", [line(1)], config(init_from=str(base)))
    head = {"data": ["/books/persuasion.txt"], "attention": "full", "rope_override": None}
    quarter = {"last_quarter": {"perplexity": 7.125}}
    write_json(f"{run}/ppl.json", head | {"model": run, "results": [result(64, 9.8764), result(32, 11.5, **quarter)]})
    write_json(f"{run}/b.json", head | {"model": str(base), "results": [result(32, 12.25)]})
    write_json(f"{run}/c.json", head | {"model": str(base), "results": [result(64, 99.5)]})
    write_json(f"{run}/other.json", {"results": [{"something": "else"}]})
    page = read(tmp_path, run)
    assert ["", "32", "64", "last quarter of 64"] in page.rows and "Documents: persuasion.txt" in page.text
    assert page.row("1base, before the training of A") == ["12.25 ± 0.12", "99.50 ± 0.99", "–"]
    assert page.row("Aextended, trained") == ["11.50 ± 0.12", "9.88 ± 0.099", "–"]


def test_reads_what_the_evaluation_writes(tmp_path):
    """Catches: another name for a field than evals.perplexity gives it."""
    import jax
    import numpy as np
    from tiny import random_params

    model = perplexity.LoadedModel(tiny_config(), random_params(Llama(tiny_config())), None, "")
    with jax.default_device(jax.devices("cpu")[0]):
        made = perplexity.evaluate(model, [np.arange(200, dtype=np.int32) % 37], 16)
    run = make_run(tmp_path / "run", [line(1)])
    write_json(f"{run}/p.json", {"model": "m", "data": ["d"], "attention": "full", "dtype": "x", "results": [made]})
    page = read(tmp_path, run)
    assert page.row("1m")[0].split(" ± ")[0] == f"{made['perplexity']:.2f}"
    assert page.row("1m")[1] == f"{made['last_quarter']['perplexity']:.2f}"


def test_grids(run, tmp_path):
    """Catches: depth and length swapped, a right cell as pale as a wrong one, a needle shown as a passkey."""
    cells = [(1024, 0.0, 5), (1024, 1.0, 4), (4096, 0.0, 0), (4096, 1.0, 1)]
    results = [{"length": t, "depth": d, "trials": 5, "correct": c} for t, d, c in cells]
    write_json(f"{run}/passkey.json", {"model": run, "results": results})
    needle = tmp_path / "needle.json"
    write_json(str(needle), {"model": "m", "results": [{**r, "score": 0.25} for r in results[:1]]})
    write_json(f"{run}/no_score.json", {"model": "m", "results": [{**results[0], "score": math.nan}]})
    page = read(tmp_path, run, "--needle", str(needle))
    assert page.row("0%") == ["5/5", "0/5"] and page.row("100%") == ["4/5", "1/5"]
    assert ["0%", "0.25"] in page.rows
    assert ["0%", "nan"] in page.rows  # a score that is none stops nothing
    looks = [attrs["style"] for tag, attrs in page.tags if tag == "td" and "of 5 right" in attrs.get("title", "")]
    assert "rgb(8,69,148)" in looks[0] and "rgb(236,242,248)" in looks[1]


def test_topics_and_questions_about_long_texts(run, tmp_path):
    """Catches: results that are on no page, a length's questions among another's, an average over sizes as the mean."""
    topics = [{"length": t, "tokens": t - 3, "trials": 4, "correct": c} for t, c in ((512, 4), (1024, 1))]
    asked = ((500, 1, 1), (512, 0, 0.5), (513, 0, 0.25))
    answers = [{"row": i, "tokens": t, "exact_match": e, "f1": f} for i, (t, e, f) in enumerate(asked)]
    write_json(f"{run}/topics.json", {"task": "topics", "model": run, "results": topics})
    write_json(str(tmp_path / "qa.json"), {"task": "longqa", "model": "m", "data": "law.jsonl", "results": answers})
    page = read(tmp_path, run, "--longqa", str(tmp_path / "qa.json"))
    assert ["", "512", "1,024"] in page.rows and page.row("right") == ["4/4", "1/4"]
    assert ["tokens up to", "512", "1,024", "all"] in page.rows and "law.jsonl" in page.text
    assert page.row("exact match") == ["0.50", "0.00", "0.33"] and page.row("F1") == ["0.75", "0.25", "0.58"]


def test_the_table_of_the_quickstart(run, tmp_path):
    """Catches: make quickstart's own result refused."""
    table = tmp_path / "quickstart.json"
    write_json(str(table), {"minutes": 5, "rows": {"base as it is": [result(32, 8.5)], "extended": [result(32, 7.5)]}})
    page = read(tmp_path, run, "--perplexity", str(table))
    assert page.row("1base as it is")[0].startswith("8.50") and page.row("2extended")[0].startswith("7.50")


# It stands alone, and nothing in it comes alive


def test_the_page_fetches_nothing(run, tmp_path):
    """Catches: a font or a script from elsewhere, a page that phones show at desktop width."""
    page = read(tmp_path, run)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page.source)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("src", "href")]
    metas = [attrs for tag, attrs in page.tags if tag == "meta"]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert {"http-equiv": "Content-Security-Policy", "content": policy} in metas
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas


def test_what_files_hold_stays_text(tmp_path):
    """Catches: a script that runs because a folder, a setting, a metric or a model is called like one."""
    evil = EVIL.replace("/", "|")  # a folder's name cannot hold a slash
    data = DataConfig(path=EVIL, hold_out=(EVIL,))
    run = make_run(tmp_path / evil, [line(1, **{EVIL: 1.0})], config(data=data, init_from=EVIL))
    head = {"model": EVIL, "data": [EVIL], "attention": EVIL, "rope_override": EVIL}
    write_json(f"{run}/ppl.json", head | {"results": [result(8, 2.0), result(16, 2.0)]})
    grid = {"length": 8, "depth": 0, "trials": 1, "correct": 1}
    write_json(f"{run}/passkey{evil}.json", {"model": EVIL, "results": [grid]})
    page = read(tmp_path, run)
    assert "<script" not in page.source and "script" not in {tag for tag, _ in page.tags}
    assert evil in page.text and page.row("data.path")[0] == EVIL and page.text.count("alert(") > 8


def test_it_loads_no_jax_backend(run, tmp_path):
    """Catches: a report that takes the accelerator away from the run it reports on, or takes seconds to start."""
    code = (
        "import sys; from longlora_jax.report.__main__ import main; main(sys.argv[1:]); "
        "from jax._src import xla_bridge; assert not xla_bridge._backends; "
        "assert not {'flax', 'optax', 'orbax', 'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, run, "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Runs that are not whole


def test_a_run_under_way(tmp_path):
    """Catches: a crash on a line that is being written this moment."""
    run = make_run(tmp_path / "run", [line(1), line(2)])
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo')
    assert "step 2 of 40" in read(tmp_path, run).text


@pytest.mark.parametrize("content", ["", '{"step": 1, "tra', None])
def test_a_run_without_a_step(tmp_path, content):
    """Catches: a crash on a run that compiles its first step."""
    run = make_run(tmp_path / "run", [])
    Path(f"{run}/metrics.jsonl").unlink()
    if content is not None:
        Path(f"{run}/metrics.jsonl").write_text(content)
    page = read(tmp_path, run)
    assert "run: no step has been logged yet." in page.text and "step 0 of 40" in page.text


def test_values_that_are_not_finite(tmp_path):
    """Catches: NaN as a coordinate, which draws nothing at all; a run gone wrong that looks well."""
    bad = {3: math.nan, 4: math.inf}
    lines = [line(step, **({"train/loss": bad[step]} if step in bad else {})) for step in range(1, 61)]
    lines[-1]["eval/perplexity"] = math.nan
    run = make_run(tmp_path / "run", lines)
    write_json(
        f"{run}/p.json", {"model": "m", "results": [result(8, 2.0), {**result(16, 2.0), "perplexity": math.nan}]}
    )
    page = read(tmp_path, run)
    assert "run: train/loss is not a finite number at step 3 and 1 more." in page.text
    places = [value for tag, attrs in page.tags if tag in ("path", "circle", "text") for value in attrs.values()]
    assert not [value for value in places if value and re.search(r"\b(nan|inf)\b", value)]
    assert "nan" in page.row("1m")[1]


def fault(*args: str) -> str:
    with pytest.raises(UserError) as error:
        report.main([*args, "--out", "/nowhere/page.html"])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_uses_are_one_line(run, tmp_path):
    """Catches: a traceback, or a page about nothing, for what is no run or no result."""
    assert "there is no folder" in fault(f"{run}/missing")
    assert "it holds some: extended" in fault(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "model is no workdir of a run: give the --workdir" in fault(str(tmp_path / "model"))
    assert "given twice" in fault(run, run + "/")
    assert "is missing" in fault(run, "--passkey", f"{run}/none.json")
    (tmp_path / "p.json").write_text(json.dumps({"results": [result(8, 2.0)]}))
    assert "holds no results of evals.passkey" in fault(run, "--passkey", str(tmp_path / "p.json"))
    assert "cannot be written" in fault(run)
    Path(f"{run}/broken.json").write_text("{")
    assert "broken.json cannot be read as JSON" in fault(run, "--passkey", f"{run}/broken.json")
    Path(f"{run}/metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 3}\n')
    assert "metrics.jsonl, line 2" in fault(run)
    done = subprocess.run(
        [sys.executable, "-m", "longlora_jax.report", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_lies_about_stops_nothing(run, tmp_path):
    """Catches: no page of a run because some other program left half a file in its folder."""
    Path(f"{run}/broken.json").write_text("{")
    Path(f"{run}/latin.json").write_bytes(b'"\xe9"')
    Path(f"{run}/folder.json").mkdir()
    os.mkfifo(f"{run}/fifo.json")
    page = read(tmp_path, run)
    assert "broken.json cannot be read as JSON" in page.text and "latin.json cannot be read" in page.text
    assert page.text.count("It is left out") == 2


def test_nothing_half_written_is_left(run, tmp_path):
    """Catches: FOLDER.incomplete beside a folder given as --out."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        report.main([run, "--out", str(tmp_path / "folder")])
    assert not list(tmp_path.glob("*.incomplete"))


ODD = [
    {"init_from": None},
    {"data": []},
    {"attention": None},
    {"mixture": 3},
    {"mixture": [3]},
    {"optim": {"learning_rate": "x"}},
    {"mode": []},
    {"model": {"hidden_size": "a"}},
    {"model": None},
    {"model": 3},
    {"lora": {"targets": [1]}},
    {"steps": True},
    {"attention": {"group_ratio": math.inf}},
    {"seq_len": 10**400},
    {"something": 1},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: json.dumps(odd)[:40])
def test_a_config_that_is_none_is_one_line(tmp_path, odd):
    """Catches: a traceback out of the middle of the page."""
    saved = json.loads(json.dumps(dataclasses.asdict(config())))
    for name, value in odd.items():
        saved[name] = saved[name] | value if isinstance(value, dict) else value
    run = make_run(tmp_path / "run", [line(1)])
    write_json(f"{run}/config.json", saved)
    assert "config.json" in fault(run)


@pytest.mark.parametrize("value", ["1e308", "-1e308", "5e-324", "1" * 400, "-" + "1" * 400])
def test_numbers_too_large_or_small_to_draw(tmp_path, value):
    """Catches: OverflowError out of a chart, a traceback instead of a notice about a run gone wrong."""
    metrics = "".join(json.dumps(line(step)) + "\n" for step in (1, 2, 4))
    run = make_run(tmp_path / "run", [])
    for key in ("train/loss", "perf/step_seconds"):
        odd = metrics + json.dumps(line(5, **{key: 0.125})).replace("0.125", value) + "\n"
        Path(f"{run}/metrics.jsonl").write_text(odd.replace('"step": 4', '"step": 4, "eval/loss": ' + value))
        page = read(tmp_path, run)
        assert ("eval/loss is not a finite number at step 4" in page.text) == (len(value) > 6 or "308" in value)
    for step in ("-1", "1" * 400, "true", "1.5"):
        Path(f"{run}/metrics.jsonl").write_text('{"step": ' + step + "}\n")
        assert "line 1 is not an object of numbers with a step" in fault(run)


def test_one_model_with_and_without_a_stride(run, tmp_path):
    """Catches: KeyError where a result has no stride, two results of a model drawn as one."""
    plain = {key: value for key, value in result(64, 9.5).items() if key != "stride"}
    write_json(f"{run}/a.json", {"model": "m", "results": [result(64, 8.5)]})
    write_json(f"{run}/b.json", {"model": "m", "results": [plain]})
    write_json(f"{run}/c.json", {"model": "m", "results": [result(64, 7.5, stride=32)]})
    page = read(tmp_path, run)
    assert page.row("1m")[0] == "8.50 ± 0.085" and page.row("2m, no stride")[0] == "9.50 ± 0.095"
    assert page.row("3m, stride 32")[0] == "7.50 ± 0.075"


@pytest.mark.parametrize(
    "odd",
    [{"stride": "a"}, {"last_quarter": [1]}, {"depth": "a"}, {"seq_len": 1.5}, {"seq_len": "1" * 400}],
    ids=str,
)
def test_results_that_are_none(run, tmp_path, odd):
    """Catches: a traceback for a field of another type than evaluations write."""
    text = json.dumps({"model": "m", "results": [{**result(64, 8.5), **odd}]}).replace(f'"{"1" * 400}"', "1" * 400)
    Path(f"{run}/odd.json").write_text(text)
    assert "Documents" not in read(tmp_path, run).text
    assert "holds no results of evals.perplexity" in fault(run, "--perplexity", f"{run}/odd.json")


def test_a_perplexity_without_bounds(run, tmp_path):
    """Catches: OverflowError for a model that a run has destroyed; a model's name that no path can have."""
    text = json.dumps({"model": "m\0\ud800", "results": [result(32, 2.5), result(64, 3.5)]})
    Path(f"{run}/odd.json").write_text(text.replace("3.5", "1" + "0" * 400))
    assert read(tmp_path, run).row("1m\0?")[1].startswith("inf")


# In a browser


@pytest.mark.parametrize("width", [375, 1280])
def test_in_a_browser(browser, run, tmp_path, width):
    """Catches: a page wider than a phone, text cut off by its chart, complaints on the console, a request."""
    other = make_run(tmp_path / ("a_long_name_without_any_space" * 3), [line(i) for i in range(1, 41)])
    cells = [{"length": 1024 * t, "depth": d / 4, "trials": 5, "correct": t % 6} for t in range(20) for d in range(5)]
    write_json(f"{run}/passkey.json", {"model": run, "results": cells})
    rows = {f"model number {i}": [result(2**n, 5.0 * n + i) for n in range(5, 16)] for i in range(6)}
    write_json(f"{run}/rows.json", {"rows": rows})
    read(tmp_path, run, other)
    tab = browser.new_page(viewport={"width": width, "height": 800})
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    cut = tab.evaluate("""[...document.querySelectorAll("svg text")].filter(text => {
        const [inner, outer] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
        return inner.left < outer.left - 1 || inner.right > outer.right + 1 ||
               inner.top < outer.top - 2 || inner.bottom > outer.bottom + 2;
    }).map(text => text.textContent)""")
    assert cut == [] and said == [] and asked == [(tmp_path / "page.html").as_uri()]
    small = tab.evaluate("""Math.min(...[...document.querySelectorAll("svg text")].map(
        text => text.getBoundingClientRect().height))""")
    assert small >= 11  # of the line; its letters are about 9 pixels high
