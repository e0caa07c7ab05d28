"""Families of damage to converted checkpoints."""

import functools
import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from damage import HUGE, NO_JSON, NO_NUMBER, Cases, json_damage
from places import Files, as_json, base, lay_out, snapshot

import convert_weights


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
