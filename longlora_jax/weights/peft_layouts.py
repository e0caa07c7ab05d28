"""Adapters of fused matrices: PEFT adapts a family's module as its files have it, we adapt its parts.

In: every part gets the module's A and its own rows of B. Out: the parts' As are stacked and their Bs lie along a
diagonal, which is the same update at the sum of their ranks.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from longlora_jax.model_config import LoraConfig, ModelConfig
from longlora_jax.weights.families import family_of
from longlora_jax.weights.layouts import join_rows, our_name, take_rows, their_name
from longlora_jax.weights.peft_files import Pair
from longlora_jax.weights.rules import Adapter, weight_rules
from longlora_jax.weights.tensors import Tensor


def pairs_to_ours(config: ModelConfig, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The adapters of a family's modules, by the name of the kernel, as those of our kernels.

    A fused module whose shape does not fit keeps its name, and is no projection of the model.
    """
    family, ours = family_of(config), {}
    rows = {rule.name.format("0"): rule.hf_shape[0] for rule in weight_rules(config) if rule.input_axes}
    for name, pair in pairs.items():
        fused = next((f for f in family.fused if name.endswith(f".{f.name}.weight")), None)
        before = our_name(family, name.removesuffix(f"{fused.name}.weight") + "x").removesuffix("x") if fused else ""
        names = [f"{before}{part}.weight" for part in fused.parts] if fused else []
        sizes = [rows.get(re.sub(r"layers\.\d+\.", "layers.0.", part), 0) for part in names]
        if fused is None or sum(sizes) != pair.b.shape[0]:
            ours[name if fused else our_name(family, name)] = _with_target(pair, our_name(family, name))
            continue
        for i, part in enumerate(names):

            def some(tensor: Tensor | None, i=i, sizes=sizes, fused=fused) -> Tensor | None:
                if tensor is None:
                    return None
                shape = (sizes[i], *tensor.shape[1:])
                return Tensor(tensor.dtype, shape, lambda: take_rows(tensor.read(), i, sizes, fused, config))

            b = some(pair.b)
            assert b is not None
            ours[part] = _with_target(pair._replace(b=b, magnitude=some(pair.magnitude), bias=some(pair.bias)), part)
    return ours


def _with_target(pair: Pair, name: str) -> Pair:
    return pair._replace(lora=replace(pair.lora, targets=(name.split(".")[-2],)))


def adapters_to_theirs(config: ModelConfig, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Adapters by the names of our kernels as those of the family's modules, by the names of theirs."""
    family = family_of(config)
    rows = {rule.name.format("0"): rule.hf_shape[0] for rule in weight_rules(config) if rule.input_axes}
    theirs: dict[str, Adapter] = {}
    for name, adapter in adapters.items():
        module = name.removesuffix(".weight")
        fused = next((f for f in family.fused if any(module.endswith(f".{part}") for part in f.parts)), None)
        if fused is None:
            theirs[their_name(family, name)] = adapter
            continue
        own = next(part for part in fused.parts if module.endswith(f".{part}"))
        before = module.removesuffix(own)
        fused_name = their_name(family, before + "x").removesuffix("x") + f"{fused.name}.weight"
        if fused_name in theirs:
            continue
        parts = [f"{before}{part}.weight" for part in fused.parts]
        given = [adapters.get(part) for part in parts]
        ranks = [0 if one is None else one.a.shape[0] for one in given]
        blocks, first = [], 0
        for part, one, rank in zip(parts, given, ranks, strict=True):
            block = np.zeros((rows[re.sub(r"layers\.\d+\.", "layers.0.", part)], sum(ranks)), np.float32)
            if one is not None:
                block[:, first : first + rank] = one.b
            blocks.append(block)
            first += rank
        a = np.concatenate([one.a for one in given if one is not None])
        theirs[fused_name] = Adapter(a, join_rows(blocks, fused, config), adapter.scale)
    return theirs


def module_ranks(config: ModelConfig, lora: LoraConfig) -> dict[str, int]:
    """The family's modules that adapters of these targets lie in, as target_modules names them, and their ranks."""
    family, ranks = family_of(config), {}
    for target in lora.targets:
        fused = next((f for f in family.fused if any(part.endswith(f".{target}") for part in f.parts)), None)
        name = fused.name.split(".")[-1] if fused else their_name(family, target)
        ranks[name] = ranks.get(name, 0) + lora.rank
    return ranks
