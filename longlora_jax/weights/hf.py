"""Hugging Face folders, in and out, tensor by tensor.

Imports neither jax nor torch, so that it works in a worker process as well.
"""

import os
import shutil
from collections.abc import Mapping

from longlora_jax.config import ModelConfig
from longlora_jax.data.chat import GENERATION, ChatFormat, export_format, folder_format
from longlora_jax.errors import UserError
from longlora_jax.files import new_folder, one_line, read_json, refuse_pointer, write_json
from longlora_jax.weights.bnb import unpacked
from longlora_jax.weights.config_faults import TOKEN_IDS, refuse
from longlora_jax.weights.habits import settle
from longlora_jax.weights.hf_config import config_to_json, is_quantized, load_config
from longlora_jax.weights.layouts import to_theirs
from longlora_jax.weights.rules import (
    Params,
    Table,
    build_params,
    cast_table,
    flatten,
    params_table,
    table_faults,
    weight_rules,
)
from longlora_jax.weights.tensors import DTYPES, Tensor, open_safetensors, reading, write_safetensors
from longlora_jax.weights.torch_archive import OtherForm
from longlora_jax.weights.torch_files import open_torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,  # Llama 3 keeps its further end-of-turn ids there
)
_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"


# Reading


def load_hf(folder: str, dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """Reads a folder, one file or sharded, into a tree of numpy arrays.

    dtype: a key of DTYPES, or None for the dtype that each weight is stored in. Before anything
    is read, all names, shapes and dtypes are checked; every fault is named in one UserError.
    """
    config, table = open_hf(folder)
    return config, build_params(config, table, dtype)


def open_hf(folder: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the tensors of a folder of safetensors (or of pytorch_model*.bin), not read yet.

    What bitsandbytes quantized there is read dequantized (weights/bnb.py).
    All names, shapes and dtypes are checked against the config; every fault is named in one UserError.
    """
    _refuse_own(folder)
    config = load_config(folder)
    table, faults = _open_files(folder)
    table, damaged = unpacked(table)
    faults += damaged
    if is_quantized(folder) and not faults and not any(tensor.quantization for tensor in table.values()):
        faults.append(
            "config.json says that the weights are quantized by bitsandbytes, and none is: take quantization_config out"
        )
    complete = not faults
    table, odd = settle(config, table)
    if complete:
        faults += odd
    # Where a file cannot be read, that is the reason for what is missing.
    faults += [
        fault
        for fault in table_faults(config, table)
        if complete or not fault.startswith(("missing tensor", "there are"))
    ]
    # One that is named with its cause is not named again.
    faults = [f for f in faults if not (f.startswith("missing tensor") and any(o.startswith(f"{f}: ") for o in odd))]
    refuse(folder, faults)
    return config, table


def _open_files(folder: str) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a folder by name, and what is wrong with its files."""
    for name in (_SAFETENSORS, _TORCH):
        index = f"{name}.index.json"
        if os.path.exists(os.path.join(folder, name)):
            listed: Mapping[str, list[str]] = {name: []}
        elif os.path.exists(os.path.join(folder, index)):
            listed = read_index(os.path.join(folder, index))
        else:
            continue
        return _open_listed(folder, listed)
    raise UserError(f"{folder} has no weights: neither {_SAFETENSORS} nor {_TORCH}, nor the index of either")


def _refuse_own(folder: str) -> None:
    """Raises UserError for a converted checkpoint and for a workdir, whose config.json would be found at fault."""
    own = {"params": "a converted checkpoint", "checkpoints": "the workdir of a run"}
    what = next((what for name, what in own.items() if os.path.isdir(os.path.join(folder, name))), None)
    weights = [name + end for name in (_SAFETENSORS, _TORCH) for end in ("", ".index.json")]
    if what and not any(os.path.isfile(os.path.join(folder, name)) for name in weights):
        raise UserError(
            f"{folder} is {what}, and a Hugging Face folder is needed here: give that of the model, or write one with "
            f"convert_weights.py to-hf {folder} HF_DIR"
        )


def _open_listed(folder: str, listed: Mapping[str, list[str]]) -> tuple[dict[str, Tensor], list[str]]:
    table: dict[str, Tensor] = {}
    faults, absent = [], []
    for name, promised in listed.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            faults.append(f"missing file {name}")
            continue
        try:
            tensors = open_tensor_file(path)
        except UserError as error:
            faults.append(str(error))
            continue
        absent += [(key, name) for key in promised if key not in tensors]
        faults += [f"{key} is in more than one file" for key in sorted(tensors.keys() & table.keys())]
        table |= tensors
    # An index that was not kept up to date may name another file than the one that has a tensor.
    return table, faults + [f"missing tensor {key} in {name}" for key, name in absent if key not in table]


def open_tensor_file(path: str) -> dict[str, Tensor]:
    """The tensors of one file, .safetensors or torch's.

    Raises UserError if it is damaged, in a form that is not read, or a Git LFS pointer.
    """
    refuse_pointer(path)
    opener = open_safetensors if path.endswith(".safetensors") else open_torch
    try:
        return opener(path)
    except OtherForm as error:
        raise UserError(f"{os.path.basename(path)} cannot be read: {error}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{os.path.basename(path)} is damaged or cut off, fetch it again ({error})") from error


def read_index(path: str) -> dict[str, list[str]]:
    """Reads the index of a sharded model: {file: names of its tensors}."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map, fetch it again")
    suffix = ".bin" if os.path.basename(path).startswith(_TORCH) else ".safetensors"
    listed: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # The folder is the user's, but its index may come from anywhere.
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(suffix) or "\0" in file:
            shown = one_line(str(file), 100)
            raise UserError(f"{path} names the file '{shown}', it must be one beside the index, a {suffix}")
        listed.setdefault(file, []).append(name)
    return listed


# Writing


def save_hf(
    folder: str,
    config: ModelConfig,
    params: Params,
    *,
    dtype: str | None = None,
    tokenizer_from: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers reloads: weights, both configs, tokenizer files.

    params: arrays of numpy or jax. dtype: a key of DTYPES, or None to keep each weight's own.
    Raises UserError if the folder exists and is not empty, or if params do not fit the config.
    """
    refuse("these weights cannot be saved", _leaf_faults(config, params))
    table = params_table(config, params)
    if dtype:
        table = cast_table(table, lambda _: DTYPES[dtype])
    write_hf(folder, config, table, tokenizer_from=tokenizer_from, max_shard_bytes=max_shard_bytes)


def write_hf(
    folder: str,
    config: ModelConfig,
    table: Table,
    *,
    tokenizer_from: str | None = None,
    chat: ChatFormat | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """As save_hf, from a table: each tensor is read, written and forgotten; faults are said before that.

    chat: see copy_tokenizer.
    """
    refuse("these weights cannot be saved", list(table_faults(config, table)))
    names = [name for rule in weight_rules(config) for name in rule.names(config.num_hidden_layers)]
    table = to_theirs(config, {name: table[name] for name in names})
    shards = _cut(list(table), table, max_shard_bytes)
    with new_folder(folder) as aside, reading("writing", table.values()) as read:
        write_json(os.path.join(aside, "config.json"), config_to_json(config, widest_dtype(table)))
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else _SAFETENSORS
            part = {name: table[name] for name in shard}
            write_safetensors(os.path.join(aside, file), part, map(read, part.values()))
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in table.values())},
                "weight_map": weight_map,
            }
            write_json(os.path.join(aside, f"{_SAFETENSORS}.index.json"), index)
        generation = {key: getattr(config, key) for key in TOKEN_IDS}
        write_json(os.path.join(aside, GENERATION), {"_from_model_config": True, **generation})
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, aside, chat, window=config.max_position_embeddings)


def widest_dtype(table: Table) -> str:
    """The dtype that holds every weight: transformers loads all of them in the config's one."""
    kinds = {str(tensor.dtype) for tensor in table.values()}
    return kinds.pop() if len(kinds) == 1 else "float32"


def _leaf_faults(config: ModelConfig, params: Params) -> list[str]:
    layers = config.num_hidden_layers
    needed = {r.path: ((layers,) if r.layered else ()) + r.shape for r in weight_rules(config)}
    leaves, faults = dict(flatten(params)), []
    for path, shape in needed.items():
        if path not in leaves:
            faults.append(f"missing {'/'.join(path)}")
        elif tuple(leaves[path].shape) != shape:
            faults.append(f"{'/'.join(path)} has shape {list(leaves[path].shape)}, not {list(shape)}")
        elif leaves[path].dtype.name not in DTYPES:
            faults.append(f"{'/'.join(path)} is {leaves[path].dtype.name}, not one of {', '.join(DTYPES)}")
    for path in sorted(leaves.keys() - needed.keys()):
        advice = ", merge the adapters first" if path[-1].startswith("lora_") else ""
        faults.append(f"unexpected {'/'.join(path)}{advice}")
    return faults


def _cut(names: list[str], table: Table, limit: int) -> list[list[str]]:
    """Cuts the list into shards of at most limit bytes; a larger tensor is a shard of its own."""
    shards: list[list[str]] = [[]]
    room = limit
    for name in names:
        size = table[name].nbytes
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def copy_tokenizer(source: str, target: str, chat: ChatFormat | None = None, *, window: int | None = None) -> list[str]:
    """Copies the tokenizer files that source has, and returns their names.

    window: tokens of the model in target. Where that is not the window of the model in source, limits that the files
    state (model_max_length, max_length) become it, or transformers would cut texts and answers at the old one.

    chat: how the model is asked and what ends its answers, which the files in target then say, its configs among them;
    None: as source says.
    """
    names = [name for name in TOKENIZER_FILES if os.path.isfile(os.path.join(source, name))]
    for name in names:
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    if window is not None and window != _window_of(source):
        _state_window(target, window)
    export_format(target, chat or folder_format(source))
    return names


def _window_of(folder: str) -> int | None:
    try:
        return load_config(folder).max_position_embeddings
    except UserError:  # a folder with a tokenizer alone
        return None


def _state_window(folder: str, window: int) -> None:
    """Writes a window, in tokens, into the files beside the weights that cut by it."""
    for name, key, always in (("tokenizer_config.json", "model_max_length", True), (GENERATION, "max_length", False)):
        path = os.path.join(folder, name)
        content = read_json(path) if os.path.isfile(path) else {}
        if content and (always or content.get(key) is not None) and content.get(key) != window:
            write_json(path, content | {key: window})
