"""PEFT adapters, read: low-rank updates beside a base model, and the weights that were trained whole with them.

Imports neither jax, torch nor peft: a table of the merged model is read tensor by tensor like any other.
"""

import logging
import os
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from longlora_jax.attention.rope import extend_rope
from longlora_jax.config import ATTENTION_TARGETS, MLP_TARGETS, LoraConfig, ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.weights import hf
from longlora_jax.weights.config_faults import refuse
from longlora_jax.weights.families import family_of
from longlora_jax.weights.habits import EMBED, HEAD
from longlora_jax.weights.hf_config import load_config
from longlora_jax.weights.hub import local_folder
from longlora_jax.weights.layouts import our_name, to_ours
from longlora_jax.weights.peft_files import SETTINGS, AdapterFiles, Pair, Rows, read_adapter
from longlora_jax.weights.peft_layouts import pairs_to_ours
from longlora_jax.weights.rules import (
    Params,
    Table,
    build_params,
    cast_table,
    get_leaf,
    merge_table,
    weight_rules,
    with_rows,
)
from longlora_jax.weights.tensors import DTYPES, Tensor

_log = logging.getLogger(__name__)

# What an adapter's own config.json may say otherwise than the base's.
_FREE = ("vocab_size", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_scaling")
_FREE += ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


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
    table = merge_table(opened.table, {name: pair.adapter() for name, pair in opened.pairs.items()})
    table |= {
        (bias := name.removesuffix("weight") + "bias"): _plus(table[bias], pair.bias, pair.lora.scale)
        for name, pair in opened.pairs.items()
        if pair.bias is not None
    }
    table = cast_table(table, opened.kinds.__getitem__)
    return opened.config, table, opened.tokenizer_dir


def load_peft(
    folder: str, *, base: str | None = None, window: int | None = None, rope_type: str = "linear"
) -> tuple[ModelConfig, LoraConfig, Params]:
    """Reads what open_peft opens with the adapters apart: (config, lora, param tree of numpy arrays).

    lora_a [L, *in, R] and lora_b [L, R, *out], float32, lie beside their kernels, zeros where a layer has none; other
    weights have the dtype of their file. Raises UserError also if ranks or scales differ, if embedding or lm_head are
    adapted, or if it is DoRA or has biases of its own.
    """
    config, table, _, pairs, _ = _open(folder, base, window, rope_type)
    loras = [pair.lora for pair in pairs.values()]
    special = any(pair.magnitude is not None or pair.bias is not None for pair in pairs.values())
    if len({(lora.rank, lora.alpha) for lora in loras}) > 1 or special or {HEAD, EMBED} & pairs.keys():
        raise UserError(
            f"{folder} adapts the embedding or lm_head, has DoRA's magnitudes or biases, or gives its modules "
            "different ranks or scales: there is one LoraConfig for all projections of the layers, so merge it with "
            "convert_weights.py from-peft"
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


def _plus(base: Tensor, update: Tensor, scale: float) -> Tensor:
    def read() -> np.ndarray:
        return _float32(base) + np.float32(scale) * _float32(update)

    return Tensor(DTYPES["float32"], base.shape, read)


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
    theirs, odd = to_ours(config, files.whole)
    rows = {our_name(family_of(config), name): given for name, given in files.rows.items()}
    files = files._replace(pairs=pairs_to_ours(config, files.pairs), whole=theirs, rows=rows, faults=files.faults + odd)
    own, broken = None, ""
    try:
        own = load_config(folder) if os.path.isfile(os.path.join(folder, "config.json")) else None
    except UserError as error:
        broken = str(error)
    if own is not None and own.vocab_size > config.vocab_size:
        config, table, files = _with_more_rows(own.vocab_size, config, table, files)
    config, whole = _fit(config, table, files)
    faults = files.faults + _tensor_faults(config, files, whole)
    try:
        config = config if broken else _extend(folder, config, own, window, rope_type)
    except UserError as error:
        broken = str(error)
    faults += [broken] * bool(broken)
    refuse(folder, faults)
    kinds = {name: table.get(name, table[EMBED]).dtype for name in table | whole}
    has_tokenizer = any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer.model"))
    return _Opened(config, table | whole, kinds, files.pairs, folder if has_tokenizer else base_folder)


def _with_more_rows(
    rows: int, config: ModelConfig, base: Table, files: AdapterFiles
) -> tuple[ModelConfig, dict[str, Tensor], AdapterFiles]:
    """Config, base and adapter with as many rows of tokens as the adapter's config.json names, more than the base has.

    Rows that neither of them holds are the mean of the others, which is what tokens that a run adds begin at.
    """
    config = replace(config, vocab_size=rows)
    held = files.whole.get(EMBED, base[EMBED]).shape[:1]
    if held != (rows,):
        _log.warning(f"config.json names {rows} rows of tokens, {sum(held)} are there: the others are their mean")
    return config, with_rows(config, base), files._replace(whole=with_rows(config, files.whole))


def _fit(config: ModelConfig, base: Table, files: AdapterFiles) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config of base and adapter together, and what takes the place of the base's tensors.

    A tied model stays tied unless embedding and output projection come out different, as PEFT computes them. More rows
    of the embedding make a larger vocabulary.
    """
    whole = dict(files.whole)
    before = whole.get(EMBED, base[EMBED])
    if EMBED in files.rows:
        whole[EMBED] = _with_rows(before, files.rows[EMBED])
    if config.tie_word_embeddings:
        embed = whole.get(EMBED, base[EMBED])
        # PEFT's trained rows of a tied embedding are the output projection's as well, unless that has its own.
        head = whole.pop(HEAD, base[EMBED] if files.splits_tie else before if HEAD in files.rows else embed)
        head = _with_rows(head, files.rows[HEAD]) if HEAD in files.rows else head
        if {HEAD, EMBED} & files.pairs.keys() or not _is_same(head, embed):
            _log.info("embedding and output projection come out different: the model is no longer tied")
            config = replace(config, tie_word_embeddings=False)
            whole[HEAD] = head
    elif HEAD in files.rows:
        whole[HEAD] = _with_rows(whole.get(HEAD, base[HEAD]), files.rows[HEAD])
    rows = whole[EMBED].shape[0] if EMBED in whole and whole[EMBED].shape else 0
    if rows > config.vocab_size:
        config = replace(config, vocab_size=rows)
        if not config.tie_word_embeddings and HEAD not in files.whole:
            whole[HEAD] = _grown(whole[HEAD] if HEAD in whole else base[HEAD], rows)
    return config, whole


def _with_rows(matrix: Tensor, trained: Rows) -> Tensor:
    """A matrix [V, D] with some rows replaced; the same one where they do not fit, which is said elsewhere."""
    numbers, rows = trained
    if len(matrix.shape) != 2 or rows.shape != (len(numbers), matrix.shape[1]):
        return matrix
    if not numbers or max(numbers) >= matrix.shape[0]:
        return matrix

    def read() -> np.ndarray:
        array = np.array(matrix.read())
        array[numbers] = rows.read().astype(array.dtype)
        return array

    return Tensor(matrix.dtype, matrix.shape, read)


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


def _tensor_faults(config: ModelConfig, files: AdapterFiles, whole: Table) -> list[str]:
    rules = {name: rule for rule in weight_rules(config) for name in rule.names(config.num_hidden_layers)}
    faults = []
    for name, (numbers, rows) in files.rows.items():
        shape = (config.vocab_size, config.hidden_size)
        if name not in (EMBED, HEAD) or rows.shape[1:] != shape[1:] or max(numbers, default=0) >= shape[0]:
            last = max(numbers, default=0)
            faults.append(f"{name} has trained rows {list(rows.shape)} up to number {last}, it is {list(shape)}")
    for name, tensor in whole.items():
        if name not in rules:
            faults.append(f"{name} is no weight of the base model")
        elif tensor.shape != rules[name].hf_shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, it must be {list(rules[name].hf_shape)}")
    for name, pair in files.pairs.items():
        if name not in rules or not (rules[name].input_axes or name == EMBED):
            faults.append(f"{name} is adapted, but no projection of the base model")
        elif pair.shape != rules[name].hf_shape:
            faults.append(f"{name} is adapted as {list(pair.shape)}, it is {list(rules[name].hf_shape)}")
        elif pair.bias is not None and name.removesuffix("weight") + "bias" not in rules:
            faults.append(f"{name} is adapted with a bias (lora_bias), but has none in the base model to add it to")
    return faults


def _extend(
    folder: str, config: ModelConfig, own: ModelConfig | None, window: int | None, rope_type: str
) -> ModelConfig:
    """The config with the rope and the window that the adapter was trained for; own: its config.json's, if it has one.

    Raises UserError if that is of another model.
    """
    if own is not None:
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
        unscaled=family_of(config).rope_type,
    )
    return replace(config, rope_scaling=scaling, max_position_embeddings=max(window, config.max_position_embeddings))
