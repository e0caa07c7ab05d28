"""Perplexity: every number against a plain loop over transformers, every fault of a user as one line."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from longlora_jax import errors
from longlora_jax.attention.patterns import Pattern
from longlora_jax.config import LoraConfig
from longlora_jax.evals import perplexity, scoring
from longlora_jax.evals.plots import plot_perplexity
from longlora_jax.evals.scoring import evaluate, on_device, plan_same_targets, plan_windows, standard_error
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.model.lora import merge_lora
from longlora_jax.weights.load import LoadedModel, open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # windows of 16 tokens: threads only wait for each other

V, WINDOW = 50, 32
# Both sides compute in float32; over many seeds their mean nll differs by a few 1e-7.
CLOSE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder: a tiny random LLaMA (GQA, window 32) and a tokenizer of one piece a character."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.4,  # far from uniform guesses: a wrong target or position is seen
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    pieces = {chr(ord("A") + i): i for i in range(V)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="A"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return on_device(open_model(str(folder)), "float32")


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, size, dtype=np.int32) for size in (150, 90, 20)]


def text_of(ids):
    return "".join(chr(ord("A") + i) for i in ids)


@functools.cache
def reference(folder, **rope):
    config = transformers.AutoConfig.from_pretrained(folder)
    if rope:
        config.rope_parameters = {"rope_theta": 10000.0, **rope}
    return transformers.LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


def target_nll(folder, window, **rope):
    """nll of tokens 1.. of one window, by transformers alone."""
    with torch.no_grad():
        logits = reference(folder, **rope)(torch.tensor([window.tolist()])).logits[0].double()
    log_probs = torch.log_softmax(logits, -1).numpy()
    return -log_probs[np.arange(len(window) - 1), window[1:]]


def oracle(folder, documents, seq_len, *, stride, offset=0, max_windows=None):
    """(nll of every scored target, nll of those in the last quarter, windows): the contract as a plain loop."""
    scored, last, count = [], [], 0
    for ids in documents:
        start = offset
        while start + seq_len <= len(ids) and count != max_windows:
            nll = target_nll(folder, ids[start : start + seq_len])
            for position in range(1, seq_len):
                if start == offset or position >= seq_len - stride:
                    scored.append(nll[position - 1])
                    if position >= seq_len - math.ceil(seq_len / 4):
                        last.append(nll[position - 1])
            start, count = start + stride, count + 1
    return np.array(scored), np.array(last), count


@pytest.mark.parametrize(
    ("seq_len", "stride", "offset", "max_windows"),
    [
        (16, None, 0, None),
        (16, 4, 0, None),
        (16, 5, 7, None),
        (16, 1, 3, 9),
        (64, 16, 0, 3),  # twice the model's window
        (16, 15, 1, None),
        (90, None, 0, None),  # just fits the second document, leaves a rest in the first
        (2, None, 0, 11),  # the shortest
    ],
)
def test_equals_a_plain_loop_over_transformers(folder, model, documents, seq_len, stride, offset, max_windows):
    """Catches: a target off by one, scored twice or left out, a short document joined to the next, nll averaged by
    window instead of by token."""
    rule = {"stride": stride, "offset": offset, "max_windows": max_windows}
    got = evaluate(model, documents, seq_len, **rule, batch_size=8)  # one shape, compiled once
    stride = stride or seq_len
    scored, last, count = oracle(folder, documents, seq_len, **rule | {"stride": stride})
    assert (got["seq_len"], got["stride"], got["windows"], got["tokens"]) == (seq_len, stride, count, len(scored))
    np.testing.assert_allclose(got["nll"], scored.mean(), **CLOSE)
    np.testing.assert_allclose(got["perplexity"], math.exp(scored.mean()), rtol=1e-5)
    assert got["last_quarter"]["tokens"] == len(last)
    np.testing.assert_allclose(got["last_quarter"]["nll"], last.mean(), **CLOSE)
    assert sum(row["tokens"] for row in got["windows_detail"]) == len(scored)
    by_window = sum(row["tokens"] * row["nll"] for row in got["windows_detail"]) / len(scored)
    np.testing.assert_allclose(by_window, scored.mean(), **CLOSE)


def test_the_contract_counts_by_hand():
    """Catches: the first window of a later document scored like a later window; max_windows counted by document."""
    assert plan_windows([10, 3, 8], 4, stride=2, offset=1) == [
        *((0, 1, 3), (0, 3, 2), (0, 5, 2)),
        *((2, 1, 3), (2, 3, 2)),
    ]
    assert plan_windows([10, 3, 8], 4, stride=4, offset=0, max_windows=3) == [(0, 0, 3), (0, 4, 3), (2, 0, 3)]


@pytest.mark.parametrize(
    ("stride", "offset", "limit"),
    [(5, 3, 6), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((None, 0, None), (70, 0, None)))],
)
def test_lengths_are_compared_on_the_same_targets(folder, model, documents, stride, offset, limit):
    """Catches: windows that begin together instead of ending together, a target scored twice, one document fewer for
    the long windows than for the short ones."""
    last, longest = 5, 48
    targets = {}
    for seq_len in (6, 16, longest):
        scored, targets[seq_len] = [], []
        for number, ids in enumerate(documents):
            for end in range(offset + longest, len(ids) + 1, stride or longest):
                if limit is None or len(targets[seq_len]) < limit * last:
                    scored += target_nll(folder, ids[end - seq_len : end])[-last:].tolist()
                    targets[seq_len] += [(number, position) for position in range(end - last, end)]
        rule = {"last": last, "longest": longest, "stride": stride, "offset": offset, "max_windows": limit}
        got = evaluate(model, documents, seq_len, **rule, batch_size=8)
        assert (got["tokens"], got["windows"] * last, got["skipped_documents"]) == (len(scored), len(scored), 1)
        assert got["stride"] == (stride or longest)
        np.testing.assert_allclose(got["nll"], np.mean(scored), **CLOSE)
        planned = plan_same_targets([len(d) for d in documents], seq_len, **rule)
        assert [(w.document, w.start + seq_len - last) for w in planned] == targets[seq_len][::last]
    assert targets[6] == targets[16] == targets[48] and len(set(targets[6])) == len(targets[6]) > last


@pytest.mark.parametrize(("last", "stride"), [(16, 64), (8, 7), (0, 16)])
def test_targets_that_a_window_lacks_or_scores_twice_are_refused(last, stride):
    """Catches: a window of 16 tokens asked for 16 targets, of which the first has nothing before it."""
    with pytest.raises(errors.UserError, match=f"last={last}"):
        plan_same_targets([150], 16, last=last, longest=64, stride=stride)


def test_documents_are_weighed_by_tokens_and_never_joined(model, documents):
    """Catches: a mean over documents, and a window across the end of a file."""
    apart = [evaluate(model, [ids], 16, stride=8, batch_size=1) for ids in documents]
    together = evaluate(model, documents, 16, stride=8, batch_size=1)
    assert together["windows"] == sum(r["windows"] for r in apart)
    assert together["tokens"] == sum(r["tokens"] for r in apart)
    weighed = sum(r["tokens"] * r["nll"] for r in apart) / together["tokens"]
    np.testing.assert_allclose(together["nll"], weighed, **CLOSE)
    assert abs(together["nll"] - np.mean([r["nll"] for r in apart])) > 1e-3  # or this test could not tell
    long_only = evaluate(model, documents, 64, batch_size=3)
    assert (long_only["documents"], long_only["skipped_documents"]) == (2, 1)


def test_batch_size_changes_nothing_but_speed(model, documents):
    """Catches: the rows that fill up the last batch counted as windows."""
    one, many = (evaluate(model, documents, 16, stride=8, batch_size=size) for size in (1, 8))
    assert one["windows"] == many["windows"] == 28 and 28 % 8
    np.testing.assert_allclose(one["nll"], many["nll"], **CLOSE)


def test_adapters_are_part_of_the_model(model, documents):
    """Catches: the adapters of a workdir ignored, flax does not complain of leaves that nothing reads."""
    lora = LoraConfig(rank=2, alpha=8.0)
    llama = Llama(model.config, lora=lora)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(llama))
    result = evaluate(LoadedModel(model.config, params, lora, ""), documents, 16, max_windows=1)
    logits = jax.jit(llama.apply)({"params": params}, documents[0][None, :16])[0]
    nll = -jax.nn.log_softmax(logits)[np.arange(15), documents[0][1:16]]
    np.testing.assert_allclose(result["nll"], nll.mean(), rtol=1e-5)
    without = merge_lora(params, LoraConfig(rank=2, alpha=1e-9))
    plain = evaluate(LoadedModel(model.config, without, None, ""), documents, 16, max_windows=1)
    assert abs(plain["nll"] - result["nll"]) > 1e-3


def test_scalings_are_compiled_once(model, documents):
    """Catches: a program for each of the quickstart's rows, a quarter of its evaluation; frequencies of the first."""
    scaled = [
        dataclasses.replace(model, config=perplexity.stretch_rope(model.config, 64, kind)) for kind in ("yarn", "ntk")
    ]
    before = scoring._target_nll._cache_size()
    losses = {evaluate(m, documents, 40, batch_size=2)["nll"] for m in (model, *scaled)}
    assert scoring._target_nll._cache_size() == before + 1 and len(losses) == 3


def test_pattern_and_dtype_reach_the_model(model, documents):
    """Catches: --attention or --dtype recorded and not used."""
    common = {"stride": 8, "batch_size": 8}
    full = evaluate(model, documents, 16, **common)
    s2 = evaluate(model, documents, 16, pattern=Pattern("s2", 4), **common)
    assert s2["group_size"] == 4 and full["group_size"] is None
    assert abs(full["nll"] - s2["nll"]) > 1e-3
    bf16 = evaluate(model, documents, 16, dtype="bfloat16", **common)
    assert 0 < abs(bf16["nll"] - full["nll"]) < 0.05  # 8 bits of mantissa, and a mean over 200 targets


def test_standard_error_by_hand_and_by_simulation():
    """Catches: a deviation not divided by the root of n; correlated neighbours taken for independent ones."""
    few = np.array([1.0, 2.0, 4.0, 5.0], np.float32)
    np.testing.assert_allclose(standard_error(few), few.std(ddof=1) / 2, rtol=1e-6)
    assert standard_error(few[:1]) is None
    rng = np.random.default_rng(0)
    runs = [np.repeat(rng.normal(size=1000), 20).astype(np.float32) for _ in range(200)]
    spread = np.std([run.mean() for run in runs])
    # 200 runs know their spread to 5%; blocks of 256 cut a few of the repeats of 20 in two.
    np.testing.assert_allclose(np.mean([standard_error(run) for run in runs]), spread, rtol=0.2)


# The command


@pytest.fixture
def files(tmp_path, documents):
    paths = [tmp_path / f"{i}.txt" for i in range(len(documents))]
    for path, ids in zip(paths, documents, strict=True):
        path.write_text(text_of(ids), encoding="utf-8")
    return [str(path) for path in paths]


def test_command_writes_what_the_contract_says(folder, model, files, documents, tmp_path, capsys):
    """Catches: a key of the JSON renamed, flags that do not reach evaluate(), a picture left out."""
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--seq_len", "16,64", "--stride", "8", "--offset", "2", "--max_windows", "9", "--batch_size", "8"]
    perplexity.main(["--model", str(folder), "--data", *files, *flags, "--json", str(out), "--plot", str(picture)])
    written = json.loads(out.read_text())
    assert written["model"] == str(folder) and written["data"] == files
    assert (written["attention"], written["dtype"], written["rope_override"]) == ("full", "float32", None)
    for seq_len, row in zip((16, 64), written["results"], strict=True):
        expected = evaluate(model, documents, seq_len, stride=8, offset=2, max_windows=9, batch_size=8)
        assert row == expected
    assert {"seq_len", "stride", "windows", "tokens", "nll", "perplexity", "stderr"} < set(row)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*incomplete*"))
    assert "16" in capsys.readouterr().out


def test_command_compares_lengths_on_the_same_targets(folder, model, files, documents, tmp_path, capsys):
    """Catches: --last that does not reach evaluate(); results of other ends taken for these; --last forgotten there."""
    out = tmp_path / "out.json"
    common = ["--model", str(folder), "--data", *files, "--batch_size", "8", "--json", str(out)]
    for longest in (64, 32):
        perplexity.main([*common, "--seq_len", f"16,{longest}", "--last", "6"])
        written = json.loads(out.read_text())
        assert (written["last"], written["longest"]) == (6, longest)
        for seq_len, row in zip((16, longest), written["results"], strict=True):
            assert row == evaluate(model, documents, seq_len, last=6, longest=longest, batch_size=8)
    assert "last 6 targets" in capsys.readouterr().out
    perplexity.main([*common, "--seq_len", "16"])
    assert json.loads(out.read_text())["results"] == [evaluate(model, documents, 16, batch_size=8)]


@pytest.mark.parametrize("factor", [None, 3.0])
def test_untrained_scaling_equals_transformers(folder, files, documents, tmp_path, factor):
    """Catches: a factor relative to another window than the original one, an override that is only recorded."""
    out = tmp_path / "out.json"
    flags = ["--rope_type", "linear"] + ([] if factor is None else ["--rope_factor", str(factor)])
    common = ["--model", str(folder), "--data", files[0], "--max_windows", "1", "--json", str(out)]
    lengths = (80,) if factor else (WINDOW, 80)
    perplexity.main([*common, "--seq_len", ",".join(map(str, lengths)), *flags])
    written = json.loads(out.read_text())
    assert written["rope_override"] == {"rope_type": "linear", "rope_factor": factor}
    for row, seq_len in zip(written["results"], lengths, strict=True):
        used = factor or math.ceil(seq_len / WINDOW)
        nll = target_nll(folder, documents[0][: row["seq_len"]], rope_type="linear", factor=float(used))
        np.testing.assert_allclose(row["nll"], nll.mean(), **CLOSE)
        assert row["rope"] is None if used == 1 else row["rope"]["factor"] == used


def fails(argv, capsys):
    """The one line on standard error with which the command ends, exit code 2."""
    with pytest.raises(SystemExit) as exit:
        errors.run(lambda: perplexity.main(argv))
    assert exit.value.code == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not printed.out
    return lines[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--model": "no_such_folder"}, "no_such_folder"),
        ({"--data": "no_such_file.txt"}, "no_such_file.txt"),
        ({"--data": "latin1.txt"}, "not UTF-8"),
        ({"--seq_len": "16,512"}, "seq_len=512 needs a document of 512 tokens or more, and the longest of 1 has 150"),
        ({"--offset": "140"}, "after an offset of 140"),
        ({"--seq_len": "1"}, "1 must be at least 2"),
        ({"--seq_len": "16,x"}, "16,x"),
        ({"--stride": "17"}, "--stride 17 is longer than --seq_len 16"),
        ({"--last": "16"}, "--last 16 of windows of 16 tokens, which have one target less: use at most 15"),
        ({"--last": "8", "--stride": "7"}, "--stride 7 is below --last 8"),
        ({"--last": "8", "--protocol": "longlora"}, "leave out --stride, --last"),
        ({"--last": "8", "--seq_len": "16,512"}, "seq_len=512 needs a document of 512"),
        ({"--stride": "0"}, "0 must be at least 1"),
        ({"--max_windows": "0"}, "0 must be at least 1"),
        ({"--rope_type": "stretchy"}, "stretchy"),
        ({"--rope_factor": "2"}, "--rope_type"),
        ({"--group_ratio": "1.5"}, "--group_ratio 1.5"),
        ({"--attention": "s2", "--group_ratio": "0.05"}, "--group_ratio 0.05"),
        ({"--attention": "s3"}, "s3"),
        ({"--unheard_of": "1"}, "--unheard_of"),
        ({"--json": "no/such/out.json"}, "no/such/out.json"),
        ({"--plot": "out.gif"}, "out.gif"),
    ],
    ids=lambda value: " ".join(sum(value.items(), ())) if isinstance(value, dict) else "",
)
def test_a_fault_is_one_line(folder, files, tmp_path, monkeypatch, capsys, change, says):
    """Catches: a traceback, a usage text around the one line that matters, a result although something was wrong."""
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("café".encode("latin-1"))
    flags = {"--model": str(folder), "--data": files[0], "--seq_len": "16", "--json": "out.json"} | change
    assert says in fails([part for pair in flags.items() for part in pair], capsys)
    assert not list(tmp_path.glob("*out*"))


def test_tokens_of_another_models_tokenizer_are_refused(model):
    """Catches: ids past the embedding's end, which jax silently clamps."""
    with pytest.raises(errors.UserError, match=f"token {V} is outside"):
        evaluate(model, [np.full(20, V, np.int32)], 16)


def test_weights_that_give_no_number_are_told(model, documents):
    """Catches: NaN in the JSON, which few readers accept, or a table full of nan."""
    params = jax.tree.map(lambda x: x * np.nan, model.params)
    with pytest.raises(errors.UserError, match="not finite"):
        evaluate(LoadedModel(model.config, params, None, ""), documents, 16, batch_size=8)


def test_module_runs_as_a_command():
    """Catches: no entry point; a help text that names no flag."""
    done = subprocess.run(
        [sys.executable, "-m", "longlora_jax.evals.perplexity", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and "--seq_len" in done.stdout and not done.stderr


def test_picture_is_replaced_when_complete(tmp_path):
    """Catches: labels of nearly equal lines written over each other; a half-written file."""
    lengths = (256, 512, 1024)
    rows = {f"model {i}": [(n, 30 + i / 100) for n in lengths] for i in range(4)}
    path = tmp_path / "ppl.png"
    plot_perplexity(rows | {"exploded": [(n, 30 * n / 256) for n in lengths]}, str(path), title="x", window=256)
    assert path.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
