"""PEFT adapters, in and out: low-rank updates beside a base model, and the weights that were trained whole with them.

Imports neither jax, torch nor peft: a table of the merged model is read tensor by tensor like any other.
"""

import logging
import os
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from longlora_jax.attention.rope import extend_rope
from longlora_jax.config import ATTENTION_TARGETS, MLP_TARGETS, LoraConfig, ModelConfig
from longlora_jax.data.chat import ChatFormat
from longlora_jax.errors import UserError
from longlora_jax.files import new_folder, write_json
from longlora_jax.weights import hf
from longlora_jax.weights.habits import EMBED, HEAD
from longlora_jax.weights.hf_config import config_to_json, load_config, refuse
from longlora_jax.weights.hub import local_folder
from longlora_jax.weights.peft_files import PREFIX, SETTINGS, WEIGHTS, AdapterFiles, Pair, read_adapter
from longlora_jax.weights.rules import (
    Adapter,
    Params,
    Table,
    adapters_of,
    build_params,
    cast_table,
    flatten,
    get_leaf,
    merge_table,
    params_table,
    weight_rules,
)
from longlora_jax.weights.tensors import DTYPES, Tensor, reading, write_safetensors

_log = logging.getLogger(__name__)

_README = """# Adapter of {base}

It was trained for a window of {window} tokens. The files of PEFT do not say how the rotary embeddings were scaled for \
that: `config.json` does. Give it to the base model, or the answers will be garbage:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(".")  # this folder
model = AutoModelForCausalLM.from_pretrained({source}, config=config)
model = PeftModel.from_pretrained(model, ".")
```
"""
# What an adapter's own config.json may say otherwise than the base's.
_FREE = ("vocab_size", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_scaling")
_FREE += ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


# Writing


def save_peft(
    folder: str,
    config: ModelConfig,
    lora: LoraConfig,
    params: Params,
    *,
    base: str,
    tokenizer_from: str | None = None,
    chat: ChatFormat | None = None,
) -> None:
    """Writes an adapter for PEFT 0.6 and later (rslora: 0.8); matrices in float32, other weights in their own dtype.

    params: the trained partition of a param tree, numpy or jax arrays: lora_a [L, *in, R] and lora_b [L, R, *out] of
    every target and, if they were trained, embedding, norms and lm_head, PEFT's modules_to_save. base: folder or name
    of the model that was adapted.
    PEFT's files have no place for rope scaling and window: they go into config.json, and README.md tells how to load
    both. Of a tied model a trained embedding is written twice, once as lm_head, since PEFT would otherwise keep the
    base's embedding there; ensure_weight_tying, for which PEFT has it since 0.18, is unknown to older ones.
    chat: see hf.copy_tokenizer. Raises UserError if the folder holds something, or if params do not fit config and
    lora.
    """
    refuse("this adapter cannot be saved", _leaf_faults(config, lora, params))
    whole = params_table(config, params)
    if config.tie_word_embeddings and EMBED in whole:
        whole[HEAD] = whole[EMBED]
    tensors = {PREFIX + name: tensor for name, tensor in whole.items()}
    for name, adapter in adapters_of(config, params, lora.scale).items():
        for letter, array in (("A", adapter.a), ("B", adapter.b)):
            key = f"{PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight"
            tensors[key] = Tensor(array.dtype, array.shape, lambda array=array: array)
    name, _, revision = (os.path.abspath(base), "", "") if os.path.isdir(base) else base.partition("@")
    source = f"{name!r}, revision={revision!r}" if revision else repr(name)
    # With no dtype named, transformers loads the base in its own.
    own = {key: value for key, value in config_to_json(config, "").items() if not key.endswith("dtype")}
    with new_folder(folder) as aside, reading("writing", tensors.values()) as read:
        write_json(os.path.join(aside, SETTINGS), _settings(lora, name, revision, list(whole)))
        write_json(os.path.join(aside, "config.json"), own)
        with open(os.path.join(aside, "README.md"), "w", encoding="utf-8") as file:
            file.write(_README.format(base=name, source=source, window=config.max_position_embeddings))
        write_safetensors(os.path.join(aside, WEIGHTS[0]), tensors, map(read, tensors.values()))
        if tokenizer_from is not None:
            hf.copy_tokenizer(tokenizer_from, aside, chat, window=config.max_position_embeddings)


def _settings(lora: LoraConfig, base: str, revision: str, whole: list[str]) -> dict[str, Any]:
    """The content of adapter_config.json; whole: names of the weights that are no matrices of LoRA."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(lora.targets),
        "modules_to_save": list(dict.fromkeys(name.split(".")[-2] for name in whole)) or None,
    }
    # PEFT 0.6 and 0.7 fail over a key that came later.
    return settings | ({"use_rslora": True} if lora.rslora else {})


def _leaf_faults(config: ModelConfig, lora: LoraConfig, params: Params) -> list[str]:
    leaves, layers = dict(flatten(params)), config.num_hidden_layers
    needed: dict[tuple[str, ...], tuple[int, ...]] = {}
    allowed: dict[tuple[str, ...], tuple[int, ...]] = {}
    for rule in weight_rules(config):
        if rule.input_axes and rule.path[-2] in lora.targets:
            inputs, outputs = rule.shape[: rule.input_axes], rule.shape[rule.input_axes :]
            needed[(*rule.path[:-1], "lora_a")] = (layers, *inputs, lora.rank)
            needed[(*rule.path[:-1], "lora_b")] = (layers, lora.rank, *outputs)
        elif rule.path[-1] in ("embedding", "scale") or rule.path[0] == "lm_head":
            allowed[rule.path] = (layers, *rule.shape) if rule.layered else rule.shape
    if any(path[-1] == "scale" for path in leaves):  # PEFT's "norm" stands for every module whose name ends so
        needed |= {path: shape for path, shape in allowed.items() if path[-1] == "scale"}
    faults = [f"missing {'/'.join(path)}" for path in needed if path not in leaves]
    for path, leaf in leaves.items():
        name, shape = "/".join(path), (allowed | needed).get(path)
        if shape is None:
            faults.append(f"unexpected {name}, give what was trained alone: partition(params, mask)[0]")
        elif tuple(leaf.shape) != shape:
            faults.append(f"{name} has shape {list(leaf.shape)}, not {list(shape)}")
        elif leaf.dtype.name not in DTYPES:
            faults.append(f"{name} is {leaf.dtype.name}, not one of {', '.join(DTYPES)}")
    return faults


# Reading


class _Opened(NamedTuple):
    """An adapter over its base, not merged: table has the base's tensors and, in their place, those trained whole."""

    config: ModelConfig
    table: dict[str, Tensor]
    kinds: dict[str, Any]  # the dtype that each has in the base
    pairs: dict[str, Pair]
    tokenizer_dir: str


def open_peft(
    folder: str, *, base: str | None = None, window: int | None = None, rope_type: str = "linear"
) -> tuple[ModelConfig, dict[str, Tensor], str]:
    """Opens an adapter merged into its base: (config, tensors, folder of the tokenizer).

    folder, base: folders or names of the hub; base None: the one that adapter_config.json names. A tensor is merged
    when it is read: summed in float32, rounded once to the base's dtype. The rope is that of config.json beside the
    adapter, else the base's; window, in tokens, extends it from the original window by rope_type (linear: as the
    original project did). Reads what PEFT writes, and the original project's artefacts, whose embedding may have more
    rows than the base's. Raises UserError, naming every fault.
    """
    opened = _open(folder, base, window, rope_type)
    adapters = {n: Adapter(_float32(p.a), _float32(p.b), p.lora.scale) for n, p in opened.pairs.items()}
    table = cast_table(merge_table(opened.table, adapters), opened.kinds.__getitem__)
    return opened.config, table, opened.tokenizer_dir


def load_peft(
    folder: str, *, base: str | None = None, window: int | None = None, rope_type: str = "linear"
) -> tuple[ModelConfig, LoraConfig, Params]:
    """Reads what open_peft opens with the adapters apart: (config, lora, param tree of numpy arrays).

    lora_a [L, *in, R] and lora_b [L, R, *out], float32, lie beside their kernels, zeros where a layer has none; other
    weights have the dtype of their file. Raises UserError also if ranks or scales differ or lm_head is adapted.
    """
    config, table, _, pairs, _ = _open(folder, base, window, rope_type)
    loras = [pair.lora for pair in pairs.values()]
    if len({(lora.rank, lora.alpha) for lora in loras}) > 1 or HEAD in pairs:
        raise UserError(
            f"{folder} adapts lm_head, or gives its modules different ranks or scales: there is one LoraConfig for all "
            "projections of the layers, so merge it with convert_weights.py from-peft"
        )
    params = build_params(config, table)
    for rule in weight_rules(config):
        names = rule.names(config.num_hidden_layers)
        if not any(name in pairs for name in names):
            continue
        inputs, outputs = rule.shape[: rule.input_axes], rule.shape[rule.input_axes :]
        a = np.zeros((len(names), *inputs, loras[0].rank), np.float32)
        b = np.zeros((len(names), loras[0].rank, *outputs), np.float32)
        for i, name in enumerate(names):
            if name in pairs:
                a[i] = _float32(pairs[name].a).T.reshape(a.shape[1:])
                b[i] = _float32(pairs[name].b).T.reshape(b.shape[1:])
        get_leaf(params, rule.path[:-1]).update(lora_a=a, lora_b=b)
    found = {target for lora in loras for target in lora.targets}
    targets = tuple(name for name in ATTENTION_TARGETS + MLP_TARGETS if name in found)
    return config, replace(loras[0], targets=targets), params


def _float32(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.read(), np.float32)


def _open(folder: str, base: str | None, window: int | None, rope_type: str) -> _Opened:
    folder = local_folder(folder, what="the folder of a PEFT adapter")
    files = read_adapter(folder)
    try:
        name = base or files.base
        if not name:
            raise UserError(f"{SETTINGS} does not name it, so give it with --base")
        base_folder = local_folder(name, what="with --base the folder of the model that was adapted")
        config, table = hf.open_hf(base_folder)
    except UserError as error:
        refuse(folder, [*files.faults, f"its base model: {error}"])
        raise
    config, whole = _fit(config, table, files)
    faults = files.faults + _tensor_faults(config, files.pairs, whole)
    try:
        config = _extend(folder, config, window, rope_type)
    except UserError as error:
        faults.append(str(error))
    refuse(folder, faults)
    kinds = {name: table.get(name, table[EMBED]).dtype for name in table | whole}
    has_tokenizer = any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer.model"))
    return _Opened(config, table | whole, kinds, files.pairs, folder if has_tokenizer else base_folder)


def _fit(config: ModelConfig, base: Table, files: AdapterFiles) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config of base and adapter together, and what takes the place of the base's tensors.

    A tied model stays tied unless embedding and output projection come out different, as PEFT computes them. More rows
    of the embedding make a larger vocabulary.
    """
    whole = dict(files.whole)
    if config.tie_word_embeddings:
        embed = whole.get(EMBED, base[EMBED])
        head = whole.pop(HEAD, base[EMBED] if files.splits_tie else embed)
        if HEAD in files.pairs or not _is_same(head, embed):
            _log.info("embedding and output projection come out different: the model is no longer tied")
            config = replace(config, tie_word_embeddings=False)
            whole[HEAD] = head
    rows = whole[EMBED].shape[0] if EMBED in whole and whole[EMBED].shape else 0
    if rows > config.vocab_size:
        config = replace(config, vocab_size=rows)
        if not config.tie_word_embeddings and HEAD not in files.whole:
            whole[HEAD] = _grown(whole[HEAD] if HEAD in whole else base[HEAD], rows)
    return config, whole


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and np.array_equal(one.read(), other.read()))


def _grown(head: Tensor, rows: int) -> Tensor:
    """An output projection [V, D] with more rows, each the mean of the others.

    So the original project made the row of its [PAD], whose lm_head it did not save: that logit is the mean of all
    others, and never the largest.
    """

    def read() -> np.ndarray:
        array = head.read()
        mean = array.mean(axis=0, keepdims=True, dtype=np.float64).astype(array.dtype)
        return np.concatenate([array, np.repeat(mean, rows - len(array), axis=0)])

    return Tensor(head.dtype, (rows, *head.shape[1:]), read)


def _tensor_faults(config: ModelConfig, pairs: dict[str, Pair], whole: dict[str, Tensor]) -> list[str]:
    rules = {name: rule for rule in weight_rules(config) for name in rule.names(config.num_hidden_layers)}
    faults = []
    for name, tensor in whole.items():
        if name not in rules:
            faults.append(f"{name} is no weight of the base model")
        elif tensor.shape != rules[name].hf_shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, it must be {list(rules[name].hf_shape)}")
    for name, pair in pairs.items():
        shape = (pair.b.shape[0], pair.a.shape[1])
        if name not in rules or not rules[name].input_axes:
            faults.append(f"{name} is adapted, but no projection of the base model")
        elif shape != rules[name].hf_shape:
            faults.append(f"{name} is adapted as {list(shape)}, it is {list(rules[name].hf_shape)}")
    return faults


def _extend(folder: str, config: ModelConfig, window: int | None, rope_type: str) -> ModelConfig:
    """The config with the rope and the window that the adapter was trained for."""
    if os.path.isfile(os.path.join(folder, "config.json")):
        own = load_config(folder)
        wrong = [
            f.name for f in fields(config) if f.name not in _FREE and getattr(own, f.name) != getattr(config, f.name)
        ]
        if wrong:
            raise UserError(f"config.json is of another model than the base: other {', '.join(wrong)}")
        config = replace(own, vocab_size=config.vocab_size, tie_word_embeddings=config.tie_word_embeddings)
    elif window is None:
        _log.warning(
            f"{folder} does not say its window: the model keeps the {config.max_position_embeddings} tokens of its "
            "base, give --window if it was trained for more"
        )
    if window is None:
        return config
    scaling = extend_rope(
        scaling=config.rope_scaling,
        max_position_embeddings=config.max_position_embeddings,
        seq_len=window,
        rope_type=rope_type,
    )
    return replace(config, rope_scaling=scaling, max_position_embeddings=max(window, config.max_position_embeddings))
