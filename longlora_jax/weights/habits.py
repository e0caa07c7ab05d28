"""Habits of those who save models: other names, buffers among the weights, a tied matrix under its other name.

What means the same is read the same; what is left over is named with its cause.
"""

import logging
import re
from collections.abc import Mapping

import numpy as np

from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.layouts import to_ours
from longlora_jax.weights.rules import Table, weight_rules
from longlora_jax.weights.tensors import DTYPES, Tensor

_log = logging.getLogger(__name__)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# They follow from the config, or mask what attention masks anyway.
_BUFFERS = re.compile(
    r".*\.rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)|.*\.(self_attn|attention)\.(bias|masked_bias|mask)"
    r"|(.*\.)?(position_ids|causal_mask|masked_bias)"
)
_WRAPPERS = ("module.", "_orig_mod.")  # of torch's DataParallel and torch.compile
_BARE = re.compile(r"(layers\.\d+|embed_tokens|norm)\..+")  # as LlamaModel without its head has them
_MOST_BIAS = 1 << 24  # elements


def without_buffers(table: Table) -> dict[str, Tensor]:
    """The table without what old checkpoints carry beside the weights."""
    return {name: tensor for name, tensor in table.items() if not _BUFFERS.fullmatch(name)}


def plain_names(table: Table) -> dict[str, Tensor]:
    """The table under LlamaForCausalLM's names: without wrappers, with `model.` where it was left out."""
    prefix = ""
    while wrapper := next((w for w in _WRAPPERS if all(n.startswith(prefix + w) for n in table) and table), None):
        prefix += wrapper
    plain = {name.removeprefix(prefix): tensor for name, tensor in table.items()}
    if any(name.startswith("model.") for name in plain):
        return plain
    return {f"model.{name}" if _BARE.fullmatch(name) else name: tensor for name, tensor in plain.items()}


def settle(config: ModelConfig, table: Table) -> tuple[dict[str, Tensor], list[str]]:
    """The table that a config asks for, out of one that says the same in another way; and what it says otherwise."""
    table, faults = to_ours(config, plain_names(without_buffers(table)))
    if config.tie_word_embeddings and HEAD in table:
        if EMBED not in table:  # saved under its other name
            table = {**table, EMBED: table[HEAD]}
        elif not _is_same(table[HEAD], table[EMBED]):
            faults.append(
                "tie_word_embeddings is true but lm_head.weight is not model.embed_tokens.weight: set it to false"
            )
        del table[HEAD]
    elif HEAD not in table and EMBED in table and not config.tie_word_embeddings:
        faults.append(
            "missing tensor lm_head.weight: it was saved without its output projection (LlamaModel alone); save "
            "LlamaForCausalLM, or set tie_word_embeddings to true if it has the embedding's"
        )
    if config.num_hidden_layers > len(table) + 1000:  # said by table_faults
        return table, faults
    needed = {name for rule in weight_rules(config) for name in rule.names(config.num_hidden_layers)}
    extra = [name for name in table if name not in needed and name.endswith(".bias")]
    zero = [name for name in extra if _is_zero(table[name])]
    faults += _bias_faults([name for name in extra if name not in zero])
    zeros = _missing_biases(config, table)
    return {name: tensor for name, tensor in (table | zeros).items() if name not in zero}, faults


def _bias_faults(names: list[str]) -> list[str]:
    for part, key in ((".self_attn.", "attention_bias"), (".mlp.", "mlp_bias")):
        if first := next((name for name in names if part in name), None):
            return [f"{first} is not 0, but config.json has no {key}: set {key} to true if the model has such biases"]
    return []


def _missing_biases(config: ModelConfig, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for a bias that no layer has, where other matrices of its block have theirs (Qwen's habit: not o_proj)."""
    zeros: dict[str, Tensor] = {}
    for block in (".self_attn.", ".mlp."):
        rules = [rule for rule in weight_rules(config) if block in rule.name and rule.name.endswith(".bias")]
        lack = [rule for rule in rules if not any(name in table for name in rule.names(config.num_hidden_layers))]
        if len(lack) == len(rules):
            continue  # a config that asks for biases of which there are none: said as missing
        for rule in lack:
            _log.info("%s is in no layer: taken as 0", rule.name.format("*"))
            for name in rule.names(config.num_hidden_layers):
                matrix = table.get(name.removesuffix("bias") + "weight")
                dtype = matrix.dtype if matrix and isinstance(matrix.dtype, np.dtype) else DTYPES["float32"]
                zeros[name] = Tensor(
                    dtype, rule.hf_shape, lambda rule=rule, dtype=dtype: np.zeros(rule.hf_shape, dtype)
                )
    return zeros


def _is_zero(tensor: Tensor) -> bool:
    small = isinstance(tensor.dtype, np.dtype) and len(tensor.shape) == 1 and tensor.shape[0] <= _MOST_BIAS
    return small and not tensor.read().astype(np.float32).any()


def _is_same(one: Tensor, other: Tensor) -> bool:
    if not isinstance(one.dtype, np.dtype) or not isinstance(other.dtype, np.dtype):
        return True  # said by table_faults
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8) for tensor in (one, other))
    return np.array_equal(first, second)
