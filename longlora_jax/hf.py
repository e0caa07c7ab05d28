"""Hugging Face folders: weight names and layouts both ways, safetensors in and out.

Imports neither jax nor torch, so that it works in a worker process as well.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.files import new_folder, read_json, write_json
from longlora_jax.hf_config import TOKEN_IDS, config_to_json, load_config, refuse

# generation_config.json is among them because Llama 3 keeps its further end-of-turn ids there.
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
    "generation_config.json",
)
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_STORED = {
    "F32": DTYPES["float32"],
    "BF16": DTYPES["bfloat16"],
    "F16": DTYPES["float16"],
}
Params = dict[str, Any]


# Weight rules


class Rule(NamedTuple):
    """One weight: Hugging Face's name ("{}" stands for the layer) and ours, and both shapes.

    shape is without the layer axis. A kernel is [out, in] there and [in, out] here, with the
    heads split; everything else only splits its heads.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    is_kernel: bool = False

    def names(self, layers: int) -> list[str]:
        """Hugging Face's names of this weight, one a layer."""
        return [self.name.format(i) for i in range(layers)] if "{}" in self.name else [self.name]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """One tensor of hf_shape in our layout."""
        return (array.T if self.is_kernel else array).reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """One layer of shape in Hugging Face's layout."""
        return array.reshape(self.hf_shape[::-1]).T if self.is_kernel else array.reshape(self.hf_shape)


def weight_rules(config: ModelConfig) -> list[Rule]:
    """The one table of weights, for both directions."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def path(name: str, leaf: str) -> tuple[str, ...]:
        return (*(part for part in name.split(".") if part not in ("model", "{}")), leaf)

    def scale(name: str) -> list[Rule]:
        return [Rule(f"{name}.weight", path(name, "scale"), (d,), (d,))]

    def linear(name: str, inputs: tuple, outputs: tuple, has_bias: bool = False) -> list[Rule]:
        size = math.prod(outputs)
        hf_shape = (size, math.prod(inputs))
        kernel = Rule(f"{name}.weight", path(name, "kernel"), inputs + outputs, hf_shape, True)
        bias = Rule(f"{name}.bias", path(name, "bias"), outputs, (size,))
        return [kernel, bias] if has_bias else [kernel]

    embed = "model.embed_tokens"
    attn, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    return [
        Rule(f"{embed}.weight", path(embed, "embedding"), (v, d), (v, d)),
        *scale("model.layers.{}.input_layernorm"),
        *linear(f"{attn}.q_proj", (d,), (n, h), config.attention_bias),
        *linear(f"{attn}.k_proj", (d,), (k, h), config.attention_bias),
        *linear(f"{attn}.v_proj", (d,), (k, h), config.attention_bias),
        *linear(f"{attn}.o_proj", (n, h), (d,), config.attention_bias),
        *scale("model.layers.{}.post_attention_layernorm"),
        *linear(f"{mlp}.gate_proj", (d,), (f,), config.mlp_bias),
        *linear(f"{mlp}.up_proj", (d,), (f,), config.mlp_bias),
        *linear(f"{mlp}.down_proj", (f,), (d,), config.mlp_bias),
        *scale("model.norm"),
        *([] if config.tie_word_embeddings else linear("lm_head", (d,), (v,))),
    ]


def shape_faults(rules: list[Rule], layers: int, found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Compares the tensors of a file, {Hugging Face name: shape}, with the ones that are needed."""
    needed = {name: rule.hf_shape for rule in rules for name in rule.names(layers)}
    for name, shape in needed.items():
        if name not in found:
            yield f"missing tensor {name}"
        elif found[name] != shape:
            yield f"{name} has shape {list(found[name])}, it must be {list(shape)}"
    for name in found:
        if name not in needed:
            yield f"unexpected tensor {name}"


def build_params(
    rules: list[Rule],
    layers: int,
    dtypes: Mapping[str, np.dtype],
    read: Callable[[str], np.ndarray],
) -> Params:
    """Fills the param tree weight by weight; read(name) gives a tensor in Hugging Face's layout.

    A stacked weight whose layers differ in dtype becomes float32, which holds all of them exactly.
    """
    params: Params = {}
    for rule in rules:
        names = rule.names(layers)
        stored = {dtypes[name] for name in names}
        dtype = stored.pop() if len(stored) == 1 else DTYPES["float32"]
        rows = np.empty((len(names), *rule.shape), dtype)
        for row, name in zip(rows, names, strict=True):
            row[...] = _cast(name, rule.to_ours(read(name)), dtype)
        parent = params
        for key in rule.path[:-1]:
            parent = parent.setdefault(key, {})
        parent[rule.path[-1]] = rows if "{}" in rule.name else rows[0]
    return params


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    if dtype == np.float16 and array.dtype != dtype and np.isinf(result).any():
        raise UserError(f"{name} has values beyond float16's 65504: choose bfloat16 or float32")
    return result


# Reading


def load_hf(folder: str, dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """Reads a folder of safetensors, one file or sharded, into a tree of numpy arrays.

    dtype: a key of DTYPES, or None for the dtype that each weight is stored in. Before anything
    is read, all names, shapes and dtypes are checked; every fault is named in one UserError.
    """
    config = load_config(folder)
    layers, rules = config.num_hidden_layers, weight_rules(config)
    with ExitStack() as stack:
        tensors, faults = _open_tensors(folder, stack)
        complete = not faults
        # Old checkpoints carry the frequencies; they follow from the config.
        tensors = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
        slices = {name: file.get_slice(name) for name, file in tensors.items()}
        stored = {name: part.get_dtype() for name, part in slices.items()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            faults += _tied_faults(tensors, shapes, stored)
            del shapes["lm_head.weight"]
        found = shape_faults(rules, layers, shapes)
        # Where a file cannot be read, that is the reason for what is missing.
        faults += [text for text in found if complete or not text.startswith("missing tensor")]
        faults += [
            f"{name} is stored as {kind}, it must be one of {', '.join(_STORED)}"
            for name, kind in stored.items()
            if kind not in _STORED
        ]
        refuse(folder, faults)
        dtypes = {n: DTYPES[dtype] if dtype else _STORED[kind] for n, kind in stored.items()}
        return config, build_params(rules, layers, dtypes, lambda n: tensors[n].get_tensor(n))


def _open_tensors(folder: str, stack: ExitStack) -> tuple[dict[str, safe_open], list[str]]:
    """Maps each tensor name to its open file, and lists the files that cannot be opened."""
    single, index = "model.safetensors", "model.safetensors.index.json"
    if os.path.exists(os.path.join(folder, single)):
        listed: dict[str, list[str]] = {single: []}
    elif os.path.exists(os.path.join(folder, index)):
        listed = _read_index(os.path.join(folder, index))
    else:
        old = any(name.endswith(".bin") for name in os.listdir(folder))
        advice = ": save the model again with save_pretrained(), it holds .bin files" if old else ""
        raise UserError(f"{folder} has neither {single} nor {index}{advice}")
    tensors: dict[str, safe_open] = {}
    faults = []
    for name, promised in listed.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            faults.append(f"missing file {name}")
            continue
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            faults.append(f"{name} is damaged or cut off, fetch it again ({error})")
            continue
        keys = set(file.keys())
        faults += [f"missing tensor {key} in {name}" for key in promised if key not in keys]
        faults += [f"{key} is in more than one file" for key in sorted(keys & tensors.keys())]
        tensors |= dict.fromkeys(keys, file)
    return tensors, faults


def _read_index(path: str) -> dict[str, list[str]]:
    """Reads the index of a sharded model: {file: names of its tensors}."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map, fetch it again")
    listed: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # The folder is the user's, but its index may come from anywhere.
        if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
            raise UserError(f"{path} names the file {file!r}, it must be one beside the index")
        listed.setdefault(file, []).append(name)
    return listed


def _tied_faults(tensors: dict, shapes: dict, stored: dict) -> list[str]:
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if embed not in tensors:
        return []
    if shapes[head] == shapes[embed] and stored[head] == stored[embed] and stored[head] in _STORED:
        pair = (tensors[name].get_tensor(name).view(np.uint8) for name in (head, embed))
        if np.array_equal(*pair):
            return []
    return [f"tie_word_embeddings is true but {head} is not {embed}: set it to false"]


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
    layers = config.num_hidden_layers
    leaves = dict(_flatten(params))
    rules = weight_rules(config)
    refuse("these weights cannot be saved", list(_leaf_faults(rules, layers, leaves)))
    kinds = {path: DTYPES[dtype or leaf.dtype.name] for path, leaf in leaves.items()}
    entries = [(name, rule, i) for rule in rules for i, name in enumerate(rule.names(layers))]
    sizes = {name: math.prod(r.shape) * kinds[r.path].itemsize for name, r, _ in entries}
    shards = _cut(entries, sizes, max_shard_bytes)
    with new_folder(folder) as aside:
        config_path = os.path.join(aside, "config.json")
        write_json(config_path, config_to_json(config, dtype or widest_dtype(params)))
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = file if len(shards) > 1 else "model.safetensors"
            arrays = {}
            for name, rule, i in shard:
                leaf = leaves[rule.path]
                array = rule.to_hf(np.asarray(leaf[i] if "{}" in rule.name else leaf))
                arrays[name] = np.ascontiguousarray(_cast(name, array, kinds[rule.path]))
            save_file(arrays, os.path.join(aside, file), metadata={"format": "pt"})
            # safetensors makes files that only their owner may read.
            shutil.copymode(config_path, os.path.join(aside, file))
            weight_map |= dict.fromkeys(arrays, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_json(os.path.join(aside, "model.safetensors.index.json"), index)
        generation = {key: getattr(config, key) for key in TOKEN_IDS}
        write_json(
            os.path.join(aside, "generation_config.json"),
            {"_from_model_config": True, **generation},
        )
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, aside)


def widest_dtype(params: Params) -> str:
    """The dtype that holds every weight: transformers loads all of them in the config's one."""
    names = {leaf.dtype.name for _, leaf in _flatten(params)}
    return names.pop() if len(names) == 1 else "float32"


def _flatten(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _leaf_faults(rules: list[Rule], layers: int, leaves: Mapping[tuple, Any]) -> Iterator[str]:
    needed = {r.path: ((layers,) if "{}" in r.name else ()) + r.shape for r in rules}
    for path, shape in needed.items():
        if path not in leaves:
            yield f"missing {'/'.join(path)}"
        elif tuple(leaves[path].shape) != shape:
            yield f"{'/'.join(path)} has shape {list(leaves[path].shape)}, not {list(shape)}"
        elif leaves[path].dtype.name not in DTYPES:
            yield f"{'/'.join(path)} is {leaves[path].dtype.name}, not one of {', '.join(DTYPES)}"
    for path in sorted(leaves.keys() - needed.keys()):
        advice = ", merge the adapters first" if path[-1].startswith("lora_") else ""
        yield f"unexpected {'/'.join(path)}{advice}"


def _cut(entries: list, sizes: Mapping[str, int], limit: int) -> list[list]:
    """Cuts the list into shards of at most limit bytes; a larger tensor is a shard of its own."""
    shards: list[list] = [[]]
    room = limit
    for entry in entries:
        if shards[-1] and sizes[entry[0]] > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= sizes[entry[0]]
    return shards


def copy_tokenizer(source: str, target: str) -> list[str]:
    """Copies the tokenizer files that source has; returns their names."""
    names = [name for name in TOKENIZER_FILES if os.path.isfile(os.path.join(source, name))]
    for name in names:
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    return names
