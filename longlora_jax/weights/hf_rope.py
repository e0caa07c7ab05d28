"""Rotary embeddings in config.json <-> RopeScaling, as transformers 4 and 5 write and read them."""

import dataclasses
import logging
import math
from typing import Any

import numpy as np

from longlora_jax.attention.rope import ROPE_TYPES, RopeScaling, is_finite, raised_theta, rope_frequencies
from longlora_jax.errors import UserError

_log = logging.getLogger(__name__)

_PRETRAINED = (2048, 4096, 8192)  # the windows of LLaMA 1, 2 and 3, in tokens
# Kinds whose frequencies are the same at every length, so that longrope's factors can say them.
AS_LONGROPE = ("linear", "yarn", "llama3")


def rope_from_hf(config_json: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads theta and the scaling from the content of a Hugging Face config.json.

    Reads `rope_scaling` with a top-level `rope_theta` (transformers 4) and `rope_parameters`
    (transformers 5); where both stand, the first wins, as in transformers. Raises UserError.
    """
    given = config_json.get("rope_scaling") or config_json.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"config.json: rope {given!r} must be one flat object with a rope_type")
    given = {name: value for name, value in given.items() if value is not None}
    theta = given.get("rope_theta", config_json.get("rope_theta", 10_000.0))
    partial = given.get("partial_rotary_factor", config_json.get("partial_rotary_factor"))
    if not is_finite(theta) or not (partial is None or is_finite(partial)):
        raise UserError(
            f"config.json: rope_theta={theta!r}, partial_rotary_factor={partial!r}: numbers such as 10000.0 and 0.25 "
            "are needed"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return _ntk_from_hf(config_json, float(theta))
    if kind == "longrope" and config_json.get("longlora_rope") is not None:
        return float(theta), _kind_from_hf(config_json, given, float(theta))
    named = config_json.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    if "factor" not in given and kind in ("yarn", "longrope") and named:
        given["factor"] = max(_stated_window(config_json) / named, 1.0)
    if kind in ROPE_TYPES and not is_finite(given.get("factor")):
        raise UserError(f"config.json: rope_type={kind!r} needs factor, a number such as 8.0")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if name in RopeScaling.__annotations__
    }
    fields |= {"rope_type": kind, "factor": float(given.get("factor", 1))}
    window = _stated_window(config_json)
    fields["original_max_position_embeddings"] = _original_window(kind, window, named, fields["factor"])
    scaling = RopeScaling(**fields)
    scaling.validate()
    return float(theta), scaling


def window_from_hf(config_json: dict[str, Any]) -> int:
    """The window in tokens of the model as it is now, from the content of a config.json.

    This is max_position_embeddings, except in a config that keeps the original window there and
    tells the longer one by its factor alone (all of `dynamic`, and many older `linear` ones), and
    for yarn: what it reaches by its factor, as vLLM reads it, where that is more.
    """
    _, scaling = rope_from_hf(config_json)
    window = _stated_window(config_json)
    if scaling is not None:
        original = scaling.original_max_position_embeddings
        if original == window or scaling.rope_type == "yarn":
            window = max(window, int(original * scaling.factor))
    return config_json.get("longlora_window", window)


def rope_to_hf(
    theta: float,
    scaling: RopeScaling | None,
    rotary_dim: int,
    max_position_embeddings: int,
    *,
    longrope_only: bool = False,
) -> dict[str, Any]:
    """The top-level keys of a config.json from which transformers makes the same frequencies.

    max_position_embeddings: the window of the model as it is now. Both forms are written: of
    transformers 4 (`rope_scaling`, `rope_theta`) and 5 (`rope_parameters`). transformers has no
    `ntk`: it leaves as a plain rope with a raised theta, `longlora_ntk` keeps what it was. Its
    `dynamic` counts from max_position_embeddings, which therefore is the original window there,
    and `longlora_window` the present one; so it is for a yarn that reaches further than its model's window.
    longrope_only: the family has no other scaling in transformers (Family.longrope_only): those of AS_LONGROPE leave as
    a longrope with the same frequencies, `longlora_rope` keeps what they were. Raises UserError for `dynamic` there.
    """
    keys: dict[str, Any] = {"max_position_embeddings": max_position_embeddings}
    given: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        scaling.validate()
        if longrope_only:
            check_longrope_only(scaling)
        original = scaling.original_max_position_embeddings
        keys["original_max_position_embeddings"] = original
        given = {n: v for n, v in dataclasses.asdict(scaling).items() if v is not None}
        if scaling.rope_type == "ntk":
            keys["longlora_ntk"] = given | {"rope_theta": theta}
            given = {"rope_type": "default"}
            theta = raised_theta(theta, scaling.factor, rotary_dim)
        elif scaling.rope_type == "dynamic":
            keys["longlora_window"] = max_position_embeddings
            keys["max_position_embeddings"] = original
        elif scaling.rope_type == "yarn" and original * scaling.factor > max_position_embeddings:
            keys["longlora_window"] = max_position_embeddings
        if longrope_only and scaling.rope_type in AS_LONGROPE:
            keys["longlora_rope"] = given | {"rope_theta": theta}
            # No window is outgrown: both lists are the same, and no factor on cos and sin follows from the quotient.
            keys["original_max_position_embeddings"] = original = max_position_embeddings
            given = _as_longrope(theta, scaling, rotary_dim) | {"original_max_position_embeddings": original}
    old_form = None if given["rope_type"] == "default" else dict(given)
    if given["rope_type"] in ("linear", "dynamic"):
        # transformers 5 warns of more fields in these kinds; 4.31 to 4.42 fail unless there are
        # exactly `type` and `factor`, which later ones read as well.
        given = {name: given[name] for name in ("rope_type", "factor")}
        old_form = {"type": given["rope_type"], "factor": given["factor"]}
    elif longrope_only and given["rope_type"] == "longrope":
        old_form = _three_keys(given, max_position_embeddings)
    new_form = given | {"rope_theta": theta}
    return keys | {"rope_theta": theta, "rope_scaling": old_form, "rope_parameters": new_form}


def check_longrope_only(scaling: RopeScaling | None) -> None:
    """Raises UserError for a scaling that a family with longrope alone cannot be exported with."""
    if scaling is not None and scaling.rope_type == "dynamic":
        raise UserError(
            "rope_type='dynamic' has other frequencies at every length, and of this family's scalings transformers "
            f"computes longrope alone, which has not: set rope.type (--rope_type) to {', '.join(AS_LONGROPE)} or ntk"
        )


def _as_longrope(theta: float, scaling: RopeScaling, rotary_dim: int) -> dict[str, Any]:
    """A longrope that has the frequencies of another scaling at every length."""
    plain, _ = rope_frequencies(head_dim=rotary_dim, theta=theta, scaling=None, seq_len=1)
    scaled, on_cos_and_sin = rope_frequencies(head_dim=rotary_dim, theta=theta, scaling=scaling, seq_len=1)
    divisors = (plain.astype(np.float64) / scaled).tolist()
    given: dict[str, Any] = {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors}
    return given if on_cos_and_sin == 1 else given | {"attention_factor": on_cos_and_sin}


def _three_keys(longrope: dict[str, Any], window: int) -> dict[str, Any]:
    """The form of a longrope that transformers 4 wants of a Phi-3, where the rest follows from its windows."""
    stretch = window / longrope["original_max_position_embeddings"]
    if longrope.get("attention_factor") is not None or longrope.get("factor", stretch) != stretch:
        return longrope
    return {"type": "longrope"} | {name: longrope[name] for name in ("short_factor", "long_factor")}


def _stated_window(config_json: dict[str, Any]) -> int:
    return config_json.get("max_position_embeddings", 2048)  # LlamaConfig's default


def _original_window(rope_type: str, window: int, named: int | None, factor: float) -> int:
    """The window before scaling, from max_position_embeddings and the name it may have."""
    if rope_type == "dynamic":
        return window  # transformers counts from max_position_embeddings, whatever else is named
    if named or rope_type not in ("linear", "ntk"):
        return named or window  # so does transformers
    # Both habits are in the wild: transformers 4.31 asked to leave max_position_embeddings as it
    # was (vicuna-7b-v1.5-16k: 4096, factor 4), 4.43 to raise it (LLaMA-2-7B-32K: 32768, factor 8).
    # What a LLaMA was pretrained at was left; no LLaMA was at less than 2048, so below that the quotient is no window.
    unscaled = window / factor
    raised = window not in _PRETRAINED and unscaled >= _PRETRAINED[0] and unscaled == int(unscaled)
    original = int(unscaled) if raised else window
    _log.warning(
        f"config.json does not name the window before {rope_type} x{factor:g}: taken as {original} "
        "tokens; if this is wrong, add original_max_position_embeddings to it"
    )
    return original


def _ntk_from_hf(config_json: dict[str, Any], theta: float) -> tuple[float, RopeScaling | None]:
    """Finds again the ntk scaling that rope_to_hf wrote as a raised theta."""
    ntk = config_json.get("longlora_ntk")
    if ntk is None:
        return theta, None
    if not math.isclose(theta, raised_theta(ntk["rope_theta"], ntk["factor"], _rotary_dim(config_json))):
        raise UserError(f"config.json: longlora_ntk={ntk} does not give rope_{theta=}: delete it")
    fields = {name: value for name, value in ntk.items() if name != "rope_theta"}
    return ntk["rope_theta"], RopeScaling(**fields)


def _kind_from_hf(config_json: dict[str, Any], given: dict[str, Any], theta: float) -> RopeScaling:
    """Finds again the scaling that rope_to_hf wrote as a longrope."""
    own = config_json["longlora_rope"]
    scaling = RopeScaling(**{name: value for name, value in own.items() if name != "rope_theta"})
    scaling.validate()
    is_same = scaling.rope_type in AS_LONGROPE and own["rope_theta"] == theta
    if is_same:
        ours = _as_longrope(theta, scaling, _rotary_dim(config_json))
        is_same = all(
            len(ours[name]) == len(given.get(name, ())) and np.allclose(ours[name], given[name], rtol=1e-5, atol=0)
            for name in ("short_factor", "long_factor")
        )
    if not is_same:
        raise UserError(f"config.json: longlora_rope={own} does not give its longrope's factors: delete it")
    return scaling


def _rotary_dim(config_json: dict[str, Any]) -> int:
    heads = config_json["hidden_size"] // config_json["num_attention_heads"]
    return int((config_json.get("head_dim") or heads) * (config_json.get("partial_rotary_factor") or 1))
