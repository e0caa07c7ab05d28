"""Converted checkpoints: an orbax checkpoint written tensor by tensor, checked as it is written, resumed if stopped.

OUT holds config.json (as Hugging Face has it), tokenizer files, digests.json and params/: the param tree of
model/decoder.py as orbax keeps it, one zarr array a leaf. Chunks hold rows of Hugging Face's layout, so the bytes of a
tensor pass from the one form to the other without being turned.
"""

import hashlib
import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from longlora_jax.config import ModelConfig
from longlora_jax.data.chat import ChatFormat
from longlora_jax.errors import UserError
from longlora_jax.files import empty, new_folder, one_line, read_json, write_json
from longlora_jax.progress import progress_bar
from longlora_jax.weights import hf
from longlora_jax.weights.config_faults import refuse
from longlora_jax.weights.hf_config import config_to_json, load_config
from longlora_jax.weights.rules import Rule, Table, cast, set_leaf, stacked_dtype, table_faults, weight_rules
from longlora_jax.weights.tensors import DTYPES, Tensor

_log = logging.getLogger(__name__)

DIGESTS = "digests.json"
_CHUNK_BYTES = 16 << 20
_WORKERS = 2  # one tensor is digested while another one is written


def write_converted(
    out: str, config: ModelConfig, table: Table, *, tokenizer_from: str | None, chat: ChatFormat | None = None
) -> None:
    """Writes a converted checkpoint from a table, holding two tensors at a time.

    The folder is written aside and renamed when every tensor has been read back and has the SHA-256 that it had at
    its source. Stopped and called again, it keeps what is there and right. Raises UserError if `out` exists, or,
    before anything is written, if the table does not fit the config. chat: see copy_tokenizer.
    """
    refuse("these weights cannot be converted", list(table_faults(config, table)))
    content = config_to_json(config, hf.widest_dtype(table))
    rules, layers = weight_rules(config), config.num_hidden_layers
    with new_folder(out, resume=True) as aside:
        params, marker = os.path.join(aside, "params"), os.path.join(aside, "config.json")
        if not (os.path.isfile(marker) and read_json(marker) == content):
            empty(aside)  # what another model left half done
            _write_skeleton(params, rules)
            write_json(marker, content)
        jobs = []
        for rule in rules:
            names = rule.names(layers)
            leaf = _make_leaf(os.path.join(params, ".".join(rule.path)), rule, layers, stacked_dtype(table, names))
            jobs += [(name, table[name], rule, i, leaf) for i, name in enumerate(names)]
        digests = {}
        total = sum(tensor.nbytes for tensor in table.values())
        with progress_bar(total, label="converting", unit="B") as bar, ThreadPoolExecutor(_WORKERS) as pool:
            running = {pool.submit(_transfer, *job): job for job in jobs}
            try:
                for done in as_completed(running):
                    name, tensor, *_ = running[done]
                    digests[name] = done.result()
                    bar.update(tensor.nbytes)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        write_json(
            os.path.join(aside, DIGESTS),
            {
                "algorithm": "sha256",
                "of": "each tensor's bytes as safetensors has them",
                "tensors": {name: digests[name] for name, *_ in jobs},
            },
        )
        if tokenizer_from:
            hf.copy_tokenizer(tokenizer_from, aside, chat, window=config.max_position_embeddings)


class _Leaf(NamedTuple):
    """Where the chunks of one weight go: its folder, dtype, and rows of Hugging Face's first axis in a chunk."""

    folder: str
    dtype: np.dtype
    rows: int
    chunk_bytes: int

    def chunk_path(self, rule: Rule, layer: int, number: int) -> str:
        """zarr's file of a chunk: a folder for each axis but the last."""
        index = [0] * len(rule.shape)
        index[rule.axes_in_hf_order()[0]] = number
        return os.path.join(self.folder, "c", *map(str, [layer] * rule.layered + index))

    def missing(self, rule: Rule, layer: int) -> bool:
        """Whether a chunk of this layer is not there, or not whole."""
        rows = rule.shape[rule.axes_in_hf_order()[0]]
        paths = (self.chunk_path(rule, layer, number) for number in range(math.ceil(rows / self.rows)))
        return any(not os.path.isfile(path) or os.path.getsize(path) != self.chunk_bytes for path in paths)


def _leaf(folder: str, rule: Rule, dtype: np.dtype, rows: int) -> _Leaf:
    return _Leaf(folder, dtype, rows, rows * _row_bytes(rule, dtype))


def _row_bytes(rule: Rule, dtype: np.dtype) -> int:
    return math.prod(rule.shape) // rule.shape[rule.axes_in_hf_order()[0]] * dtype.itemsize


def _layout(rule: Rule, layers: int, rows: int) -> dict[str, Any]:
    """How zarr keeps an array: uncompressed chunks, each a run of rows in Hugging Face's order."""
    lead, order = int(rule.layered), rule.axes_in_hf_order()
    chunk = list(rule.shape)
    chunk[order[0]] = rows
    return {
        "shape": [layers] * lead + list(rule.shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1] * lead + chunk}},
        "codecs": [
            {"name": "transpose", "configuration": {"order": [0] * lead + [axis + lead for axis in order]}},
            {"name": "bytes", "configuration": {"endian": "little"}},
        ],
    }


def _make_leaf(folder: str, rule: Rule, layers: int, dtype: np.dtype) -> _Leaf:
    """Writes the description of an array."""
    most = rule.shape[rule.axes_in_hf_order()[0]]
    rows = max(1, min(most, _CHUNK_BYTES // _row_bytes(rule, dtype)))
    metadata = _layout(rule, layers, rows) | {"data_type": str(dtype)}
    spec = _spec(folder) | {"metadata": metadata}
    try:
        ts.open(spec, open=True, create=True).result()
    except ValueError:  # what a stop left of it
        ts.open(spec, create=True, delete_existing=True).result()
    return _leaf(folder, rule, dtype, rows)


@contextmanager
def orbax_quiet() -> Iterator[None]:
    """Orbax logs errors alone: it warns of a folder that is read only, or has nothing to merge, as it should be."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


def _write_skeleton(folder: str, rules: list[Rule]) -> None:
    """Has orbax write its own description of the tree, around arrays of nothing that ours take the place of."""
    tree: dict[str, Any] = {}
    for rule in rules:
        set_leaf(tree, rule.path, np.zeros(1, np.float32))
    with orbax_quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
        checkpointer.save(Path(folder).absolute(), tree)
    for rule in rules:
        empty(os.path.join(folder, ".".join(rule.path)))


def _spec(folder: str) -> dict[str, Any]:
    # A chunk that is not there is an error, never zeros.
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": folder}, "fill_missing_data_reads": False}


def _transfer(name: str, tensor: Tensor, rule: Rule, layer: int, leaf: _Leaf) -> str:
    """Brings one tensor into its array, chunk by chunk, and returns its digest.

    A chunk that is there already stays. Raises UserError if one comes back other than it was written.
    """
    array = cast(name, tensor.read(), leaf.dtype).reshape([rule.shape[axis] for axis in rule.axes_in_hf_order()])
    digest = hashlib.sha256()
    back = np.empty(leaf.chunk_bytes, np.uint8)  # one for all chunks: fresh memory costs more than the reading
    for number, start in enumerate(range(0, len(array), leaf.rows)):
        content = np.ascontiguousarray(array[start : start + leaf.rows]).reshape(-1).view(np.uint8)
        path = leaf.chunk_path(rule, layer, number)
        digest.update(content.data)
        if not _holds(path, content, leaf.chunk_bytes, back):
            _write(path, content, leaf.chunk_bytes)
            if not _holds(path, content, leaf.chunk_bytes, back):
                raise UserError(f"{name} came back from the disk with other bytes than it was written: check the disk")
    return digest.hexdigest()


def _write(path: str, content: np.ndarray, size: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content.data)
        file.truncate(size)  # the last chunk of an array is as long as the others


def _holds(path: str, content: np.ndarray, size: int, back: np.ndarray) -> bool:
    """Whether a file of that size begins with the content; back: a buffer for what is read."""
    if not os.path.isfile(path) or os.path.getsize(path) != size:
        return False
    found = back[: len(content)]
    with open(path, "rb", buffering=0) as file:
        complete = file.readinto(found.data) == len(content)
    words = len(content) // 8 * 8  # compared eight at a time, the rest one by one
    same = np.array_equal(found[:words].view(np.uint64), content[:words].view(np.uint64))
    return complete and same and np.array_equal(found[words:], content[words:])


def is_converted(folder: str) -> bool:
    """Whether a folder is a converted checkpoint, perhaps a damaged one."""
    return os.path.isfile(os.path.join(folder, DIGESTS)) or any(Path(folder, "params").glob("*/zarr.json"))


def open_converted(folder: str, *, check: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the tensors of a converted checkpoint, not read yet; raises UserError naming every fault.

    check: compare each tensor with its digest, if there is one, when it is read (half a second a GB); UserError then,
    if they differ.
    """
    config = load_config(folder)
    digests = _digests(folder) if check else {}
    layers = config.num_hidden_layers
    table, faults = {}, []
    for rule in weight_rules(config):
        path = os.path.join(folder, "params", ".".join(rule.path))
        try:
            store = ts.open(_spec(path)).result()
        except ValueError as error:
            faults.append(f"{'/'.join(rule.path)} cannot be read ({one_line(str(error), 200)})")
            continue
        metadata = store.spec().to_json()["metadata"]
        if fault := _array_fault(metadata, rule, layers):
            faults.append(f"{'/'.join(rule.path)} {fault}")
            continue
        leaf = _leaf(path, rule, DTYPES[metadata["data_type"]], _rows(metadata, rule))
        for i, name in enumerate(rule.names(layers)):
            if leaf.missing(rule, i):
                faults.append(f"{name} is damaged or missing, convert the model again")
            part = store[i] if rule.layered else store
            table[name] = Tensor(leaf.dtype, rule.hf_shape, _reader(folder, name, rule, part, digests.get(name)))
    refuse(folder, faults)
    return config, table


def _digests(folder: str) -> dict[str, str]:
    """The digests of a folder; none, and a warning, where they are lost: the weights may be whole all the same."""
    try:
        digests = read_json(os.path.join(folder, DIGESTS)).get("tensors")
    except UserError as error:
        _log.warning("%s: the tensors are not compared with their digests", error)
        return {}
    return digests if isinstance(digests, dict) else {}


def _array_fault(metadata: dict[str, Any], rule: Rule, layers: int) -> str | None:
    """Why an array is not one that we wrote; tensorstore follows any description, until memory runs out."""
    shape = [layers] * rule.layered + list(rule.shape)
    if metadata["shape"] != shape:
        return f"has shape {metadata['shape']}, it must be {shape}"
    if metadata["data_type"] not in DTYPES:
        return f"is {metadata['data_type']}, it must be one of {', '.join(DTYPES)}"
    if not _layout(rule, layers, _rows(metadata, rule)).items() <= metadata.items():
        return "is laid out in another way than converted checkpoints are, convert the model again"
    return None


def _rows(metadata: dict[str, Any], rule: Rule) -> int:
    """Rows of Hugging Face's first axis in a chunk."""
    return metadata["chunk_grid"]["configuration"]["chunk_shape"][rule.layered + rule.axes_in_hf_order()[0]]


def _reader(folder: str, name: str, rule: Rule, store: ts.TensorStore, digest: str | None):
    def read() -> np.ndarray:
        try:
            array = store.transpose(rule.axes_in_hf_order()).read(order="C").result().reshape(rule.hf_shape)
        except ValueError as error:
            fault = one_line(str(error), 200)
            raise UserError(f"{folder}: {name} is damaged or missing, convert the model again ({fault})") from error
        if digest is not None and hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest() != digest:
            raise UserError(f"{folder}: {name} is not what {DIGESTS} says, convert the model again")
        return array

    return read
