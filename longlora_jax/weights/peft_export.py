"""PEFT adapters, written: low-rank updates beside a base model, and the weights that were trained whole with them."""

import logging
import math
import os
import re
from typing import Any

from longlora_jax.config import LoraConfig, ModelConfig
from longlora_jax.data.chat import ChatFormat
from longlora_jax.errors import UserError
from longlora_jax.files import new_folder, write_json
from longlora_jax.weights import hf
from longlora_jax.weights.config_faults import refuse
from longlora_jax.weights.habits import EMBED, HEAD
from longlora_jax.weights.hf_config import config_to_json, is_quantized
from longlora_jax.weights.layouts import to_theirs
from longlora_jax.weights.peft_files import PREFIX, SETTINGS, WEIGHTS
from longlora_jax.weights.peft_layouts import adapters_to_theirs, module_ranks
from longlora_jax.weights.rules import Params, adapters_of, flatten, params_table, weight_rules
from longlora_jax.weights.tensors import DTYPES, Tensor, reading, write_safetensors

_log = logging.getLogger(__name__)

_README = """# Adapter of {base}

It was trained for a window of {window} tokens. The files of PEFT do not say how the rotary embeddings were scaled for \
that: `config.json` does. Give it to the base model, or the answers will be garbage:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(".")  # this folder
{kept}{before}model = AutoModelForCausalLM.from_pretrained({source}, config=config)
{after}model = PeftModel.from_pretrained(model, ".")
```
"""
_PACKED = """
In training the matrices of the base were in {name}. With the base as it is published the adapter computes nearly the \
same; to load it as it was in training:

```python
from transformers import BitsAndBytesConfig

quantization = BitsAndBytesConfig({options})
model = AutoModelForCausalLM.from_pretrained({source}, config=config, quantization_config=quantization)
{after}```
"""
# config.json takes the place of the base's own, which says how its weights are quantized.
_KEPT = "config.quantization_config = AutoConfig.from_pretrained({source}).quantization_config  # the base's own\n"
# Around loading a base that has fewer rows of tokens than the model.
_FEWER_ROWS = "config.vocab_size = {}  # the rows that the base has\n"
_MORE_ROWS = "model.resize_token_embeddings({})  # with those of the tokens that were added\n"
_OPTIONS = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4"',
    "fp4": 'load_in_4bit=True, bnb_4bit_quant_type="fp4"',
    "int8": "load_in_8bit=True",
}


def save_peft(
    folder: str,
    config: ModelConfig,
    lora: LoraConfig,
    params: Params,
    *,
    base: str,
    tokenizer_from: str | None = None,
    chat: ChatFormat | None = None,
    adapters_only: bool = False,
    quantization: str = "none",
    base_folder: str | None = None,
    base_rows: int | None = None,
) -> None:
    """Writes an adapter for PEFT 0.6 and later (rslora: 0.8); matrices in float32, other weights in their own dtype.

    params: the trained partition of a param tree, numpy or jax arrays: lora_a [L, *in, R] and lora_b [L, R, *out] of
    every target and, if they were trained, embedding, norms and lm_head, PEFT's modules_to_save. base: folder or name
    of the model that was adapted.
    PEFT's files have no place for rope scaling and window: they go into config.json, and README.md tells how to load
    both. Of a tied model a trained embedding is written twice, once as lm_head, since PEFT would otherwise keep the
    base's embedding there; ensure_weight_tying, for which PEFT has it since 0.18, is unknown to older ones.
    adapters_only: leave out the weights that were trained whole, which few programs read from an adapter (llama.cpp and
    vLLM do not); what is lost is said. chat: see hf.copy_tokenizer. quantization: how the run kept its base
    (config.base_quantization), which README.md tells, if the base is not quantized itself. base_folder: where the base
    lies on this machine, if base is a name of the hub. base_rows: the rows of the base's embedding, if config has more:
    embedding and lm_head must then be in params, as the base cannot give them, and README.md tells how to add rows.
    Raises UserError if the folder holds something, or if params do not fit config and lora.
    """
    more_rows = base_rows is not None and base_rows < config.vocab_size
    if more_rows and adapters_only:
        raise UserError(
            f"the model has {config.vocab_size} rows of tokens, its base {base_rows}, and an adapter without its "
            "embedding has no place for the others: leave --adapters_only out, or use to-hf"
        )
    refuse("this adapter cannot be saved", _leaf_faults(config, lora, params, more_rows))
    tied_twice = {HEAD: EMBED} if config.tie_word_embeddings and not adapters_only else {}
    whole = params_table(config, params)
    whole |= {head: whole[embed] for head, embed in tied_twice.items() if embed in whole}
    whole = to_theirs(config, whole)
    if adapters_only and whole:
        kinds = list(dict.fromkeys(map(_module, whole)))
        _log.warning(
            "left out of the adapter: %s, %s trained weights (%s); with its base it computes another model than the "
            "run's, which to-hf writes whole",
            *(", ".join(kinds), len(whole), f"{sum(t.nbytes for t in whole.values()):,} bytes"),
        )
        whole = {}
    tensors = {PREFIX + name: tensor for name, tensor in whole.items()}
    for name, adapter in adapters_to_theirs(config, adapters_of(config, params, lora.scale)).items():
        for letter, array in (("A", adapter.a), ("B", adapter.b)):
            key = f"{PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight"
            tensors[key] = Tensor(array.dtype, array.shape, lambda array=array: array)
    if os.path.isdir(base):
        name, revision, base_folder = os.path.abspath(base), "", base
    else:
        name, _, revision = base.partition("@")
    source = f"{name!r}, revision={revision!r}" if revision else repr(name)
    # With no dtype named, transformers loads the base in its own.
    own = {key: value for key, value in config_to_json(config, "").items() if not key.endswith("dtype")}
    with new_folder(folder) as aside, reading("writing", tensors.values()) as read:
        write_json(os.path.join(aside, SETTINGS), _settings(config, lora, name, revision, list(whole)))
        write_json(os.path.join(aside, "config.json"), own)
        with open(os.path.join(aside, "README.md"), "w", encoding="utf-8") as file:
            after = _MORE_ROWS.format(config.vocab_size) if more_rows else ""
            before = _FEWER_ROWS.format(base_rows) if more_rows else ""
            window = config.max_position_embeddings
            is_packed = bool(base_folder) and is_quantized(base_folder)
            kept = _KEPT.format(source=source) if is_packed else ""
            card = {"base": name, "source": source, "window": window, "kept": kept, "before": before, "after": after}
            file.write(_README.format(**card))
            if quantization != "none" and not is_packed:
                kind, _, nested = quantization.partition("_")
                options = _OPTIONS[kind] + ", bnb_4bit_use_double_quant=True" * bool(nested)
                file.write(_PACKED.format(name=quantization, options=options, source=source, after=after))
        write_safetensors(os.path.join(aside, WEIGHTS[0]), tensors, map(read, tensors.values()))
        if tokenizer_from is not None:
            hf.copy_tokenizer(tokenizer_from, aside, chat, window=config.max_position_embeddings)


def _settings(config: ModelConfig, lora: LoraConfig, base: str, revision: str, whole: list[str]) -> dict[str, Any]:
    """The content of adapter_config.json; whole: names of the weights that are no matrices of LoRA."""
    ranks = module_ranks(config, lora)
    larger = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    # The scale stays what it is: alpha / rank, or alpha / sqrt(rank) with rslora.
    alphas = {n: lora.alpha * (math.sqrt(r / lora.rank) if lora.rslora else r / lora.rank) for n, r in larger.items()}
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
        "target_modules": list(ranks),
        "modules_to_save": list(dict.fromkeys(map(_module, whole))) or None,
    }
    if larger:
        settings |= {"rank_pattern": larger, "alpha_pattern": alphas}
    # PEFT 0.6 and 0.7 fail over a key that came later.
    return settings | ({"use_rslora": True} if lora.rslora else {})


def _module(name: str) -> str:
    """The last part of the name of a weight's module; the norms of single heads are in one module."""
    return re.sub(r"\.norms\.\d+", "", name).split(".")[-2]


def _is_norm(path: tuple[str, ...]) -> bool:
    return len(path) > 1 and path[-2].endswith("norm")


def _leaf_faults(config: ModelConfig, lora: LoraConfig, params: Params, needs_rows: bool) -> list[str]:
    leaves, layers = dict(flatten(params)), config.num_hidden_layers
    needed: dict[tuple[str, ...], tuple[int, ...]] = {}
    allowed: dict[tuple[str, ...], tuple[int, ...]] = {}
    for rule in weight_rules(config):
        if rule.input_axes and rule.path[-2] in lora.targets:
            inputs, outputs = rule.shape[: rule.input_axes], rule.shape[rule.input_axes :]
            needed[(*rule.path[:-1], "lora_a")] = (layers, *inputs, lora.rank)
            needed[(*rule.path[:-1], "lora_b")] = (layers, lora.rank, *outputs)
        elif rule.path[-1] == "embedding" or _is_norm(rule.path) or rule.path[0] == "lm_head":
            allowed[rule.path] = (layers, *rule.shape) if rule.layered else rule.shape
    if needs_rows:
        needed |= {path: shape for path, shape in allowed.items() if not _is_norm(path)}
    if any(map(_is_norm, leaves)):  # PEFT's "norm" stands for every module whose name ends so
        needed |= {path: shape for path, shape in allowed.items() if _is_norm(path)}
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
