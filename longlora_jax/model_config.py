"""The shape and the constants of a model: what tells one family of decoders from another is data here."""

import math
from dataclasses import dataclass

from longlora_jax.attention.rope import RopeScaling

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"  # transformers' names of kinds of layers
GLOBAL, LOCAL, NO_ROPE = "global", "local", "none"  # which rotary embedding a layer has


@dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
    """A decoder, named as in Hugging Face's config.json wherever that has a name for it; the defaults are a LLaMA's.

    head_dim is given apart from hidden_size: some models do not have D = N * H.
    max_position_embeddings is the window of the model as it is now, extended or not.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float  # of LayerNorms too
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # of q, k, v and o
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"  # whose layout its files have (weights/families.py); the decoder does not read it
    qkv_bias: bool = False  # of q, k and v alone
    hidden_act: str = "silu"  # silu | gelu | gelu_pytorch_tanh
    gated_mlp: bool = True  # down(act(gate x) * up x), or down(act(up x))
    norm: str = "rms"  # rms | rms_unit_offset (scales by 1 + w) | layer (subtracts the mean, adds a bias)
    norm_placement: str = "pre"  # pre | post (of what a block adds) | both
    # Of q and k before they are rotated: head (each head) | own_head (each, by a scale of its own) | projection (all
    # heads at once) | "".
    qk_norm: str = ""
    use_parallel_residual: bool = False  # attention and MLP both read the block's input
    shared_norm: bool = False  # and both by input_layernorm, the block's only norm
    partial_rotary_factor: float = 1.0  # the share of a head's first features that is rotated
    sliding_window: int | None = None  # tokens that sliding_attention layers see, themselves included
    layer_types: tuple[str, ...] = ()  # full_attention | sliding_attention of each layer; (): all full
    no_rope_layers: tuple[int, ...] = ()  # 0 for each layer whose q and k are not rotated, else 1; (): none
    rope_local_base_freq: float | None = None  # theta of sliding_attention layers, never scaled; None: rope_theta
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and MLP add
    attention_multiplier: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    logits_scaling: float = 1.0  # logits are divided by it
    attn_logit_softcapping: float | None = None  # scores become cap * tanh(scores / cap)
    final_logit_softcapping: float | None = None

    @property
    def rotary_dim(self) -> int:
        """How many first features of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def score_scale(self) -> float:
        """What multiplies q k^T."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer in tokens, 0 for full attention."""
        kinds = self.layer_types or (FULL_ATTENTION,) * self.num_hidden_layers
        return tuple(self.sliding_window or 0 if kind == SLIDING_ATTENTION else 0 for kind in kinds)

    @property
    def ropes(self) -> tuple[str, ...]:
        """The rotary embedding of each layer: GLOBAL, LOCAL (rope_local_base_freq) or NO_ROPE."""
        local = LOCAL if self.rope_local_base_freq is not None else GLOBAL
        rotated = self.no_rope_layers or (1,) * self.num_hidden_layers
        return tuple(
            NO_ROPE if not has_rope else local if window else GLOBAL
            for window, has_rope in zip(self.windows, rotated, strict=True)
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that adapters can have."""
        return (*ATTENTION_TARGETS, *(name for name in MLP_TARGETS if self.gated_mlp or name != "gate_proj"))


@dataclass(unsafe_hash=True)
class LoraConfig:
    """Adapters of a run; the defaults are the paper's."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION_TARGETS
    rslora: bool = False  # scale by alpha / sqrt(rank), arXiv:2312.03732

    @property
    def scale(self) -> float:
        """What multiplies the product of the two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
