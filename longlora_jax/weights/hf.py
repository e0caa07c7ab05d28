"""Hugging Face folders, in and out, tensor by tensor.

Imports neither jax nor torch, so that it works in a worker process as well.
"""

import os
import shutil
from collections.abc import Mapping

import numpy as np

from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.files import new_folder, one_line, read_json, write_json
from longlora_jax.weights.hf_config import TOKEN_IDS, config_to_json, load_config, refuse
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
from longlora_jax.weights.torch_files import open_torch

GENERATION = "generation_config.json"
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

    All names, shapes and dtypes are checked against the config; every fault is named in one UserError.
    """
    config = load_config(folder)
    table, faults = _open_files(folder)
    complete = not faults
    # Old checkpoints carry the frequencies; they follow from the config.
    table = {name: tensor for name, tensor in table.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in table:
        faults += _tied_faults(table)
        del table["lm_head.weight"]
    # Where a file cannot be read, that is the reason for what is missing.
    faults += [
        fault
        for fault in table_faults(config, table)
        if complete or not fault.startswith(("missing tensor", "there are"))
    ]
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


def _open_listed(folder: str, listed: Mapping[str, list[str]]) -> tuple[dict[str, Tensor], list[str]]:
    table: dict[str, Tensor] = {}
    faults = []
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
        faults += [f"missing tensor {key} in {name}" for key in promised if key not in tensors]
        faults += [f"{key} is in more than one file" for key in sorted(tensors.keys() & table.keys())]
        table |= tensors
    return table, faults


def open_tensor_file(path: str) -> dict[str, Tensor]:
    """The tensors of one file, .safetensors or torch's; raises UserError if it is damaged."""
    opener = open_safetensors if path.endswith(".safetensors") else open_torch
    try:
        return opener(path)
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


def _tied_faults(table: Table) -> list[str]:
    head, embed = table["lm_head.weight"], table.get("model.embed_tokens.weight")
    if embed is None or (head.dtype, head.shape) == (embed.dtype, embed.shape) and _same_bytes(head, embed):
        return []
    return ["tie_word_embeddings is true but lm_head.weight is not model.embed_tokens.weight: set it to false"]


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if not isinstance(one.dtype, np.dtype):
        return True  # said by table_faults
    first, second = (np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8) for tensor in (one, other))
    return np.array_equal(first, second)


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
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """As save_hf, from a table: each tensor is read, written and forgotten; faults are said before that."""
    refuse("these weights cannot be saved", list(table_faults(config, table)))
    names = [name for rule in weight_rules(config) for name in rule.names(config.num_hidden_layers)]
    shards = _cut(names, table, max_shard_bytes)
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
            copy_tokenizer(tokenizer_from, aside)


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


def copy_tokenizer(source: str, target: str) -> list[str]:
    """Copies the tokenizer files that source has; returns their names."""
    names = [name for name in TOKENIZER_FILES if os.path.isfile(os.path.join(source, name))]
    for name in names:
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    return names
