"""Damaged and hostile inputs of convert_weights.py: each is refused in one line, nothing is written, nothing is run.

Seeded: every run tries the same cases. Where damage may be harmless, what is read is what another reader reads.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

import convert_weights
from longlora_jax.errors import UserError
from longlora_jax.weights.converted import open_converted
from longlora_jax.weights.hf import open_hf
from longlora_jax.weights.tensors import Tensor

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
Files = dict[str, bytes | str | None]  # content of a file; str: a link to it; None: a folder
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
SECONDS, MEGABYTES, LONGEST = 2, 32, 2000  # of a case, of its memory, of its message in characters


# What is damaged: folders as tables {path: content}


def as_json(content) -> bytes:
    return json.dumps(content).encode()


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """A whole model of 2 layers, float16: 2.5 kB."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    layer = {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    layer |= {f"self_attn.{n}_proj": (rows, 8) for n, rows in zip("qkvo", (8, 4, 4, 8), strict=True)}
    layer |= {"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def torch_file(tables: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in tables.items()}, buffer)
    return buffer.getvalue()


def sharded(tables: dict[str, dict[str, np.ndarray]], save, whole: str) -> Files:
    """tables: {file: its tensors}."""
    weight_map = {name: file for file, table in tables.items() for name in table}
    index = as_json({"metadata": {"total_size": 2512}, "weight_map": weight_map})
    return {f"{whole}.index.json": index, **{file: save(table) for file, table in tables.items()}}


def shards(pattern: str) -> dict[str, dict[str, np.ndarray]]:
    items = list(arrays().items())
    return {pattern.format(i + 1): dict(items[start : start + 7]) for i, start in enumerate((0, 7, 14))}


@functools.cache
def _base(name: str) -> Files:
    save = safetensors.numpy.save
    weights: Files = {
        "one": lambda: {SAFE: save(arrays())},
        "shards": lambda: sharded(shards("model-{}-of-3.safetensors"), save, SAFE),
        "bin": lambda: {BIN: torch_file(arrays())},
        "bins": lambda: sharded(shards("pytorch_model-{}-of-3.bin"), torch_file, BIN),
    }[name]()
    return {"config.json": as_json(CONFIG), **weights}


def base(name: str) -> Files:
    """A good folder, to be damaged: one | shards | bin | bins."""
    return dict(_base(name))


BASES = ("one", "shards", "bin", "bins")


def unpacked(content: bytes) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(text)) + text + data


# How a case is tried


def snapshot(folder: Path) -> Files:
    """The files of a folder; of its folders the empty ones alone."""
    found: Files = {}
    for parent, folders, names in os.walk(folder):
        for name in (*names, *folders):
            path = os.path.join(parent, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = os.readlink(path)
            elif name in names:
                found[key] = Path(path).read_bytes()
            elif not os.listdir(path):
                found[key] = None
    return found


def lay_out(folder: Path, files: Files) -> None:
    for parent in {os.path.dirname(name) for name in files}:
        os.makedirs(folder / parent, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def memory(field: str) -> int:
    """Megabytes of this process: VmRSS | VmHWM."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(field)[2].split()[1]) >> 10


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Time is that of this process alone: others may be busy. Memory is measured where Linux tells it."""
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")  # forgets the peak
        before = memory("VmRSS")
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    assert not counter.exists() or memory("VmHWM") - before < MEGABYTES


class Place:
    """A folder in which one case after the other is tried."""

    def __init__(self, root: Path):
        self.root, self.source, self.out = root, root / "source", root / "out"

    def refused(self, command: str, files: Files, *options: str, source: str = "source") -> str | None:
        """The message, or None if the command went through; then `out` holds what it wrote."""
        for path in (self.source, self.out):
            shutil.rmtree(path, ignore_errors=True)
        self.source.mkdir()
        lay_out(self.source, files)
        said = io.StringIO()
        with bounded(), contextlib.redirect_stdout(said):
            try:
                convert_weights.main([command, str(self.root / source), str(self.out), *options])
            except UserError as error:
                text = str(error)
            else:
                assert sorted(os.listdir(self.root)) == ["out", "source"]
                return None
        assert os.listdir(self.root) == ["source"] and said.getvalue() == ""
        assert snapshot(self.source) == files
        assert text.isprintable() and len(text) < LONGEST, text[:300]
        assert str(self.source) in text or any(name in text for name in files), text
        return text


# Families of damage: each gives (what was done, files)

Cases = Iterator[tuple[str, Files]]
HUGE = [2**31, 2**63, 10**30, 10**400]
NO_NUMBER = ["8", None, True, [], [8], {}, float("nan"), float("inf"), -float("inf")]
NO_JSON = [b"", b" ", b"\0" * 9, b"{", b"{}}", b"[]", b"5", b'"x"', b"null", b"{'a': 1}", b'{"a": 1,}', b"\xff\xfe{}"]


def cut_off() -> Cases:
    """Files that end too early, at every length or at many."""
    rng = random.Random("cut off")
    for name in BASES:
        for file, content in base(name).items():
            lengths = (
                range(len(content)) if (name, file) == ("one", "config.json") else rng.sample(range(len(content)), 60)
            )
            for length in {*lengths, 0, 1, 7, 8, 9, len(content) - 1}:
                yield f"{file} of {name} ends at {length}", base(name) | {file: content[:length]}


def header_lengths() -> Cases:
    """Safetensors whose first 8 bytes tell another length of the header."""
    rng = random.Random("header lengths")
    for name, file in (("one", SAFE), ("shards", "model-2-of-3.safetensors")):
        content = base(name)[file]
        right, size = struct.unpack("<Q", content[:8])[0], len(content)
        wrong = {*range(24), *range(right - 9, right + 10), *range(size - 12, size + 4), 10**8, 10**8 + 1}
        wrong |= {2**n + k for n in (31, 32, 47, 63) for k in (-1, 0, 1)} | {2**64 - 1, right << 8, right << 32}
        wrong |= {rng.randrange(2 ** rng.randrange(1, 65)) for _ in range(40)}
        for length in wrong - {right}:
            yield f"{file}: a header of {length}", base(name) | {file: struct.pack("<Q", length) + content[8:]}


def header_entries() -> Cases:
    """Offsets, shapes, dtypes and fields that no header has."""
    rng = random.Random("header entries")
    header, data = unpacked(base("one")[SAFE])
    for name in rng.sample(sorted(header), 8):
        (start, end), shape = header[name]["data_offsets"], header[name]["shape"]
        other = header[next(n for n in header if n != name and header[n] != header[name])]
        offsets = [[end, start], [start, end + 2], [start, end - 2], [start - 2, end], [start + 2, end], [-2, end]]
        offsets += [[start, n] for n in HUGE] + [[n, n + end - start] for n in HUGE] + [other["data_offsets"]]
        offsets += [[float(start), float(end)], [str(start), str(end)], [start], [start, end, end], [[start, end]]]
        shapes = [[-n for n in shape], [*shape, 1], [1, *shape], shape[:-1], [*shape, 0], [float(n) for n in shape]]
        shapes += [[str(n) for n in shape], [*shape, True], [n + 1 for n in shape], [shape], [*shape, None], [0], [1]]
        shapes += [[n] for n in HUGE] + [[2**32] * 2, [2**62] * 10**5, [1] * 10**5 + shape, [2**63 - 1] * 2]
        dtypes = [
            *"F32 F64 I8 I16 U16 BOOL F8_E4M3 f16".split(),
            "F16 ",
            "",
            "F16\n",
            "\x1b[2J",
            "X" * 4000,
            "X" * 5000,
        ]
        changes = [{"data_offsets": span} for span in [*offsets, *NO_NUMBER, [0, 0]] if span != header[name]]
        changes += [{"shape": s} for s in [*shapes, *NO_NUMBER] if s != shape]
        changes += [{"dtype": dtype} for dtype in [*dtypes, 16, None, True, [], {}]]
        entries = [header[name] | change for change in changes]
        entries += [{k: v for k, v in header[name].items() if k != left} for left in header[name]]
        for entry in [*entries, None, [], {}, 5, "F16", header]:
            yield f"{name}: {str(entry)[:80]}", base("one") | {SAFE: packed(header | {name: entry}, data)}


def gaps() -> Cases:
    """Data that belong to no tensor, or to two."""
    header, data = unpacked(base("one")[SAFE])
    for extra in (1, 2, 7, 4096):
        for at in (0, 100, 256, 1000, len(data)):
            longer = data[:at] + bytes(extra) + data[at:]
            yield f"{extra} more bytes at {at}", base("one") | {SAFE: packed(header, longer)}
            moved = {
                name: entry | {"data_offsets": [n + extra * (n >= at) for n in entry["data_offsets"]]}
                for name, entry in header.items()
            }
            yield f"all moved by {extra} at {at}", base("one") | {SAFE: packed(moved, longer[: len(data)])}
        yield f"{extra} bytes after it", base("one") | {SAFE: base("one")[SAFE] + bytes(extra)}
    for name in header:
        same = {n: entry | {"data_offsets": header[name]["data_offsets"]} for n, entry in header.items()}
        yield f"all at the place of {name}", base("one") | {SAFE: packed(same, data)}
        for twin, entry in header.items():
            if twin != name and entry["shape"] == header[name]["shape"]:
                yield f"{name} at the place of {twin}", base("one") | {SAFE: packed(header | {name: entry}, data)}
        none = {n: entry for n, entry in header.items() if n != name}
        yield f"a gap instead of {name}", base("one") | {SAFE: packed(none, data)}


def json_damage(text: bytes, seed: str, count: int) -> Iterator[bytes]:
    """What is no JSON, or no table, or a table with one key twice."""
    rng = random.Random(seed)
    yield from NO_JSON
    yield from (text.decode().encode(encoding) for encoding in ("utf-8-sig", "utf-16", "utf-32"))
    for opening, inner, closing in ((b"[", b"", b"]"), (b'{"a":', b"1", b"}"), (b'{"a":[', b"", b"]}")):
        for depth in (2000, 10**5):
            yield opening * depth
            yield text[:-1] + b', "deep": ' + opening * depth + inner + closing * depth + b"}"
    yield text[:-1] + b', "a": 1, "a": 2}'
    yield text[:-1] + b', "many": ' + b"9" * 5000 + b"}"
    yield from (text + tail for tail in (b"{}", b"\0", b",", b"]", text))
    for _ in range(count):
        at = rng.randrange(len(text))
        yield text[:at] + rng.choice([b"\xff", b"\xed\xa0\x80", b"\x00", b"\x1f", b"\n\n}"]) + text[at:]
    for key, value in (pairs := list(json.loads(text).items())):
        yield text[:-1] + b", " + as_json({key: value})[1:]
        yield as_json({key: rng.choice(pairs)[1]})[:-1] + b", " + text[1:]


def header_texts() -> Cases:
    """Headers that are no JSON, not UTF-8, nested deeply, or name a tensor twice."""
    header, data = unpacked(base("one")[SAFE])
    text = as_json(header)
    for damaged in json_damage(text, "header", 80):
        yield f"header {damaged[-40:]!r}", base("one") | {SAFE: packed(damaged, data)}
    for constant in (b"false", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e3", b"-0.0", b"0x10", b"01"):
        yield f"offset {constant!r}", base("one") | {SAFE: packed(text.replace(b"[0, ", b"[" + constant + b", "), data)}
    for name in header:
        odd = text.replace(as_json(name), as_json(name + "\ud800"))
        yield f"half a character in {name}", base("one") | {SAFE: packed(odd, data)}
        twice = text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1 + list(header).index(name))
        yield f"two dtypes in {name}", base("one") | {SAFE: packed(twice, data)}
    many = b",".join(b'"%d":1' % n for n in range(20_000))
    yield "a late duplicate", base("one") | {SAFE: packed(b"{%b,%b}" % (many, b'"19999":1'), data)}


def tensors() -> Cases:
    """Tensors renamed, dropped, added, of another shape or dtype, or in two shards."""
    rng = random.Random("tensors")
    odd = ["", " ", "x", "../x", "x\n\ny", "\x1b[2J", "x" * 3000]
    odd += ["model.layers.2.mlp.up_proj.weight", "model.norm.bias"]

    def changes() -> Iterator[tuple[str, dict[str, np.ndarray | None]]]:
        for name, array in arrays().items():
            wrong = [array[:-1], array.repeat(2, 0), array[None], array[..., :0], array.astype(np.float64)]
            wrong += [
                array.view(np.int16),
                array.reshape(-1),
                array.astype(np.uint8),
                array[0],
                array.sum(keepdims=True),
            ]
            wrong = [np.ascontiguousarray(a) for a in wrong if a.shape != array.shape or a.dtype != array.dtype]
            yield f"{name} is gone", {name: None}
            for new in (f"{name} ", name.upper(), name.removesuffix("weight"), name + "\n", *rng.sample(odd, 2)):
                yield f"{name} is {new!r}", {name: None, new: array}
            yield from ((f"{name} is {other.dtype} {other.shape}", {name: other}) for other in wrong)
        yield from ((f"{new!r} is new", {new: np.ones(3, np.float16)}) for new in odd)

    for label, change in changes():
        table = {name: a for name, a in (arrays() | change).items() if a is not None}
        yield f"{label}, in {SAFE}", base("one") | {SAFE: safetensors.numpy.save(table)}
        if rng.random() < 0.3:
            yield f"{label}, in {BIN}", base("bin") | {BIN: torch_file(table)}
    for kind, save in (("shards", safetensors.numpy.save), ("bins", torch_file)):
        parts = shards("model-{}-of-3.safetensors" if kind == "shards" else "pytorch_model-{}-of-3.bin")
        for name in arrays():
            home = next(file for file in parts if name in parts[file])
            for file in sorted(parts.keys() - {home}):
                both = parts[file] | {name: arrays()[name]}
                yield f"{name} is in {home} and {file}", base(kind) | {file: save(both)}
            without = {n: a for n, a in parts[home].items() if n != name}
            yield f"{name} is not in {home}", base(kind) | {home: save(without)}


def indices() -> Cases:
    """Indices that name what is not there, what lies elsewhere, or what is no name."""
    for kind, whole, suffix in (("shards", SAFE, ".safetensors"), ("bins", BIN, ".bin")):
        index = f"{whole}.index.json"
        good, content = base(kind), json.loads(base(kind)[index])
        files = sorted(set(content["weight_map"].values()))
        odd = [f"x{suffix}", f"../source/{files[0]}", f"/{files[0]}", f"./{files[0]}", f"{files[0]}/", "", ".", ".."]
        odd += [suffix, f"a\0{suffix}", f"{files[0]}\n", "config.json", index, "x" * 300 + suffix, "x" * 9000 + suffix]
        odd += [f"{name}{suffix}" for name in ("\ud800", "\x1b[2J", "C:\\x", "loop", "folder", "~/x")]
        beside = {f"loop{suffix}": f"loop{suffix}", f"folder{suffix}": None}
        for name, home in list(content["weight_map"].items())[::2]:
            for file in [*odd, *NO_NUMBER, 5, *(other for other in files if other != home)]:
                changed = content | {"weight_map": content["weight_map"] | {name: file}}
                yield f"{name} is in {file!r}"[:99], good | beside | {index: as_json(changed)}
        for way in ("../source/{}", "./{}", "x/../{}", "folder" + suffix + "/../{}", "{}/"):
            moved = {name: way.format(file) for name, file in content["weight_map"].items()}
            yield f"all in {way}", good | beside | {index: as_json({"weight_map": moved})}
        for table in [*NO_NUMBER, {}, files, dict.fromkeys(files), dict.fromkeys(content["weight_map"], 5)]:
            yield f"weight_map: {str(table)[:60]}", good | {index: as_json({"weight_map": table})}
        many = dict.fromkeys(map(str, range(30_000)), files[0])
        yield "many names", good | {index: as_json({"weight_map": many})}
        for damaged in json_damage(good[index], kind, 40):
            yield f"index {damaged[-40:]!r}", good | {index: damaged}
        for file in files:
            yield f"{file} is gone", {name: c for name, c in good.items() if name != file}
            for other in [*(good[f] for f in files if f != file), None, file, "nowhere", b"", bytes(3000)]:
                yield f"{file} is {str(other)[:40]}", good | {file: other}
            for copied in (b"\0" + good[file], good[file][:-1], good[file][1:], good[file] + b"\0" * 70_000):
                yield f"{file} has {len(copied)} bytes", good | {file: copied}


def configs() -> Cases:
    """Fields of config.json of a wrong type, out of range, absurd or left out."""
    sizes = [key for key, value in CONFIG.items() if type(value) is int]
    numbers = [n for n in NO_NUMBER if n is not None]
    deep = functools.reduce(lambda inner, _: [inner], range(300), 1)
    no_size = [*numbers, 0, -1, 8.0, 10**12, *HUGE, deep]
    odd = {
        **dict.fromkeys(sizes, no_size),
        "head_dim": [*no_size, 2, 3, 5, 8],
        **dict.fromkeys(["rms_norm_eps", "initializer_range"], [*numbers, None, 0, -1e-5, 10**400, deep]),
        **dict.fromkeys(
            ["tie_word_embeddings", "attention_bias", "mlp_bias"], ["false", True, 0, 1, None, [], {}, deep]
        ),
        **dict.fromkeys(
            [f"{kind}_token_id" for kind in ("bos", "eos", "pad")], ["x", 1.5, True, {}, *HUGE, [None], ["a"]]
        ),
        "model_type": [*NO_NUMBER, "gpt2", "LLAMA", "llama ", "x" * 5000, "\x1b[2J", "llama\n", deep, {"llama": 1}],
        "hidden_act": ["gelu", 5, [], {}, "x" * 5000, "\n", deep],
        "quantization_config": [{"bits": 4}, 5, "gptq", [1]],
        "longlora_window": [*numbers, 0, -1, 8.5, *HUGE, deep],
        "longlora_ntk": [*numbers[:1], 5, [], [1], {"factor": 2}, {"rope_theta": 5}, {"rope_theta": "x", "factor": {}}],
    }
    for key, values in odd.items():
        for value in values:
            yield f"{key}={str(value)[:50]}", base("one") | {"config.json": as_json(CONFIG | {key: value})}
            if key not in ("model_type", "num_hidden_layers"):
                yield f"bin, {key}={str(value)[:50]}", base("bin") | {"config.json": as_json(CONFIG | {key: value})}
    for depth in range(800, 1000, 10):  # somewhere here json.loads() fails
        lists, tables = b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth
        for key, value in (("vocab_size", lists), ("model_type", lists), ("rope_scaling", tables)):
            text = as_json({name: value for name, value in CONFIG.items() if name != key})
            yield (
                f"{key} {depth} deep",
                base("one") | {"config.json": text[:-1] + b', "%b": %b}' % (key.encode(), value)},
            )
    for key in ["model_type", *sizes[:5]]:
        for left in (CONFIG | {key: None}, {name: value for name, value in CONFIG.items() if name != key}):
            yield f"no {key}", base("one") | {"config.json": as_json(left)}
    for key, value in (("vocab_size", 17), ("hidden_size", 16), ("intermediate_size", 11), ("num_hidden_layers", 1)):
        yield f"{key}={value}", base("one") | {"config.json": as_json(CONFIG | {key: value})}
    mistral = CONFIG | {"model_type": "mistral"}
    for window in [5, 63, "5", [5], {"a": 1}, True, 1.5, -1, float("nan")]:
        files = base("one") | {"config.json": as_json(mistral | {"sliding_window": window})}
        yield f"sliding_window={window}", files


def ropes() -> Cases:
    """Rope settings of a wrong type, out of range or absurd, in both places where configs have them."""
    bad = ["8", True, [], [8.0], {}, {"a": 8}, float("nan"), float("inf"), 10**400, "x" * 5000]
    low = [0, -1, 0.5]
    plain = {"factor": 4.0, "original_max_position_embeddings": 16}
    llama3 = plain | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    longrope = plain | {"short_factor": [1.0, 2.0], "long_factor": [1.0, 3.0]}
    good = {"linear": plain, "dynamic": plain, "yarn": plain, "llama3": llama3, "longrope": longrope, "ntk": plain}
    changes = []
    for kind, given in good.items():
        changes += [{"rope_type": kind} | given | {key: value} for key in ("factor",) for value in [*bad, *low]]
        changes += [{"type": kind} | given | {"original_max_position_embeddings": v} for v in [*bad, 0.5, -1, 2**31]]
        changes += [{"rope_type": kind} | given | {"rope_theta": value} for value in [*bad, *low, 1]]
        changes += [{"type": kind} | given | {"partial_rotary_factor": value} for value in [*bad[:1], *bad[2:], *low]]
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        changes += [{"rope_type": "yarn"} | plain | {key: value} for value in bad]
    changes += [{"rope_type": "yarn"} | plain | {"truncate": value} for value in ["x", 5, [], float("nan")]]
    for key in ("low_freq_factor", "high_freq_factor"):
        changes += [{"rope_type": "llama3"} | llama3 | {key: value} for value in [*bad, None, -1]]
    for key in ("short_factor", "long_factor"):
        values = [[], [1.0], [1.0] * 3, ["1", "2"], [None, 1.0], [0.0, 1.0], [-1.0, 1.0], [True, 1.0], [[1.0], [1.0]]]
        values += [5, "x", {}, [float("nan"), 1.0], [float("inf"), 1.0], [10**400, 1.0], None, [1.0] * 10**4]
        changes += [{"rope_type": "longrope"} | longrope | {key: value} for value in values]
    changes += [plain | {"rope_type": kind} for kind in [*bad, "LINEAR", "linear ", 5, "\n"]]
    for form in ("rope_scaling", "rope_parameters"):
        for change in changes:
            yield f"{form}={str(change)[:90]}", base("one") | {"config.json": as_json(CONFIG | {form: change})}
        for value in ["linear", 5, True, [1], [{"factor": 2.0}], {"full_attention": plain}]:
            yield f"{form}={value}", base("one") | {"config.json": as_json(CONFIG | {form: value})}
    for value in [*bad, *low, 1, None]:
        if value is not None:
            yield f"theta={str(value)[:40]}", base("one") | {"config.json": as_json(CONFIG | {"rope_theta": value})}


def config_texts() -> Cases:
    """Files in the place of config.json that are no JSON, no table, have a key twice, or are no files."""
    rng = random.Random("config texts")
    for kind in BASES:
        for damaged in json_damage(as_json(CONFIG), f"config {kind}", 30):
            yield f"config {damaged[-40:]!r}", base(kind) | {"config.json": damaged}
    for content in (None, "config.json", "nowhere", "/dev/zero", rng.randbytes(1000), rng.randbytes(5_000_000)):
        yield f"config is {str(content)[:40]}", base("one") | {"config.json": content}
    yield "50 MB of config", base("one") | {"config.json": b"[" * 50_000_000}
    yield "50 MB of index", base("shards") | {f"{SAFE}.index.json": b'{"a":' * 10_000_000}
    yield "no config", {SAFE: base("one")[SAFE]}
    yield "config alone", {"config.json": as_json(CONFIG)}
    yield "nothing", {"README.md": b""}


def payloads(canary: str) -> dict[str, bytes]:
    """Pickles that leave a file when they are loaded."""
    touch, write = f"touch {canary}", f"open({canary!r}, 'w').close()"
    calls = {
        "system": (os.system, touch),
        "eval": (eval, write),
        "exec": (exec, write),
        "popen": (os.popen, touch),
        "run": (subprocess.call, ["touch", canary]),
        "output": (subprocess.getoutput, touch),
        "open": (open, canary, "w"),
        "mkdir": (os.mkdir, canary),
        "spawn": (os.posix_spawnp, "touch", ["touch", canary], {}),
        "loads": (pickle.loads, pickle.dumps(Call(os.system, touch))),
    }
    return {
        f"{name}, protocol {protocol}": pickle.dumps(Call(*call), protocol)
        for name, call in calls.items()
        for protocol in range(6)
    }


class Call:
    """Pickled as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def repacked(content: bytes, pickled: bytes) -> bytes:
    """A file of torch.save with another data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()


def pickles() -> Cases:
    """Files that want to run something, whole or as one shard of many, whatever their names say that they are."""
    for label, payload in payloads("canary").items():
        for kind, file in (("bin", BIN), ("bins", "pytorch_model-2-of-3.bin")):
            with zipfile.ZipFile(io.BytesIO(base(kind)[file])) as archive:
                honest = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
            body = payload[2:] if payload.startswith(b"\x80") else payload
            places = {
                "alone": payload,
                "first": honest[:2] + body[:-1] + b"0" + honest[2:],
                "last": honest[:-1] + b"0" + body,
                "as a value": honest[:-2] + b"X\1\0\0\0x" + body[:-1] + honest[-2:],
            }
            for place, pickled in places.items():
                yield f"{label}, {place}, in {file}", base(kind) | {file: repacked(base(kind)[file], pickled)}
            yield f"{label}, no zip, in {file}", base(kind) | {file: payload}
        yield f"{label}, in {SAFE}", base("one") | {SAFE: payload}
        yield f"{label}, in the config", base("one") | {"config.json": payload}
        yield f"{label}, in the header", base("one") | {SAFE: packed(payload, b"")}
        yield f"{label}, in the index", base("shards") | {f"{SAFE}.index.json": payload}


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One byte changed, put in, taken out or doubled."""
    at = rng.randrange(len(content))
    middle = rng.choice([bytes([content[at] ^ 1 << rng.randrange(8)]), rng.randbytes(1), b"", content[at : at + 1] * 2])
    return content[:at] + middle + content[at + 1 :]


def flips() -> Cases:
    """One byte of a folder is wrong, which may be harmless."""
    rng = random.Random("flips")
    for kind, file, first, last, count in [
        ("one", SAFE, 0, 2000, 250),
        ("one", SAFE, -2500, None, 10),
        ("shards", "model-2-of-3.safetensors", 0, 750, 150),
        ("shards", f"{SAFE}.index.json", 0, None, 150),
        ("bins", f"{BIN}.index.json", 0, None, 100),
        ("one", "config.json", 0, None, 150),
        ("bin", "config.json", 0, None, 50),
    ]:
        content = base(kind)[file]
        start, end, _ = slice(first, last).indices(len(content))
        for _ in range(count):
            damaged = content[:start] + flipped(content[start:end], rng) + content[end:]
            yield f"{file} {damaged[:200]!r}", base(kind) | {file: damaged}


def truth(files: Files) -> dict[str, np.ndarray]:
    """The tensors of a folder as safetensors and torch read them."""
    for whole, load in ((SAFE, safetensors.numpy.load), (BIN, torch_load)):
        if whole in files:
            return load(files[whole])
        if f"{whole}.index.json" in files:
            weight_map = json.loads(files[f"{whole}.index.json"])["weight_map"]
            tables = {file: load(files[file]) for file in set(weight_map.values())}
            return {name: tables[file][name] for name, file in weight_map.items()}
    raise AssertionError


def torch_load(content: bytes) -> dict[str, np.ndarray]:
    table = torch.load(io.BytesIO(content), weights_only=True)
    return {name: tensor.numpy() for name, tensor in table.items()}


def same(table: dict[str, Tensor], expected: dict[str, np.ndarray]) -> bool:
    found = {name: tensor.read() for name, tensor in table.items()}
    return found.keys() == expected.keys() and all(
        found[n].dtype == a.dtype and found[n].shape == a.shape and found[n].tobytes() == a.tobytes()
        for n, a in expected.items()
    )


@functools.cache
def _converted() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder) / "source", base("one"))
        convert_weights.main(["from-hf", f"{folder}/source", f"{folder}/out"])
        return snapshot(Path(folder) / "out")


def checkpoints() -> Cases:
    """Converted checkpoints that lost files, or whose files are cut off, longer, no files or of another array."""
    good, rng = dict(_converted()), random.Random("checkpoints")
    for name in rng.sample([name for name in good if "/c/" in name], 16):
        content = good[name]
        others = [c for n, c in good.items() if "/c/" in n and len(c) != len(content)]
        for other in [content[:-1], content[: len(content) // 2], b"", content + b"\0", content * 2, *others[:1]]:
            yield f"{name} has {len(other)} bytes", good | {name: other}
        for other in [None, os.path.basename(name), "nowhere"]:
            yield f"{name} is {other}", good | {name: other}
        yield f"{name} is gone", {n: c for n, c in good.items() if n != name}
    leaves = rng.sample([name for name in good if name.endswith("zarr.json")], 3)
    for name in leaves:
        yield f"{name} is gone", {n: c for n, c in good.items() if n != name}
        yield f"all of {name} is gone", {n: c for n, c in good.items() if not n.startswith(os.path.dirname(name))}
        for other in leaves:
            if json.loads(good[other])["shape"] != json.loads(good[name])["shape"]:
                yield f"{name} is {other}", good | {name: good[other]}
        for length in rng.sample(range(len(good[name]) - 1), 8):
            yield f"{name} ends at {length}", good | {name: good[name][:length]}
        for damaged in [*NO_JSON, None, "zarr.json", b"[" * 10**5, b'{"a":' * 10**5]:
            yield f"{name} is {damaged}"[:99], good | {name: damaged}
        for key, value in arrays_not_ours(json.loads(good[name])):
            changed = json.loads(good[name]) | {key: value}
            yield f"{name}: {key}={str(value)[:60]}", good | {name: as_json(changed)}
    for layers in (3, 10**6, 2**31 - 1):
        yield f"{layers} layers", good | resized(good, "num_hidden_layers", layers, 2)
    for rows in (17, 10**6, 2**31 - 1):
        yield f"{rows} words", good | resized(good, "vocab_size", rows, 16)
    for damaged in json_damage(good["config.json"].strip(), "converted", 40):
        yield f"config {damaged[-40:]!r}", good | {"config.json": damaged}
    for key in "vocab_size hidden_size intermediate_size num_hidden_layers num_key_value_heads head_dim".split():
        for value in [*NO_NUMBER, 0, -1, 6, 10**12, *HUGE]:
            if (key, value) not in (("num_key_value_heads", None), ("head_dim", None)):
                changed = json.loads(good["config.json"]) | {key: value}
                yield f"{key}={str(value)[:40]}", good | {"config.json": as_json(changed)}


def resized(files: Files, key: str, size: int, old: int) -> Files:
    """config.json with another size, and with it every array that has that size."""
    changed: Files = {"config.json": as_json(json.loads(files["config.json"]) | {key: size})}
    for name in files:
        if name.endswith("zarr.json") and (key == "vocab_size" or "params/layers" in name):
            array = json.loads(files[name])
            shape = [size if n == old and (i == 0 or key == "vocab_size") else n for i, n in enumerate(array["shape"])]
            changed[name] = as_json(array | {"shape": shape})
    return changed


def arrays_not_ours(array: dict) -> Iterator[tuple[str, object]]:
    """(key, value) of a zarr.json that is not what we write."""
    shape = array["shape"]
    shapes = [shape[::-1], shape[:-1], [*shape, 1], [n + 1 for n in shape], [0] * len(shape), [-n for n in shape]]
    for value in [*shapes, [2**62] * len(shape), [2**63] * len(shape), *NO_NUMBER]:
        if value != shape:
            yield "shape", value
    yield from (("data_type", value) for value in [*NO_NUMBER, "int16", "float64", "uint8", "bool", "x" * 5000, "\x1b"])
    for chunk in [[-1] * len(shape), [0] * len(shape), [2**62] * len(shape), [2**20] * len(shape), [1] * 40]:
        yield "chunk_grid", {"name": "regular", "configuration": {"chunk_shape": chunk}}
    yield from (("chunk_grid", value) for value in [*NO_NUMBER, {"name": "regular"}, {"name": "x"}])
    yield from (("codecs", value) for value in [*NO_NUMBER, [{"name": "x"}], [{"name": "bytes"}] * 2, [{}]])
    for order in itertools.permutations(range(len(shape))):
        if list(order) != array["codecs"][0]["configuration"]["order"]:
            yield "codecs", [{"name": "transpose", "configuration": {"order": order}}, array["codecs"][1]]
    yield "codecs", [array["codecs"][0], {"name": "bytes", "configuration": {"endian": "big"}}]
    for name in ("gzip", "zstd", "blosc", "crc32c", "sharding_indexed", "packbits", "vlen-utf8"):
        yield "codecs", [*array["codecs"], {"name": name}]
    yield from ((key, 5) for key in ("zarr_format", "node_type", "chunk_key_encoding"))
    yield "node_type", "group"
    yield "storage_transformers", [{"name": "x"}]
    yield "must_understand", {"x": 5}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}
GGUF_KEYS = {
    "llama.embedding_length": 8,
    "llama.block_count": 2,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.context_length": 64,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 2.0,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *"abcdefghijk", "ab", "bc"],
    "tokenizer.ggml.scores": [0.0] * 14 + [-1.0, -2.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 13,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}


@functools.cache
def gguf_tensors() -> dict[str, np.ndarray]:
    """The same model as llama.cpp names and turns it, float32."""
    table = {}
    for name, array in arrays().items():
        if "q_proj" in name or "k_proj" in name:
            array = array.reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        table[name] = array.astype(np.float32)
    return table


def gguf_file(keys: dict | None = None, tensors: dict | None = None, **options) -> bytes:
    """A GGUF file; keys: more or other metadata, None leaves one out; tensors: the same."""
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(f"{folder}/m.gguf", "llama", **options)
        add = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64}
        add |= {str: writer.add_string, list: writer.add_array}
        for key, value in (GGUF_KEYS | (keys or {})).items():
            if value is not None:
                add[type(value)](key, value)
        for name, array in (gguf_tensors() | (tensors or {})).items():
            if array is not None:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(folder, "m.gguf").read_bytes()


def ggufs() -> Cases:
    """GGUF files that end too early, are none, or have other keys and tensors than a model needs."""
    content, rng = gguf_file(), random.Random("ggufs")
    for length in {*rng.sample(range(len(content)), 150), *range(32), len(content) - 1}:
        yield f"ends at {length}", {"m.gguf": content[:length]}
    for other in [*NO_JSON, None, "m.gguf", base("bin")[BIN], base("one")[SAFE], content[::-1], content[1:]]:
        yield f"{other}"[:60], {"m.gguf": other}
    numbers = [0, -1, 2**31, 2**62, "8", [8], [8, 8], ["8"], True, 1.5, float("nan"), float("inf"), 1e300, -1.0]
    sizes = [key for key, value in GGUF_KEYS.items() if type(value) is int and key.startswith("llama")]
    floats = ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "llama.rope.scaling.factor"]
    odd = dict.fromkeys(sizes, numbers) | dict.fromkeys(floats, [-1, -1.0, "8", [8.0], True, *numbers[-4:-1]])
    odd |= {
        "llama.attention.key_length": numbers,
        "llama.attention.sliding_window": ["8", [8], 8, float("nan")],
        "llama.expert_count": ["8", [8], 8],
        "llama.rope.scaling.type": [5, [5], True, "x" * 5000, "\x1b[2J", "\n", "yarn\n", "llama3"],
        "llama.rope.scaling.original_context_length": [-1, 2**31, 1.5, "8", [8], float("nan")],
        "tokenizer.ggml.model": [5, "bert", "x" * 5000, "\n", [5], None],
        "tokenizer.ggml.pre": [5, [5], True],
        "tokenizer.ggml.tokens": [5, "abc", [5] * 16, [1.5] * 16, ["a"] * 15, ["a"] * 17, None, ["a" * 5000] * 16],
        "tokenizer.ggml.scores": [5, "abc", [5] * 16, ["a"] * 16, [1.0] * 15, None],
        "tokenizer.ggml.token_type": [5, "abc", [1.5] * 16, ["a"] * 16, [1] * 15],
        "tokenizer.ggml.bos_token_id": [-1, "a", 1.5, True, 2**40, [1]],
        "tokenizer.ggml.add_bos_token": [5, "a", [True]],
        "tokenizer.chat_template": [5, [5]],
    }
    for key, values in odd.items():
        for value in values:
            yield f"{key}={str(value)[:40]}", {"m.gguf": gguf_file({key: value})}
    for key in sizes:
        yield f"no {key}", {"m.gguf": gguf_file({key: None})}
    for merges in (5, [5], ["a"], ["x y"], ["a b", "zz\n\nz z"], ["a " + "b" * 5000]):
        yield f"merges={str(merges)[:40]}", {"m.gguf": gguf_file(GPT2 | {"tokenizer.ggml.merges": merges})}
    for ours, (name, array) in zip(arrays(), gguf_tensors().items(), strict=True):
        if name != "output.weight":  # without it, the embedding is the head
            yield f"no {name}", {"m.gguf": gguf_file(tensors={name: None})}
        for new in (ours, "", f"{name} ", "x" * 60, "blk.9.attn_q.weight", "\x1b[2J", "a\nb"):
            yield f"{name} is {new!r}", {"m.gguf": gguf_file(tensors={name: None, new: array})}
        for other in (
            array[:-1],
            array.astype(np.int32),
            array.astype(np.int8),
            array.astype(np.float64)[..., :1],
            array.max(keepdims=False),
        ):
            yield f"{name} is {other.dtype} {other.shape}", {"m.gguf": gguf_file(tensors={name: other})}
    for name in ("model.norm.weight", "rope_freqs.weight", "rope_factors_long.weight"):
        for number in (0.0, -1.0, np.nan, np.inf, 2.0, np.float64(2), np.int32(2), np.int8(2)):
            extra = np.full(8 if "model" in name else 2, number, getattr(number, "dtype", np.float32))
            yield f"{name} of {number!r} is new", {"m.gguf": gguf_file(tensors={name: extra})}
    yield "big-endian", {"m.gguf": gguf_file(endianess=gguf.GGUFEndian.BIG)}


GPT2 = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.scores": None}


def gguf_numbers() -> Cases:
    """Counts, lengths, types and offsets in the header of a GGUF file that are not right."""
    content = gguf_file()
    wrong = [0, 1, 3, 8, 9, 13, 2**20, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
    places = {"tensors": (8, 8), "keys": (16, 8), "version": (4, 4)}
    for key, value in GGUF_KEYS.items():
        at = content.index(key.encode())
        places |= {f"length of {key}": (at - 8, 8), f"type of {key}": (at + len(key), 4)}
        if isinstance(value, list):
            places |= {f"types in {key}": (at + len(key) + 4, 4), f"count of {key}": (at + len(key) + 8, 8)}
        if isinstance(value, str):
            places[f"length of the text of {key}"] = (at + len(key) + 4, 8)
    for name, array in list(gguf_tensors().items())[::2]:
        at = content.index(name.encode())
        shape = at + len(name) + 4
        places |= {f"length of {name}": (at - 8, 8), f"axes of {name}": (shape - 4, 4), f"rows of {name}": (shape, 8)}
        places |= {f"type of {name}": (shape + 8 * array.ndim, 4), f"offset of {name}": (shape + 8 * array.ndim + 4, 8)}
    for place, (at, width) in places.items():
        right = int.from_bytes(content[at : at + width], "little")
        for number in {n % 2 ** (8 * width) for n in (*wrong, right + 1, right - 1, right + 32, right << 8)} - {right}:
            if place.startswith("type") and number not in wrong[3:]:  # it may be one of as many bytes
                continue
            if place != "version" or number != 2:  # of the same form
                damaged = content[:at] + number.to_bytes(width, "little") + content[at + width :]
                yield f"{place} is {number}", {"m.gguf": damaged}
    for text in (
        b"linear",
        b"<unk>",
        b"{{ messages }}",
        b"tokenizer.ggml.scores",
        b"general.architecture",
        b"blk.0.attn_q",
    ):
        for at in range(len(text)):
            odd = text[:at] + b"\xff" + text[at + 1 :]
            yield f"{odd}", {"m.gguf": content.replace(text, odd)}
    deep = content.index(b"llama.block_count") + len("llama.block_count")
    for depth in (2, 900, 20_000):
        nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth
        yield f"lists in {depth} lists", {"m.gguf": content[:deep] + nested + content[deep:]}


def gguf_flips() -> Cases:
    """One byte of the header of a GGUF file is wrong, which may be harmless."""
    content, rng = gguf_file(), random.Random("gguf flips")
    header = content.index(gguf_tensors()["token_embd.weight"].tobytes())
    for i in range(300):
        damaged = flipped(content[:header], rng)
        if i % 2 and len(damaged) != header:
            damaged = damaged[:header].ljust(header, b"\0")
        yield f"{i}", {"m.gguf": damaged + content[header:]}


def gguf_truth(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as the gguf package reads them, under our names."""
    table = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = next(ours for ours, theirs in zip(arrays(), gguf_tensors(), strict=True) if theirs == tensor.name)
        if "q_proj" in name or "k_proj" in name:
            array = array.reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(array.shape)
        table[name] = array
    return table


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
        **{indices: 980, configs: 590, ropes: 900, config_texts: 350, pickles: 740},
    },
    "to-hf": {checkpoints: 740},
    "from-gguf": {ggufs: 680, gguf_numbers: 1300},
}
PERHAPS = {"from-hf": {flips: 850}, "from-gguf": {gguf_flips: 290}}
SOURCES = {"from-hf": "source", "to-hf": "source", "from-gguf": "source/m.gguf"}


def every(families: dict) -> list[tuple]:
    """(command, family, its number of cases)."""
    return [(command, family, count) for command, counts in families.items() for family, count in counts.items()]


def name_of(value) -> str:
    return getattr(value, "__name__", None) or str(value)


def test_there_are_thousands_of_cases():
    """Catches: a fuzz that shrank."""
    assert sum(count for *_, count in every(REFUSED) + every(PERHAPS)) > 10_000


@pytest.mark.parametrize(("command", "family", "count"), every(REFUSED), ids=name_of)
def test_damage_is_refused(command, family, count, place):
    """Catches: a traceback, many lines, half a folder, a command run, memory or time that a number in a file sets."""
    seen = set()
    for label, files in family():
        seen.add(frozenset(files.items()))
        try:
            assert place.refused(command, files, source=SOURCES[command]), "went through"
        except Exception as error:
            raise AssertionError(f"{command}, {label}: {error!r}") from error
    assert len(seen) >= count


@pytest.mark.parametrize(("command", "family", "count"), every(PERHAPS), ids=name_of)
def test_damage_is_refused_or_read_as_others_read_it(command, family, count, place):
    """Catches: one wrong byte after which other weights are read, or the same ones under another name."""
    seen, through = set(), 0
    for label, files in family():
        seen.add(frozenset(files.items()))
        try:
            if place.refused(command, files, source=SOURCES[command]) is None:
                through += 1
                expected = truth(files) if command == "from-hf" else gguf_truth(place.source / "m.gguf")
                assert same(open_converted(str(place.out))[1], expected), "other weights"
        except Exception as error:
            raise AssertionError(f"{command}, {label}: {error!r}") from error
    assert len(seen) >= count and 15 < through < 200


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
    monkeypatch.setattr("longlora_jax.weights.gguf._MOST_VALUES", 100)
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
    monkeypatch.setitem(globals(), "MEGABYTES", 160)  # measured: 100, 25 times its 4 MB
    monkeypatch.setitem(globals(), "SECONDS", 10)  # measured: 1.4
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


def test_what_a_stop_left_is_mended_or_refused(place):
    """Catches: a conversion that can never be ended, or that takes over what was damaged."""
    rng, done = random.Random("resumed"), 0
    left = {name: content for name, content in _converted().items() if name != "digests.json"}
    aside = place.root / ".out.incomplete"
    for name in rng.sample(sorted(left), 30):
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
    assert done > 100


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "convert_weights.py", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_the_command_itself(place):
    """Catches: what only a process of its own shows: its exit code, and all that it prints."""
    hostile = base("bin") | {BIN: payloads(str(place.root / "canary"))["system, protocol 2"]}
    cases = [
        ("from-hf", base("one") | {SAFE: base("one")[SAFE][:-1]}),
        ("from-hf", hostile),
        ("from-hf", base("one") | {"config.json": b"[" * 10**6}),
        ("from-hf", base("one") | {SAFE: packed({}, b"")}),
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
