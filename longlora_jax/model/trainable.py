"""Which leaves train: one mask tree that decides gradients, optimizer, dtype, checkpoint and print-out."""

from collections import defaultdict

import jax

from longlora_jax.config import MODES
from longlora_jax.errors import UserError


def _names(path) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def group_of(path: tuple[str, ...]) -> str:
    """The part of the method that a leaf belongs to: lora, embedding, norm, lm_head, attention or mlp."""
    if path[-1] in ("lora_a", "lora_b"):
        return "lora"
    if path[0] == "embed_tokens":
        return "embedding"
    if path[-2:-1] and path[-2].endswith("norm"):
        return "norm"
    if path[0] == "lm_head":
        return "lm_head"
    return "attention" if "self_attn" in path else "mlp"


TRAINED_GROUPS = {
    "longlora": {"lora", "embedding", "norm"},
    "lora": {"lora"},
    "lora_norm": {"lora", "norm"},
    "lora_embedding": {"lora", "embedding"},
}


def trainable_mask(params, mode: str):
    """A tree of booleans like params: True where the leaf trains.

    mode: `longlora` (adapters, embedding and norms: LongLoRA), `lora` (adapters alone), `lora_norm`, `lora_embedding`
    (one of the two beside the adapters, as in the paper's ablation) or `full` (everything).
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is unknown: use one of {', '.join(MODES)}")
    if mode == "full":
        return jax.tree.map(lambda _: True, params)
    trained = TRAINED_GROUPS[mode]
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(_names(path)) in trained, params)


def partition(params, mask):
    """Splits a tree in two: (trainable, frozen). A subtree without leaves of its kind is absent, not None."""

    def take(node, keep, wanted: bool):
        out = {}
        for name, child in node.items():
            if isinstance(child, dict):
                if inner := take(child, keep[name], wanted):
                    out[name] = inner
            elif bool(keep[name]) == wanted:
                out[name] = child
        return out

    return take(params, mask, True), take(params, mask, False)


def combine(trainable, frozen):
    """The inverse of partition: one tree out of two that share no leaf."""
    out = dict(trainable)
    for name, child in frozen.items():
        if name not in out:
            out[name] = child
        else:
            assert isinstance(child, dict) and isinstance(out[name], dict), f"{name!r} is in both partitions"
            out[name] = combine(out[name], child)
    return out


def count(params) -> int:
    """Number of parameters of a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def census(params, mask) -> dict[str, dict[str, int]]:
    """Parameters by group: {group: {"trainable": n, "frozen": n}}; params may be shapes."""
    groups: dict[str, dict[str, int]] = defaultdict(lambda: {"trainable": 0, "frozen": 0})

    def add(path, leaf, trains):
        groups[group_of(_names(path))]["trainable" if trains else "frozen"] += leaf.size

    jax.tree_util.tree_map_with_path(add, params, mask)
    return dict(groups)
