"""Damaged and hostile inputs of convert_weights.py: each is refused in one line, nothing is written, nothing is run.

Seeded: every run tries the same cases, the quick tests one of 8, or of 4 where damage may be harmless, the slow ones
all. Where it was harmless, what is read is what another reader reads.
"""

import contextlib
import functools
import itertools
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import places
import pytest
import safetensors.numpy
from damage import (
    config_texts,
    configs,
    cut_off,
    flipped,
    flips,
    gaps,
    header_entries,
    header_lengths,
    header_texts,
    indices,
    payloads,
    pickles,
    ropes,
    same,
    tensors,
    truth,
)
from damage_converted import _converted, checkpoints
from damage_gguf import GPT2, gguf_file, gguf_flips, gguf_numbers, gguf_truth, ggufs
from places import (
    BASES,
    BIN,
    CONFIG,
    ROOT,
    SAFE,
    Place,
    arrays,
    as_json,
    base,
    bounded,
    lay_out,
    packed,
    snapshot,
    torch_file,
)

import convert_weights
from longlora_jax.errors import UserError
from longlora_jax.weights.converted import open_converted
from longlora_jax.weights.hf import open_hf


@pytest.fixture
def place(monkeypatch) -> Iterator[Place]:
    """The working folder, in memory if the machine has it there: what is written is synced, and a disk may be busy."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(convert_weights, "_parser", functools.cache(convert_weights._parser))  # 10 % of the time
        yield Place(Path(folder))


# How many different cases each family has at least, so that none shrinks in silence.
REFUSED = {
    "from-hf": {
        **{cut_off: 1100, header_lengths: 220, header_entries: 690, gaps: 140, header_texts: 200, tensors: 590},
        **{indices: 940, configs: 590, ropes: 900, config_texts: 350, pickles: 740},
    },
    "to-hf": {checkpoints: 740},
    "from-gguf": {ggufs: 680, gguf_numbers: 1300},
}
PERHAPS = {"from-hf": {flips: 850}, "from-gguf": {gguf_flips: 290}}
SOURCES = {"from-hf": "source", "to-hf": "source", "from-gguf": "source/m.gguf"}


def steps(quick: int) -> list:
    """One case of so many in the quick tests, all in the slow ones."""
    return [pytest.param(quick, id=f"one of {quick}"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def every(families: dict) -> list[tuple]:
    """(command, family, its number of cases)."""
    return [(command, family, count) for command, counts in families.items() for family, count in counts.items()]


def name_of(value) -> str:
    return getattr(value, "__name__", None) or str(value)


def test_there_are_thousands_of_cases():
    """Catches: a fuzz that shrank."""
    assert sum(count for *_, count in every(REFUSED) + every(PERHAPS)) > 10_000


@pytest.mark.parametrize("step", steps(8))
@pytest.mark.parametrize(("command", "family", "count"), every(REFUSED), ids=name_of)
def test_damage_is_refused(command, family, count, step, place):
    """Catches: a traceback, many lines, half a folder, a command run, memory or time that a number in a file sets."""
    seen = set()
    for label, files in itertools.islice(family(), 0, None, step):
        seen.add(frozenset(files.items()))
        try:
            assert place.refused(command, files, source=SOURCES[command]), "went through"
        except Exception as error:
            raise AssertionError(f"{command}, {label}: {error!r}") from error
    assert len(seen) >= count // step


@pytest.mark.parametrize("step", steps(4))
@pytest.mark.parametrize(("command", "family", "count"), every(PERHAPS), ids=name_of)
def test_damage_is_refused_or_read_as_others_read_it(command, family, count, step, place):
    """Catches: one wrong byte after which other weights are read, or the same ones under another name."""
    seen, through = set(), 0
    for label, files in itertools.islice(family(), 0, None, step):
        seen.add(frozenset(files.items()))
        try:
            if place.refused(command, files, source=SOURCES[command]) is None:
                through += 1
                expected = truth(files) if command == "from-hf" else gguf_truth(place.source / "m.gguf")
                assert same(open_converted(str(place.out))[1], expected), "other weights"
        except Exception as error:
            raise AssertionError(f"{command}, {label}: {error!r}") from error
    assert len(seen) >= count // step and (15 if step == 1 else 0) < through < 200 // step


@pytest.mark.parametrize("kind", BASES)
def test_what_is_not_damaged_goes_through(kind, place):
    """Catches: refusals above that have another reason than the damage."""
    assert place.refused("from-hf", base(kind)) is None
    assert same(open_converted(str(place.out))[1], arrays())
    assert place.refused("to-hf", snapshot(place.out)) is None
    assert same(open_hf(str(place.out))[1], arrays())


@pytest.mark.parametrize("digests", [None, b"", b"{}", b"\xff"])
def test_digests_are_no_condition(digests, place):
    """Catches: a checkpoint that cannot be exported though every weight of it is there."""
    files = {name: content for name, content in _converted().items() if name != "digests.json"}
    assert place.refused("to-hf", files if digests is None else files | {"digests.json": digests}) is None
    assert same(open_hf(str(place.out))[1], arrays())


def test_a_good_gguf_goes_through(place):
    """Catches: refusals of GGUF files that have another reason than the damage."""
    expected = {name: array.astype(np.float32) for name, array in arrays().items()}
    merges = GPT2 | {"tokenizer.ggml.merges": ["a b", "b c"]}
    for content in (gguf_file(), gguf_file(merges)):
        assert place.refused("from-gguf", {"m.gguf": content}, source="source/m.gguf") is None
        assert same(open_converted(str(place.out))[1], expected)


def test_every_lost_chunk_is_named_at_once(place):
    """Catches: one fault a run, and a folder half written before the first is found."""
    lost = [name for name in _converted() if "/c/" in name and ("/norm.scale" in name or "lm_head" in name)]
    text = place.refused("to-hf", {name: content for name, content in _converted().items() if name not in lost})
    assert len(lost) == 2 and "model.norm.weight is" in text and "lm_head.weight is" in text


def test_a_gguf_header_without_end_is_refused(place, monkeypatch):
    """Catches: hours over a header that claims as many values as the file has bytes."""
    monkeypatch.setattr("longlora_jax.weights.gguf_reader._MOST_VALUES", 100)
    assert "values" in place.refused("from-gguf", {"m.gguf": gguf_file()}, source="source/m.gguf")


def test_the_pickles_are_no_blanks(tmp_path):
    """Catches: hostile pickles that would not do anything anywhere."""
    canary = tmp_path / "canary"
    for label, payload in payloads(str(canary)).items():
        with contextlib.suppress(EOFError):
            pickle.loads(payload)
        deadline = time.monotonic() + 10
        while not canary.exists() and time.monotonic() < deadline:  # popen does not wait
            time.sleep(0.001)
        assert canary.exists(), label
        canary.rmdir() if canary.is_dir() else canary.unlink()


def test_code_beside_the_weights_is_not_run(place):
    """Catches: modules of a folder that are imported, as transformers does when it is told to trust them."""
    code = b"open('canary', 'w').close()"
    names = "modeling_llama configuration_llama conftest sitecustomize json numpy safetensors torch".split()
    modules = {f"{name}.py": code for name in names} | {"numpy/__init__.py": code, "x.pth": b"import os; " + code}
    auto = CONFIG | {"auto_map": {"AutoConfig": "configuration_llama.Config"}, "trust_remote_code": True}
    for kind in BASES:
        assert place.refused("from-hf", base(kind) | modules | {"config.json": as_json(auto)}) is None
    hostile = {BIN: payloads("canary")["system, protocol 2"]}
    assert place.refused("from-hf", base("one") | hostile) is None  # safetensors come first


def test_the_largest_json_is_read_in_bounds(place, monkeypatch):
    """Catches: a limit of bytes under which a file still takes gigabytes."""
    monkeypatch.setattr(places, "MEGABYTES", 160)  # measured: 100, 25 times its 4 MB
    monkeypatch.setattr(places, "SECONDS", 10)  # measured: 1.4
    bomb = b'{"a":[%b[]]}' % (b"[]," * 1_300_000)
    for kind, file in (("one", "config.json"), ("shards", f"{SAFE}.index.json")):
        assert place.refused("from-hf", base(kind) | {file: bomb})
    assert place.refused("from-hf", base("one") | {SAFE: packed(bomb, b"")})


def test_tied_heads_of_any_form_are_compared(place):
    """Catches: a crash where lm_head and the embedding are compared though they are no matrices, or lie turned."""
    tied = {"config.json": as_json(CONFIG | {"tie_word_embeddings": True})}
    for array in (np.ones((), np.float16), np.ones((5, 0), np.float16), np.ones((16, 8), np.float64)):
        both = arrays() | {"lm_head.weight": array, "model.embed_tokens.weight": array}
        assert place.refused("from-hf", base("one") | tied | {SAFE: safetensors.numpy.save(both)})
    turned = {n: a for n, a in arrays().items() if n != "lm_head.weight"}
    turned["model.embed_tokens.weight"] = np.ascontiguousarray(turned["model.embed_tokens.weight"].T).T
    for head in (turned["model.embed_tokens.weight"], arrays()["lm_head.weight"]):
        files = base("bin") | tied | {BIN: torch_file(turned | {"lm_head.weight": head})}
        went = place.refused("from-hf", files) is None
        assert went == (head is turned["model.embed_tokens.weight"])


def test_paths_are_refused(place):
    """Catches: a folder overwritten, files left beside it, a traceback for a path that cannot be."""
    root = place.root
    files = {f"hf/{name}": content for name, content in base("one").items()}
    files |= {f"ours/{name}": content for name, content in _converted().items()} | {"m.gguf": gguf_file()}
    files |= {"file": b"x", "full/x": b"x", "empty": None, "loop": "loop", "nowhere": "none/none", "pipe": "/dev/null"}
    lay_out(root, files)
    sources = {"from-hf": "hf", "to-hf": "ours", "from-gguf": "m.gguf"}
    outs = ["file", "full", "hf", "ours", "m.gguf", "loop", "nowhere", "file/out", "file/a/out", "x" * 300, "x" * 250]
    cases = [(c, source, out) for c, source in sources.items() for out in [*outs, "loop/out", "/proc/none/out"]]
    missing = ["none", "empty", "loop", "nowhere", "pipe", "file", "full", "none/a/b", "hf/config.json/x", "x" * 5000]
    cases += [(command, source, "out") for command in sources for source in missing]
    cases += [(command, source, "out") for command, source in zip(sources, ("m.gguf", "m.gguf", "hf"), strict=True)]
    for command, source, out in cases:
        for left, right in ((root / source, root / out), (f"{root}/./{source}", os.path.join(f"{root}/full/..", out))):
            with pytest.raises(UserError) as caught, bounded():
                convert_weights.main([command, str(left), str(right)])
            assert str(caught.value).isprintable() and str(root) in str(caught.value) or "/proc" in str(caught.value)
            assert snapshot(root) == files, (command, source, out)
    for command, source in sources.items():
        with pytest.raises(UserError, match="empty name"):
            convert_weights.main([command, str(root / source), ""])


def test_a_link_to_an_empty_folder_is_filled(place):
    """Catches: minutes of work that end in a rename which cannot be."""
    lay_out(place.root / "hf", base("one"))
    lay_out(place.root, {"there": None, "out": "there"})
    convert_weights.main(["from-hf", "hf", "out"])
    assert os.readlink("out") == "there" and same(open_converted("there")[1], arrays())
    assert sorted(os.listdir()) == ["hf", "out", "there"]


@pytest.mark.parametrize("files", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_what_a_stop_left_is_mended_or_refused(files, place):
    """Catches: a conversion that can never be ended, or that takes over what was damaged."""
    rng, done = random.Random("resumed"), 0
    left = {name: content for name, content in _converted().items() if name != "digests.json"}
    aside = place.root / ".out.incomplete"
    for name in rng.sample(sorted(left), files):
        content = left[name]
        for other in (b"", content[: len(content) // 2], flipped(content, rng), content + b"\0", None):
            for path in (place.source, place.out, aside):
                shutil.rmtree(path, ignore_errors=True)
            lay_out(place.source, base("one"))
            lay_out(aside, left | {name: other})
            try:
                convert_weights.main(["from-hf", "source", "out"])
            except UserError as error:
                assert str(error).isprintable() and "out" in str(error) and not place.out.exists()
                continue
            done += 1
            assert same(open_converted("out")[1], arrays()), (name, other)
            assert place.refused("to-hf", snapshot(place.out)) is None and not aside.exists()
    assert done > 3 * files


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "convert_weights.py", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


@pytest.mark.slow
def test_the_command_itself(place):
    """Catches: what only a process of its own shows: its exit code, and all that it prints."""
    hostile = base("bin") | {BIN: payloads(str(place.root / "canary"))["system, protocol 2"]}
    cases = [
        ("from-hf", hostile),
        ("to-hf", {n: c for n, c in _converted().items() if n != "params/norm.scale/c/0"}),
        ("from-gguf", {"m.gguf": gguf_file()[:-1]}),
    ]
    for command, files in cases:
        shutil.rmtree(place.source, ignore_errors=True)
        lay_out(place.source, files)
        done = run(command, place.root / SOURCES[command], place.out)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert os.listdir(place.root) == ["source"] and snapshot(place.source) == files
    done = run("to-hf", place.source, place.out, "--dtype", "int8")
    assert done.returncode == 2 and "invalid choice" in done.stderr and "Traceback" not in done.stderr
