"""Model folders to be damaged, and a place where a command is tried on them under limits of time and memory."""

import contextlib
import functools
import gc
import io
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import convert_weights
from longlora_jax.errors import UserError

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
    """Time is that of this thread alone, without the collector: other threads and what other tests left cost more than
    a case does. Memory is measured where Linux tells it."""
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")  # forgets the peak
        before = memory("VmRSS")
    gc.disable()
    started = time.thread_time()
    try:
        yield
        spent = time.thread_time() - started
    finally:
        gc.enable()
    assert spent < SECONDS, f"{spent:.1f} seconds"
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
