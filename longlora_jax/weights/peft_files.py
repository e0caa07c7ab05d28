"""What lies in an adapter's folder: its settings, low-rank matrices, and weights that were trained whole.

PEFT writes adapter_config.json and adapter_model.safetensors (or .bin). The original LongLoRA project keeps embedding
and norms in a file of their own, trainable_params.bin. Format: utils/save_and_load.py of PEFT 0.4 to 0.19.
"""

import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from longlora_jax.config import LoraConfig
from longlora_jax.errors import UserError
from longlora_jax.files import read_json
from longlora_jax.weights import hf
from longlora_jax.weights.habits import EMBED, without_buffers
from longlora_jax.weights.rules import Adapter
from longlora_jax.weights.tensors import DTYPES, Tensor

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT looks for them in this order
PREFIX = "base_model.model."  # of the names in PEFT's files
_TRAINABLE = "trainable_params.bin"

_NOT_PLAIN = (
    *("fan_in_fan_out", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "layer_replication"),
)
_HARMLESS = (None, True, False, "gaussian", "orthogonal", "eva")  # beginnings that leave the base as it is
_DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
# [R, in] and [out, R] of a linear layer, [R, V] and [D, R] of an embedding, DoRA's magnitude and the bias of B.
_MATRIX = re.compile(
    r"(.+)\.lora_(?:([AB])(?:\.default)?\.(weight|bias)|(embedding_[AB])(?:\.default)?"
    r"|(magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_(delta|original)(?:\.default)?")
_WHOLE = re.compile(
    r"(.+?)(\.modules_to_save(?:\.default)?|\.base_layer|\.token_adapter(?:\.base_layer)?)?\.(weight|bias)"
)


class Pair(NamedTuple):
    """The two matrices of a kernel, a [R, in] and b [out, R], and the LoraConfig of this kernel alone.

    of_embedding: they are those of an embedding W [V, D]: a [R, V], b [D, R], and W + scale * (b a)^T.
    """

    a: Tensor
    b: Tensor
    lora: LoraConfig
    magnitude: Tensor | None = None  # DoRA's, [out]
    bias: Tensor | None = None  # of b, [out]
    of_embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """That of the kernel which it fits, in Hugging Face's layout."""
        out, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, out) if self.of_embedding else (out, inputs)

    def adapter(self) -> Adapter:
        """Its matrices, read, as what is summed into the kernel."""
        a, b = (np.asarray(tensor.read(), np.float32) for tensor in (self.a, self.b))
        magnitude = None if self.magnitude is None else np.asarray(self.magnitude.read(), np.float32).reshape(-1)
        if self.of_embedding:
            return Adapter(b.T, a.T, self.lora.scale, magnitude, norm_axis=0)
        return Adapter(a, b, self.lora.scale, magnitude)


class Rows(NamedTuple):
    """Rows of an embedding or an output projection that were trained: their numbers, and what takes their place."""

    numbers: list[int]
    rows: Tensor  # [len(numbers), D]


class AdapterFiles(NamedTuple):
    """What a folder holds, under Hugging Face's names, and what is wrong with it."""

    base: str  # the model that was adapted; "": not named
    pairs: dict[str, Pair]  # by the name of the kernel
    whole: dict[str, Tensor]  # what takes the place of the base's weights
    rows: dict[str, Rows]  # what takes the place of some of their rows
    splits_tie: bool  # whether a tied base's own embedding stays the output projection of a new one
    faults: list[str]


def read_adapter(folder: str) -> AdapterFiles:
    """Opens an adapter; its weights are not read yet, its base is not looked for.

    Raises UserError if there are no settings; every other fault is in the result.
    """
    settings = read_json(os.path.join(folder, SETTINGS))
    faults = _kind_faults(settings)
    lora_of = _lora_reader(settings, faults)
    tensors, damage = _open_files(folder)
    matrices, whole, rows, odd = _sort(tensors)
    if not damage and (not matrices or any(0 in tensor.shape for tensor in tensors.values())):
        damage = ["it was saved empty, as under DeepSpeed ZeRO-3: save it again with the weights gathered"]
    base, splits_tie = _base(settings), _splits_tie(settings, whole)
    if faults or damage:  # all else would follow from them
        return AdapterFiles(base, {}, {}, {}, splits_tie, faults + damage)
    pairs = {}
    for name, matrix in matrices.items():
        lora = lora_of(name.removesuffix(".weight"))
        of_embedding = any(key.startswith("embedding_") for key in matrix)
        a, b = (matrix.get(f"embedding_{letter}" if of_embedding else letter) for letter in "AB")
        magnitude = matrix.get("magnitude_vector")
        if a is None or b is None:
            odd.append(f"{name} has only one of lora_A and lora_B")
        elif len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == lora.rank:
            odd.append(f"{name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, their rank must be {lora.rank}")
        elif magnitude is None and settings.get("use_dora"):
            odd.append(f"use_dora is set, but {name} has no lora_magnitude_vector")
        elif magnitude is not None and not settings.get("use_dora"):
            odd.append(f"{name} has a lora_magnitude_vector, but use_dora is not set")
        else:
            pairs[name] = pair = Pair(a, b, lora, magnitude, matrix.get("bias"), of_embedding)
            for part in (pair.magnitude, pair.bias):
                if part is not None and math.prod(part.shape) != b.shape[0]:
                    odd.append(f"{name} has a magnitude or bias {list(part.shape)} beside lora_B {list(b.shape)}")
    trained = {name: Rows(_numbers(settings, name), tensor) for name, tensor in rows.items()}
    for name, (numbers, tensor) in trained.items():
        if len(tensor.shape) != 2 or len(numbers) != tensor.shape[0]:
            odd.append(f"{name} has trained rows {list(tensor.shape)}, trainable_token_indices names {len(numbers)}")
    return AdapterFiles(base, pairs, whole, trained, splits_tie, odd)


def _numbers(settings: dict[str, Any], name: str) -> list[int]:
    """The rows of a weight that were trained, from trainable_token_indices: the embedding's, or a list a module."""
    given = settings.get("trainable_token_indices")
    if isinstance(given, dict):
        module = name.removesuffix(".weight")
        given = next((value for key, value in given.items() if f".{module}".endswith(f".{key}")), None)
    right = isinstance(given, list) and all(type(i) is int and 0 <= i < 2**31 for i in given)
    return given if isinstance(given, list) and right else []


def _base(settings: dict[str, Any]) -> str:
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str):
        return ""
    return f"{name}@{revision}" if isinstance(revision, str) and revision and not os.path.isdir(name) else name


def _splits_tie(settings: dict[str, Any], whole: dict[str, Tensor]) -> bool:
    """PEFT trains a copy of the embedding, lm_head stays with the base's; where PEFT ties the two, it writes both.

    The original project, without modules_to_save, trained the embedding itself: both uses of it.
    """
    modules = settings.get("modules_to_save")
    modules = [name for name in modules if isinstance(name, str)] if isinstance(modules, list) else []
    trained = any(EMBED.removesuffix(".weight").endswith(name) for name in modules)
    return EMBED in whole and trained


def _kind_faults(settings: dict[str, Any]) -> list[str]:
    """What makes it another thing than LoRA or DoRA."""
    faults = [f"{key} is set, which is no plain LoRA and not read" for key in _NOT_PLAIN if settings.get(key)]
    if settings.get("peft_type") != "LORA":
        faults.append(f"peft_type is {settings.get('peft_type')!r:.40}, it must be LORA")
    if settings.get("bias") not in (None, "none", "all", "lora_only"):
        faults.append(f"bias is {settings['bias']!r:.40}, it must be none, all or lora_only")
    if settings.get("init_lora_weights") not in _HARMLESS:
        faults.append(
            f"init_lora_weights is {settings['init_lora_weights']!r:.40}, which changes the base as well: save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    return faults


def _lora_reader(settings: dict[str, Any], faults: list[str]) -> Callable[[str], LoraConfig]:
    """Gives lora_of(module) -> LoraConfig, to be asked if this has found no faults."""
    settings = _DEFAULTS | settings
    for key, is_valid in (("r", _is_rank), ("lora_alpha", _is_number)):
        if not is_valid(settings.get(key)):
            faults.append(f"{key} is {settings.get(key)!r:.40}, it must be a number such as 16")
    dropout = settings.get("lora_dropout") or 0.0
    if not _is_number(dropout) or not 0 <= dropout < 1:
        faults.append(f"lora_dropout is {dropout!r:.40}, it must be at least 0 and below 1")
    ranks = _patterns(settings, "rank_pattern", _is_rank, faults)
    alphas = _patterns(settings, "alpha_pattern", _is_number, faults)

    def pick(patterns: list[tuple[re.Pattern[str], Any]], key: str, module: str) -> Any:
        return next((value for regex, value in patterns if regex.fullmatch(module)), settings[key])

    def lora_of(module: str) -> LoraConfig:
        return LoraConfig(
            rank=pick(ranks, "r", module),
            alpha=float(pick(alphas, "lora_alpha", module)),
            dropout=dropout,
            targets=(module.split(".")[-1],),
            rslora=bool(settings.get("use_rslora")),
        )

    return lora_of


def _patterns(
    settings: dict[str, Any], key: str, is_valid: Callable[[Any], bool], faults: list[str]
) -> list[tuple[re.Pattern[str], Any]]:
    """rank_pattern or alpha_pattern: regular expressions and their values; the first that fits a module counts."""
    given, found = settings.get(key) or {}, []
    if not isinstance(given, dict):
        faults.append(f"{key} is no table")
        return []
    for text, value in given.items():
        try:
            # An expression with many stars, or with stars within stars, can take years to say no.
            if len(re.findall(r"[*+?{]", text)) > 3 or text.count("|") > 9 or re.search(r"\)[*+{]", text):
                raise ValueError
            found.append((re.compile(rf"(?:.*\.)?(?:{text})"), value))
        except (re.error, ValueError, OverflowError, RecursionError):
            faults.append(f"{key} has {text!r:.40}, which is no simple pattern of names")
        if not is_valid(value):
            faults.append(f"{key} has {value!r:.40} for {text!r:.40}, it must be a number such as 16")
    return found


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _open_files(folder: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of all files without PEFT's prefix, and what is wrong with the files."""
    names = [name for name in WEIGHTS if os.path.isfile(os.path.join(folder, name))][:1]
    faults = [] if names else [f"there is neither {WEIGHTS[0]} nor {WEIGHTS[1]} in it"]
    if os.path.isfile(os.path.join(folder, _TRAINABLE)):
        names.insert(0, _TRAINABLE)  # what PEFT's own file has wins, as in the original project
    table: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors = hf.open_tensor_file(os.path.join(folder, name))
        except UserError as error:
            faults.append(str(error))
            continue
        plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        if len(plain) != len(tensors):
            faults.append(f"{name} has a tensor twice, with and without {PREFIX}")
        table |= without_buffers(plain)
    for name, tensor in table.items():
        if isinstance(tensor.dtype, str):
            faults.append(f"{name} is stored as {tensor.dtype}, it must be one of {', '.join(DTYPES)}")
    return table, faults


def _sort(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """What there is, by the name of the kernel: matrices {"A": .., "B": .., ..}, whole weights, rows; and odd names."""
    matrices: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    odd = []
    for name, tensor in tensors.items():
        # PEFT saves a resized embedding up to three times: as trained, under two names, and as the base had it.
        if ".original_module." in name:
            continue
        match = _MATRIX.fullmatch(name)
        if match and (match[2], match[3]) != ("A", "bias"):
            part = "bias" if match[3] == "bias" else match[2] or match[4] or match[5]
            matrices.setdefault(f"{match[1]}.weight", {}).setdefault(part, tensor)
        elif match := _ROWS.fullmatch(name):
            if match[2] == "delta":
                rows.setdefault(f"{match[1]}.weight", tensor)
        elif ".lora_" not in name and (match := _WHOLE.fullmatch(name)):
            whole.setdefault(f"{match[1]}.{match[3]}", tensor)
        else:
            odd.append(f"{name} is no weight of a LoRA adapter")
    return matrices, whole, rows, odd
