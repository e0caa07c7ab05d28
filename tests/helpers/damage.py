"""Families of damage to Hugging Face folders: each gives (what was done, files)."""

import functools
import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.numpy
from places import BASES, BIN, CONFIG, SAFE, Files, arrays, as_json, base, packed, shards, torch_file, unpacked

from longlora_jax.weights.tensors import Tensor

torch = pytest.importorskip("torch")


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
        for name in list(content["weight_map"])[::2]:
            for file in [*odd, *NO_NUMBER, 5]:  # another of the files is read: see test_folders.py
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
        **dict.fromkeys(
            ["longlora_ntk", "longlora_rope"],
            [*numbers[:1], 5, [], [1], {"factor": 2}, {"rope_theta": 5}, {"rope_theta": "x", "factor": {}}],
        ),
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
    for window in [0, 2**31, "5", [5], {"a": 1}, True, 1.5, -1, float("nan")]:
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
