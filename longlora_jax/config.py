"""The configuration of a run: plain dataclasses, checked by validate()."""

import dataclasses
import math
import operator
from dataclasses import dataclass, field

from longlora_jax.attention.patterns import GROUPED, PATTERNS
from longlora_jax.attention.rope import ROPE_TYPES
from longlora_jax.data_config import DataConfig, data_faults, part_faults, same_rows
from longlora_jax.errors import UserError
from longlora_jax.fields import type_faults
from longlora_jax.files import one_line
from longlora_jax.model_config import ATTENTION_TARGETS, MLP_TARGETS, LoraConfig, ModelConfig

MODES = ("longlora", "lora", "lora_norm", "lora_embedding", "full")
FORMER_MODES = {"lora_plus": "longlora"}  # read in configs of earlier versions


@dataclass
class RopeConfig:
    """How positions are made to fit a window longer than the model's own (see rope.extend_rope)."""

    # auto (the model's own kind, linear for one that was never scaled) | linear | dynamic | ntk | yarn | llama3 |
    # longrope | keep (leave the model's rope alone, and let positions run on)
    type: str = "auto"
    factor: float = 0.0  # 0: ceil(seq_len / the model's original window)


@dataclass
class AttentionConfig:
    """The attention pattern of training; evaluation is full attention unless asked otherwise."""

    pattern: str = "s2"
    group_ratio: float = 0.25  # group size as a share of seq_len; the paper's 1/4
    group_size: int = 0  # group size in tokens; 0: by the ratio
    full_below: int = 0  # packed rows: segments of at most so many tokens have full attention inside; 0: none
    full_last: float = 0.0  # the last share of the steps runs under full attention
    full_every: int = 0  # and every so-manyth step does; 0: none

    def is_full(self, step: int, steps: int) -> bool:
        """Whether a step, counted from 0, of so many runs under full attention whatever the pattern."""
        in_turn = self.full_every and (step + 1) % self.full_every == 0
        return bool(in_turn) or step >= round(steps * (1 - self.full_last))

    def group_tokens(self, seq_len: int) -> int:
        """The group size G in tokens for a window; 0 where the pattern has no groups."""
        if self.pattern == "full":
            return 0
        return self.group_size or round(seq_len * self.group_ratio)


@dataclass
class OptimConfig:
    """AdamW as the paper runs it."""

    learning_rate: float = 2e-5
    embedding_learning_rate: float = 0.0  # of embed_tokens and lm_head where they train; 0: learning_rate
    norm_learning_rate: float = 0.0  # of the norms' scales; 0: learning_rate
    schedule: str = "constant"  # constant | cosine | linear
    warmup_steps: int = 20
    end_ratio: float = 0.0  # where cosine and linear end, as a share of learning_rate
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_norms: bool = False  # weight decay on the scales of norms and on biases too
    clip_norm: float = 1.0  # 0: no clipping


@dataclass
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes what is left.

    auto: where no axis is set, rows are cut over all devices if that divides and fits, and else the sequence as well
    (plan/meshes.py); False: the sizes are taken as they are.
    """

    data: int = 1  # rows
    fsdp: int = -1  # rows, and a share of the weights
    context: int = 1  # the sequence, and a share of the weights
    tensor: int = 1  # heads and features
    auto: bool = True


@dataclass
class EvalConfig:
    """Evaluation during training: full attention over windows of the held-out data, once every `every` steps."""

    every: int = 0  # 0: never
    max_windows: int = 16
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class Config:
    """A run: `python train.py --config FILE --workdir DIR`, where FILE defines get_config() -> Config.

    Any field can be overridden on the command line: --config.optim.learning_rate=1e-4.
    """

    seq_len: int  # the window in tokens
    steps: int  # optimizer updates
    batch_size: int = 1  # rows of an update, over all devices and accumulation steps
    accumulation: int = 1  # an update is computed in so many parts
    init_from: str = ""  # a Hugging Face folder or a converted checkpoint; "": random weights of `model`
    # The workdir of an earlier run: its trained weights and moments begin a new run, with this config's steps, schedule
    # and data. init_from may stay empty: it is the earlier run's.
    continue_from: str = ""
    model: ModelConfig | None = None  # None: read from init_from
    # Special tokens that the tokenizer lacks: they follow its own, and the model gets a row for each, the mean of the
    # others. Where the output has a matrix of its own, mode=full alone trains its rows.
    new_tokens: tuple[str, ...] = ()
    mode: str = "longlora"  # longlora (LoRA + embedding + norms) | lora | lora_norm | lora_embedding | full
    lora: LoraConfig = field(default_factory=LoraConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixture: tuple[DataConfig, ...] = ()  # more data: every batch takes rows of all by their weights
    # Processes that read and pack ahead; 0: a thread of this one. Batches are the same. Of data in memory each process
    # has a copy; of what longlora_jax.data.prepare has written, none.
    workers: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    dtype: str = "bfloat16"  # of activations and frozen weights: bfloat16 | float32
    # Of the blocks' frozen matrices, as bitsandbytes has them: nf4 | nf4_double (scales in eight bits) | int8; none: as
    # they are, which a folder that bitsandbytes quantized has in its codes (fp4 and fp4_double are only read).
    base_quantization: str = "none"
    neftune_alpha: float = 0.0  # noise on the embeddings in training (arXiv:2310.05914 takes 5 to 15); 0: none
    # What the backward pass computes again of a block: block (all of it), attention (all but attention), dots (all but
    # attention and matrix products), none, or offload (all, and the blocks' inputs wait in the host's memory: TPU and
    # GPU). auto: the fastest that fits, by the planner's estimate.
    remat: str = "block"
    # Of a very long sequence: a block's heads, and the tokens of its MLP, come in so many chunks, one after another.
    # Heads in as many as cut them evenly, and all at once where a tensor axis shares them out.
    chunks: int = 1
    loss_chunk: int = 1024  # rows of logits that exist at a time
    log_every: int = 1
    wandb: str = ""  # also report to this project of Weights & Biases (pip install wandb); "": do not
    save_every: int = 100
    keep_checkpoints: int = 2
    keep_best: bool = False  # save after each evaluation that has the lowest eval/loss so far, and keep that step
    early_stop: int = 0  # end after so many evaluations in a row without a lower eval/loss; 0: never
    max_bad_steps: int = 10  # a step whose loss or gradient is not finite is skipped; so many in a row end the run
    seed: int = 0

    def __post_init__(self):
        self.mode = FORMER_MODES.get(self.mode, self.mode)


CHOICES = {
    "base_quantization": ("none", "nf4", "nf4_double", "int8", "fp4", "fp4_double"),
    "mode": MODES,
    "dtype": ("bfloat16", "float32"),
    "remat": ("block", "attention", "dots", "offload", "none", "auto"),
    "attention.pattern": PATTERNS,
    "optim.schedule": ("constant", "cosine", "linear"),
    "rope.type": ("auto", *ROPE_TYPES, "keep"),
}
POSITIVE = (
    *("seq_len", "steps", "batch_size", "accumulation", "loss_chunk", "chunks"),
    *("log_every", "save_every", "keep_checkpoints", "max_bad_steps"),
)


def validate(config: Config) -> None:
    """Checks what can be checked without files or devices; all faults come in one UserError."""
    if faults := [*_field_faults(config), *_training_faults(config)]:
        raise UserError("; ".join(faults))


def validate_model(config: Config) -> None:
    """Checks a config of which only the model counts, not its training; all faults come in one UserError."""
    if faults := _field_faults(config):
        raise UserError("; ".join(faults))


def _field_faults(config: Config) -> list[str]:
    """What is wrong with a field by itself. Raises UserError for a value of another type than its field's."""
    if faults := list(type_faults(config)):
        raise UserError("; ".join(faults))
    for name, choices in CHOICES.items():
        value = operator.attrgetter(name)(config)
        if value not in choices:
            faults.append(f"{name}={value!r} is unknown: use one of {', '.join(choices)}")
    for name in POSITIVE:
        if getattr(config, name) < 1:
            faults.append(f"{name}={getattr(config, name)} must be 1 or more")
    if config.model is None and not config.init_from:
        faults.append("there is no model: set init_from to a model's folder, or model to a ModelConfig")
    return faults


def _training_faults(config: Config) -> list[str]:
    faults = []
    if not config.data.tokenizer and not config.init_from:
        faults.append("there is no tokenizer: set data.tokenizer to a folder that has one")
    if config.mode != "full" and not config.init_from:
        faults.append(f"mode={config.mode!r} adapts a base model: set init_from to its folder, or mode to full")
    for name, data in data_parts(config).items():
        if isinstance(data, DataConfig):
            faults += data_faults(name, data, config.seq_len)
            if not data.path and data.source != "python" and (config.eval.every or name != "eval.data"):
                faults.append(f"{name}.path is empty: name a file, a folder or a glob, or what its source needs")
        else:
            faults.append(f"{name} is a {type(data).__name__}: give a DataConfig")
    parts = {name: part for name, part in data_parts(config).items() if isinstance(part, DataConfig)}
    faults += part_faults(parts if config.eval.every else {n: p for n, p in parts.items() if n != "eval.data"})
    if config.workers < 0:
        faults.append(f"workers={config.workers} must be 0 (none) or more")
    if config.early_stop < 0:
        faults.append(f"early_stop={config.early_stop} counts evaluations: give 0 (never) or more")
    if not config.eval.every and (config.keep_best or config.early_stop):
        faults.append("keep_best and early_stop go by eval/loss: set eval.every and eval.data")
    if config.eval.every < 0 or config.eval.max_windows < 1:
        faults.append("eval.every must be 0 (never) or more, eval.max_windows 1 or more")
    if config.accumulation > 0 and config.batch_size % config.accumulation:
        faults.append(
            f"batch_size={config.batch_size} is not a multiple of accumulation={config.accumulation}: "
            "batch_size counts the rows of a whole update"
        )
    faults += _group_faults(config.attention, config.seq_len)
    if config.mode != "full" and config.lora.rank < 1:
        faults.append(f"lora.rank={config.lora.rank} leaves mode={config.mode!r} without adapters: set it to 1 or more")
    if config.base_quantization != "none" and config.mode == "full":
        faults.append(
            f"base_quantization={config.base_quantization} keeps the base as codes, which have no gradient, and mode="
            "'full' trains it: set mode to longlora or lora, or base_quantization to none"
        )
    if fault := remat_fault(config):
        faults.append(fault)
    if unknown := set(config.lora.targets) - {*ATTENTION_TARGETS, *MLP_TARGETS}:
        known = ", ".join((*ATTENTION_TARGETS, *MLP_TARGETS))
        faults.append(f"lora.targets holds {one_line(', '.join(sorted(unknown)), 200)}: use names out of {known}")
    if config.mode != "full" and not 0 < config.lora.alpha < math.inf:
        faults.append(f"lora.alpha={config.lora.alpha} must be above 0: by alpha / rank the adapters are scaled")
    if not 0 <= config.lora.dropout < 1:
        faults.append(f"lora.dropout={config.lora.dropout} must be at least 0 and below 1")
    if not 0 <= config.neftune_alpha < math.inf:
        faults.append(f"neftune_alpha={config.neftune_alpha} must be 0 (no noise) or more (NEFTune uses 5 to 15)")
    return faults + _rate_faults(config.optim, config.mode)


def remat_fault(config: Config) -> str:
    """Why a config's remat does not go with its chunks; "" if it does."""
    if config.chunks > 1 and config.remat == "none" and config.base_quantization != "none":
        return (
            f"chunks={config.chunks} with remat='none' would keep every layer's matrices unpacked: set remat to block "
            "or offload, or chunks to 1"
        )
    if config.chunks > 1 and config.remat == "dots":
        return (
            f"chunks={config.chunks} computes a chunk's matrix products again, and remat='dots' would keep them: set "
            "remat to attention or block, or chunks to 1"
        )
    return ""


def _rate_faults(optim: OptimConfig, mode: str) -> list[str]:
    faults = []
    for name in ("learning_rate", "warmup_steps", "end_ratio", "eps", "weight_decay", "clip_norm"):
        if not 0 <= (value := getattr(optim, name)) < math.inf:  # NaN fails as well
            faults.append(f"optim.{name}={value} must be 0 or more, and finite")
    for name in ("beta1", "beta2"):
        if not 0 <= (value := getattr(optim, name)) < 1:
            faults.append(f"optim.{name}={value} must be at least 0 and below 1")
    unused = {"embedding_learning_rate": ("lora", "lora_norm"), "norm_learning_rate": ("lora", "lora_embedding")}
    for name, idle in unused.items():
        rate = getattr(optim, name)
        if not 0 <= rate < math.inf:
            faults.append(f"optim.{name}={rate} must be 0 (that is, learning_rate) or more")
        elif rate and mode in idle:
            faults.append(f"optim.{name}={rate}, but mode={mode!r} does not train what it is for: set mode to longlora")
        elif rate and optim.learning_rate <= 0:
            faults.append(f"optim.{name}={rate} follows the schedule of learning_rate: set that above 0")
    return faults


def with_held_out_eval(config: Config) -> Config:
    """The config with eval.data on the part of `data` that its hold_out_share keeps from training, unless it names
    other data: where it names none, and where it names the same without a share of its own.
    """
    data, ours = config.data, config.eval.data
    if not data.hold_out_share or not config.eval.every:
        return config
    if not ours.path and ours.source != "python":
        ours = dataclasses.replace(data, max_tokens=0)
    elif same_rows(data, ours) and not ours.hold_out_share:
        ours = dataclasses.replace(ours, hold_out_share=data.hold_out_share)
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, data=ours))


def name_of(data: DataConfig, config: Config) -> str:
    """What a DataConfig is called in its config."""
    return next((name for name, part in data_parts(config).items() if part is data), "data")


def data_parts(config: Config) -> dict[str, DataConfig]:
    """Every DataConfig of a run by its name in the config."""
    more = {f"mixture[{i}]": data for i, data in enumerate(config.mixture)}
    return {"data": config.data, **more, "eval.data": config.eval.data}


def _group_faults(attention: AttentionConfig, seq_len: int) -> list[str]:
    faults = []
    if not 0 <= attention.full_last <= 1:
        faults.append(f"attention.full_last={attention.full_last} is a share of the steps: give 0 to 1")
    if attention.full_every < 0 or attention.full_every == 1:
        faults.append(
            f"attention.full_every={attention.full_every} must be 2 or more, or 0 for none; for all steps set "
            "attention.pattern=full"
        )
    if not 0 <= attention.full_below <= seq_len:
        faults.append(f"attention.full_below={attention.full_below} counts tokens: give 0 to {seq_len}, seq_len")
    group = attention.group_tokens(seq_len)
    if attention.pattern not in GROUPED:
        return faults
    if group < 2 or group > seq_len:
        faults.append(
            f"group_size={group} does not fit seq_len={seq_len}: set attention.group_size between 2 and seq_len, "
            "or attention.group_ratio up to 1 (LongLoRA uses 0.25)"
        )
    elif seq_len % group:
        faults.append(
            f"seq_len={seq_len} is not a multiple of group_size={group}: set attention.group_size to a divisor "
            f"(LongLoRA uses seq_len // 4) or change seq_len to {seq_len // group * group}"
        )
    return faults
