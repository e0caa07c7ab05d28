"""Rotary position embeddings: frequencies, scalings, apply_rope. weights/hf_rope.py has their form in config.json.

Frequencies are those of transformers 5 (modeling_rope_utils.py), in NumPy. jax is imported where
arrays are rotated and not above: weights/hf.py reads a config.json in workers that never load jax.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longlora_jax.errors import UserError

if TYPE_CHECKING:
    import jax

ROPE_TYPES = ("linear", "dynamic", "ntk", "yarn", "llama3", "longrope")
# What a model keeps when it is extended again by the same kind: not what fitted the old factor.
_KEPT = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, unsafe_hash=True)
class RopeScaling:
    """How the rotary frequencies of a longer window follow from those of the pretrained one.

    rope_type: linear (arXiv:2306.15595), dynamic or ntk (NTK-aware theta, by the length of the forward pass or once
    and for all), yarn (arXiv:2309.00071), llama3 or longrope (arXiv:2402.13753). factor: how many times longer.
    original_max_position_embeddings: the window in tokens before any scaling. None: not given, transformers' default.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def validate(self) -> None:
        """Raises UserError if the kind is unknown, or a field of it is missing or impossible."""
        kind, low, high = self.rope_type, self.low_freq_factor, self.high_freq_factor
        if kind not in ROPE_TYPES:
            known = f"{', '.join(ROPE_TYPES)} (or default, in config.json: no scaling)"
            raise UserError(f"rope_type={kind!r} is not known: use one of {known}")
        for name, value in dataclasses.asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if name != "rope_type" and not all(n is None or is_finite(n) for n in numbers):
                raise UserError(f"rope {name}={value!r} is not a finite number: give one")
        for name in ("factor", "original_max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"rope {name}={getattr(self, name)} is too small: it must be 1 or more")
        if kind == "llama3" and (low is None or high is None or high <= low):
            raise UserError(
                f"rope_type='llama3' needs low_freq_factor and, above it, high_freq_factor, "
                f"not {low} and {high}: Llama 3.1 has 1.0 and 4.0"
            )
        if kind == "longrope" and (self.short_factor is None or self.long_factor is None):
            raise UserError(
                "rope_type='longrope' needs short_factor and long_factor, a number for every pair "
                "of a head: they come from a search, so take them from a model that has them"
            )


def rope_frequencies(
    *,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    seq_len: int,
) -> tuple[np.ndarray, float]:
    """The rotary frequencies for a forward pass of seq_len tokens, as transformers computes them.

    Returns inv_freq [H/2] f32, in radians a token, and the factor on cos and sin. Only `dynamic`
    and `longrope` depend on seq_len. Raises UserError if the scaling does not fit head_dim.
    """
    if head_dim < 4 or head_dim % 2 or not theta > 1:
        raise UserError(f"rope needs an even {head_dim=} of 4 or more and {theta=} above 1")
    if scaling is None:
        return 1 / _powers(theta, head_dim), 1.0
    scaling.validate()
    kind, factor = scaling.rope_type, scaling.factor
    original = scaling.original_max_position_embeddings
    if kind == "linear":
        return 1 / _powers(theta, head_dim) / np.float32(factor), 1.0
    if kind == "ntk":
        return 1 / _powers(raised_theta(theta, factor, head_dim), head_dim), 1.0
    if kind == "dynamic":
        stretch = factor * max(seq_len, original) / original - (factor - 1)
        return 1 / _powers(raised_theta(theta, stretch, head_dim), head_dim), 1.0
    if kind == "llama3":
        return _llama3_frequencies(head_dim, theta, scaling), 1.0
    if kind == "yarn":
        return _yarn_frequencies(head_dim, theta, scaling), _attention_factor(scaling)
    divisors = scaling.long_factor if seq_len > original else scaling.short_factor
    assert divisors is not None  # validate() saw both
    if len(divisors) != head_dim // 2:
        raise UserError(f"longrope has {len(divisors)} factors: head_dim={head_dim} needs half")
    inv_freq = 1 / (np.asarray(divisors, np.float32) * _powers(theta, head_dim))
    return inv_freq, _attention_factor(scaling)


def rope_tables(positions: "jax.Array", inv_freq: Any, attention_factor: float) -> tuple["jax.Array", "jax.Array"]:
    """cos and sin [B, T, R/2] f32 of positions [B, T] int32; inv_freq: [R/2] f32, or [B, 1, R/2] of each row."""
    import jax.numpy as jnp

    # bf16 has 8 bits of mantissa: position 257 would round to 256, so angles stay f32.
    angles = positions[..., None].astype(jnp.float32) * (inv_freq if inv_freq.ndim == 3 else inv_freq[None, None])
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(x: "jax.Array", cos: "jax.Array", sin: "jax.Array") -> "jax.Array":
    """Rotates the pairs (i, i + R/2) of the first R features of each head, the layout of Hugging Face checkpoints.

    x: [B, T, N, H]; cos, sin: [B, T, R/2] f32, R = H or less. Returns [B, T, N, H] in x's dtype, computed in f32.
    """
    import jax.numpy as jnp

    rotary_dim = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :rotary_dim].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else jnp.concatenate([rotated, x[..., rotary_dim:]], axis=-1)


def extend_rope(
    *,
    scaling: RopeScaling | None,
    max_position_embeddings: int,
    seq_len: int,
    rope_type: str,
    factor: float | None = None,
    unscaled: str = "linear",
    **fields: Any,
) -> RopeScaling | None:
    """The scaling that carries a model to seq_len tokens, always from its original window.

    scaling and max_position_embeddings: the model's as it is. rope_type: one of ROPE_TYPES, or "auto": the kind that
    the model has, or `unscaled` (linear is the paper's) for one that was never scaled. factor: ceil(seq_len / original)
    unless given (llama3: the factor that the model has, times seq_len / window: Meta's 8 covers 16 windows); without
    it, a model whose window already holds seq_len keeps what it has (None if it was never scaled). fields: more fields
    of RopeScaling; a model of the same kind keeps its own, llama3 starts from Meta's. A kind that takes the place of
    another is logged. Raises UserError. arXiv:2309.12307; its code divides by the window that is already scaled: 4096
    x8 extended to 65,536 gives 2 there and 16 here.
    """
    original = window = max_position_embeddings
    if scaling is not None:
        original = scaling.original_max_position_embeddings
        window = max(window, int(original * scaling.factor))
    if factor is None and seq_len <= window:
        return scaling
    own = scaling.rope_type if scaling is not None else None
    kind = (own or unscaled) if rope_type == "auto" else rope_type
    if own == kind == "longrope" and not {"short_factor", "long_factor"} <= set(fields):
        raise UserError(
            f"the model's longrope has factors that were searched for its window of {window:,}, none for {seq_len:,}: "
            "set rope.type to yarn or linear, or keep"
        )
    if factor is None:
        factor = float(math.ceil(seq_len / original))
        if scaling is not None and own == kind == "llama3":
            factor = float(math.ceil(scaling.factor * seq_len / window))
    if own == kind:
        fields = {name: getattr(scaling, name) for name in _KEPT.get(kind, ())} | fields
    elif kind == "llama3":
        fields = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | fields
    extended = RopeScaling(rope_type=kind, factor=factor, original_max_position_embeddings=original, **fields)
    extended.validate()
    if scaling is not None and own != kind:
        _log.warning(
            "rope: the model's %s x%g becomes %s x%g over its original window of %s: every position moves; "
            "rope.type=auto extends its own kind",
            *(own, scaling.factor, kind, factor, f"{original:,}"),
        )
    return extended


def is_finite(value: Any) -> bool:
    """Whether a value, of any type, is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _powers(theta: float, head_dim: int) -> np.ndarray:
    """theta ** (2i / H) for i in 0 .. H/2 - 1, [H/2] f32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # f32 in and out but f64 inside: this rounds as torch does, NumPy's own f32 power does not.
    return (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)


def raised_theta(theta: float, factor: float, head_dim: int) -> float:
    """NTK-aware theta: the slowest pair turns `factor` times slower, the fastest as before."""
    return theta * factor ** (head_dim / (head_dim - 2))


def _yarn_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Fast pairs as they are, slow pairs divided by the factor, a ramp between (YaRN, eq. 23)."""

    def pair_with_turns(turns: float) -> float:
        window = scaling.original_max_position_embeddings
        return head_dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with_turns(scaling.beta_fast or 32)
    high = pair_with_turns(scaling.beta_slow or 1)
    if scaling.truncate is None or scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    slow = np.clip((pairs - np.float32(low)) / np.float32(high - low or 0.001), 0, 1)
    powers = _powers(theta, head_dim)
    return slow / (np.float32(scaling.factor) * powers) + (1 - slow) / powers


def _llama3_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """By the number of turns in the original window: many as is, few divided, a ramp between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None and high is not None  # validate() saw both
    inv_freq = 1 / _powers(theta, head_dim)
    turns = scaling.original_max_position_embeddings / (np.float32(2 * math.pi) / inv_freq)
    fast = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - fast) * inv_freq / np.float32(scaling.factor) + fast * inv_freq


def _attention_factor(scaling: RopeScaling) -> float:
    """The factor on cos and sin of yarn and longrope: as given, or from the scaling factor."""
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    growth = math.log(scaling.factor)
    if scaling.rope_type == "longrope":
        return math.sqrt(1 + growth / math.log(scaling.original_max_position_embeddings))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * growth + 1) / (0.1 * scaling.mscale_all_dim * growth + 1)
    return 0.1 * growth + 1
