"""How well a model predicts documents: the nll of their tokens, by windows.

For each length T, windows of T tokens start every `stride` tokens (T unless given) of every document, from
`offset`; what is left at the end is not scored. The first window of a document scores all its T - 1 targets, each
later one its last `stride`, so with a stride below T no target is scored twice; with stride = T every window
scores T - 1. Documents are never joined, and every token weighs the same, in whatever document.

To compare lengths on the same targets (`last`), windows of all lengths end at the same tokens, and each scores its last
K targets alone: the targets do not change with T, what is before them does.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.attention.rope import extend_rope
from longlora_jax.config import MeshConfig, ModelConfig
from longlora_jax.errors import UserError
from longlora_jax.model.codes import Quantization
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.model.layers import frequencies_of
from longlora_jax.model.losses import output_kernel
from longlora_jax.model.on_mesh import token_nll_on_mesh
from longlora_jax.model.quantized import is_packed
from longlora_jax.parallel.sharding import make_mesh, place_weights, weight_shardings
from longlora_jax.progress import progress_bar
from longlora_jax.weights.load import LoadedModel, OpenModel

BLOCK = 256  # neighbouring targets that standard_error takes for one observation
LONGLORA_STRIDE = 256  # sliding_window in LongLoRA's eval.py
TOKENS_AT_ONCE = 8192  # rows of a forward pass times their length, unless batch_size says otherwise


class Window(NamedTuple):
    """A window: its document, its first token there, and how many of its last targets are scored."""

    document: int
    start: int
    scored: int


def plan_windows(
    lengths: Sequence[int], seq_len: int, *, stride: int, offset: int = 0, max_windows: int | None = None
) -> list[Window]:
    """The windows of documents of these lengths in tokens, in order, by the rule at the top of this file.

    max_windows: keep the first so many, over all documents; None keeps all. Raises UserError if no document holds one.
    """
    if seq_len < 2 or not 1 <= stride <= seq_len or offset < 0 or (max_windows is not None and max_windows < 1):
        raise UserError(
            f"{seq_len=}, {stride=}, {offset=}, {max_windows=}: seq_len must be 2 or more, stride 1 to seq_len "
            "(a larger one would leave tokens out), offset 0 or more, max_windows 1 or more"
        )
    windows = []
    for document, length in enumerate(lengths):
        for start in range(offset, length - seq_len + 1, stride):
            windows.append(Window(document, start, seq_len - 1 if start == offset else min(stride, seq_len - 1)))
    if not windows:
        after = f" after an offset of {offset}" if offset else ""
        raise UserError(
            f"seq_len={seq_len} needs a document of {seq_len} tokens or more{after}, and the longest of "
            f"{len(lengths)} has {max(lengths, default=0)}: use a shorter seq_len or longer text"
        )
    return windows[:max_windows]


def plan_same_targets(
    lengths: Sequence[int],
    seq_len: int,
    *,
    last: int,
    longest: int,
    stride: int | None = None,
    offset: int = 0,
    max_windows: int | None = None,
) -> list[Window]:
    """Windows of seq_len tokens that end where those of the longest length end, each with its last targets scored.

    The first window of a document ends `longest` tokens after offset, the others every `stride` tokens (None: longest,
    so that the longest windows do not overlap). The same targets whatever seq_len is. Raises UserError if a target
    would be scored twice, if seq_len has not so many, or if no document holds a longest window.
    """
    stride = longest if stride is None else stride
    if not 1 <= last < seq_len <= longest or stride < last:
        raise UserError(
            f"{last=}, {seq_len=}, {longest=}, {stride=}: last must be below seq_len, which has seq_len - 1 targets, "
            "seq_len at most longest, and stride at least last, or targets would be scored twice"
        )
    plan_windows(lengths, longest, stride=longest, offset=offset)  # raises if there is none
    windows = [
        Window(document, end - seq_len, last)
        for document, length in enumerate(lengths)
        for end in range(offset + longest, length + 1, stride)
    ]
    return windows[:max_windows]


def on_device(model: OpenModel, dtype: str) -> LoadedModel:
    """The model in dtype, read onto all devices tensor by tensor, every weight cut over them."""
    where = _shardings(model.config, _mesh_for(model.config, 1), model.quantization)
    dtypes = jax.tree.map(lambda _: jnp.dtype(dtype), where)
    params = place_weights(model.config, model.table, where, dtypes, model.quantization)
    return LoadedModel(model.config, params, None, model.tokenizer_dir, model.quantization)


def _shardings(config: ModelConfig, mesh: Mesh, quantization: Quantization | None):
    llama = Llama(config, quantization=quantization)
    return weight_shardings(mesh, logical_axes(llama), abstract_params(llama))


def _mesh_for(config: ModelConfig, seq_len: int) -> Mesh:
    """As many devices as divide the model, the sequence cut over as many of them as divide it."""
    count = next(n for n in range(jax.device_count(), 0, -1) if config.hidden_size % n == 0)
    context = math.gcd(count, seq_len)
    sizes = MeshConfig(data=1, fsdp=count // context, context=context, tensor=1)
    return make_mesh(sizes, jax.devices()[:count])


def stretch_rope(config: ModelConfig, seq_len: int, rope_type: str, factor: float | None = None) -> ModelConfig:
    """The config of a model whose positions are stretched to seq_len tokens without training (rope.extend_rope)."""
    scaling = extend_rope(
        scaling=config.rope_scaling,
        max_position_embeddings=config.max_position_embeddings,
        seq_len=seq_len,
        rope_type=rope_type,
        factor=factor,
    )
    return dataclasses.replace(config, rope_scaling=scaling)


def evaluate(
    model: LoadedModel,
    documents: Sequence[np.ndarray],
    seq_len: int,
    *,
    stride: int | None = None,
    offset: int = 0,
    max_windows: int | None = None,
    last: int | None = None,
    longest: int | None = None,
    pattern: Pattern = FULL,
    dtype: str = "float32",
    batch_size: int | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a model at one length, under the rule at the top of this file.

    last: score the last so many targets of windows that end where those of `longest` tokens do (plan_same_targets).
    documents: token ids [tokens] of each; dtype: of weights and activations (sums are float32 and wider);
    batch_size: rows of a forward pass (None: TOKENS_AT_ONCE tokens), which changes speed and memory only; label: of
    the progress bar on standard error, None for "T tokens". A model of on_device(model, dtype) is not copied again.
    Returns one object of "results" in the JSON of the command. Raises UserError.
    """
    sizes, where = [len(d) for d in documents], {"offset": offset, "max_windows": max_windows}
    longest = longest if last and longest else seq_len
    stride = longest if stride is None else stride
    if last:
        windows = plan_same_targets(sizes, seq_len, last=last, longest=longest, stride=stride, **where)
    else:
        windows = plan_windows(sizes, seq_len, stride=stride, **where)
    how = {"pattern": pattern, "dtype": dtype, "batch_size": batch_size, "label": label}
    nll = np.concatenate(list(_nll_of_windows(model, documents, windows, seq_len, **how)))
    scored = np.arange(seq_len - 1) >= seq_len - 1 - np.array([[w.scored] for w in windows])
    last_quarter = scored & (np.arange(1, seq_len) >= seq_len - math.ceil(seq_len / 4))
    detail = [
        {"document": w.document, "start": w.start, **_mean(row[-w.scored :])}
        for w, row in zip(windows, nll, strict=True)
    ]
    return {
        "seq_len": seq_len,
        "stride": stride,
        "offset": offset,
        "windows": len(windows),
        "documents": len({w.document for w in windows}),
        "skipped_documents": sum(size < offset + longest for size in sizes),
        **_how(model, pattern),
        **_mean(nll[scored]),
        "stderr": standard_error(nll[scored]),
        "last_quarter": _mean(nll[last_quarter]),
        "windows_detail": detail,
    }


def longlora_windows(tokens: int, seq_len: int) -> list[Window]:
    """The windows of evaluate_as_longlora in a document of so many tokens. Raises UserError if there is none."""
    windows = [Window(0, start, seq_len - 1) for start in range(0, tokens - seq_len, LONGLORA_STRIDE)][:-1]
    if not windows:
        raise UserError(
            f"seq_len={seq_len} needs more than {seq_len + LONGLORA_STRIDE} tokens under this protocol, there are "
            f"{tokens}: use a shorter seq_len or longer text"
        )
    return windows


def evaluate_as_longlora(
    model: LoadedModel,
    ids: np.ndarray,
    seq_len: int,
    *,
    protocol_batch: int = 1,
    max_windows: int | None = None,
    pattern: Pattern = FULL,
    dtype: str = "float32",
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Perplexity of one document, ids [tokens], as LongLoRA's eval.py computes it, to compare with the paper's numbers.

    A window starts every LONGLORA_STRIDE tokens, the last one that fits is left out, and every window scores all its
    targets: most tokens count many times, with little context and with much. The mean is over batches of
    protocol_batch windows (its --batch_size), the last of which may be smaller and weighs as much.
    Returns one object of "results" in the JSON of the command. Raises UserError.
    """
    windows = longlora_windows(len(ids), seq_len)[:max_windows]
    batches = _nll_of_windows(model, [ids], windows, seq_len, pattern=pattern, dtype=dtype, batch_size=batch_size)
    # A float32 for each target of each window would fill the memory.
    nll = np.concatenate([batch.mean(axis=1, dtype=np.float64) for batch in batches])
    mean = float(np.mean([nll[i : i + protocol_batch].mean() for i in range(0, len(nll), protocol_batch)]))
    return {
        "seq_len": seq_len,
        "stride": LONGLORA_STRIDE,
        "windows": len(windows),
        "tokens": len(windows) * (seq_len - 1),
        **_how(model, pattern),
        "nll": mean,
        "perplexity": 2.71828**mean,  # its e
        "stderr": None,
    }


def _how(model: LoadedModel, pattern: Pattern) -> dict[str, Any]:
    rope = model.config.rope_scaling
    shown = rope and {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}
    return {"group_size": pattern.group_size or None, "rope": shown}


def _nll_of_windows(
    model: LoadedModel,
    documents: Sequence[np.ndarray],
    windows: list[Window],
    seq_len: int,
    *,
    pattern: Pattern,
    dtype: str,
    batch_size: int | None,
    label: str | None = None,
) -> Iterator[np.ndarray]:
    """Yields nll [rows, T - 1] of the targets of some windows after the other."""
    largest = max(int(d.max()) for d in documents if len(d))
    if largest >= model.config.vocab_size:
        raise UserError(
            f"token {largest} is outside the model's vocabulary of {model.config.vocab_size}: "
            "tokenize the text with the model's own tokenizer"
        )
    mesh = _mesh_for(model.config, seq_len)
    # Without the rotary embedding, which is an argument: scalings of one model are compiled once.
    config = dataclasses.replace(model.config, rope_scaling=None, max_position_embeddings=1)
    rope = jax.tree.map(jnp.float32, frequencies_of(model.config, seq_len))
    llama = Llama(config, pattern=pattern, dtype=jnp.dtype(dtype), mesh=mesh, quantization=model.quantization)
    # Cast first: a merged kernel that is rounded to bfloat16 is not what was trained.
    cast = dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(_cast_to(dtype), model.params))
    params = jax.device_put(cast.merged(), _shardings(model.config, mesh, model.quantization))
    rows = min(batch_size or max(TOKENS_AT_ONCE // seq_len, 1), len(windows))
    with progress_bar(len(windows), label=label or f"{seq_len:,} tokens", unit="window") as bar:
        for first in range(0, len(windows), rows):
            batch = windows[first : first + rows]
            # The last batch repeats its last window, so that every batch has one shape and is compiled once.
            padded = batch + batch[-1:] * (rows - len(batch))
            tokens = np.stack([documents[w.document][w.start : w.start + seq_len] for w in padded])
            nll = np.asarray(_target_nll(llama, params, tokens, rope))[: len(batch)]
            if not np.isfinite(nll).all():
                raise UserError(
                    f"the model's loss at {seq_len=} is not finite: try --dtype float32, or its weights are damaged"
                )
            yield nll
            bar.update(len(batch))


def _cast_to(dtype: str):
    """A leaf at its path in dtype; what is packed stays as it is."""
    return lambda path, x: x if is_packed([key.key for key in path]) else x.astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def _target_nll(llama: Llama, params, tokens, rope):
    """nll [B, T - 1] of every token [B, T] but the first, given those before it; rope: of Llama.hidden."""
    hidden = llama.apply({"params": params}, tokens, rope=rope, method="hidden")
    targets, softcap = jnp.roll(tokens, -1, axis=1), llama.config.final_logit_softcapping
    return token_nll_on_mesh(hidden, output_kernel(params), targets, llama.mesh, softcap=softcap)[:, :-1]


def _mean(nll: np.ndarray) -> dict[str, Any]:
    mean = float(nll.mean(dtype=np.float64))
    return {"tokens": nll.size, "nll": mean, "perplexity": math.exp(mean)}


def standard_error(nll: np.ndarray) -> float | None:
    """The standard error of the mean of nll [tokens], in nats; None of a single token.

    Neighbouring tokens are hard or easy together, so their plain variance promises too much. One observation is
    a block of BLOCK consecutive targets (smaller if there would be fewer than 16): the variance of a mean of
    clusters, Cochran, Sampling Techniques, 9A.
    """
    size = min(BLOCK, max(nll.size // 16, 1))
    excess = nll.astype(np.float64) - nll.mean(dtype=np.float64)
    blocks = np.add.reduceat(excess, np.arange(0, nll.size, size))
    if blocks.size < 2:
        return None
    return float(np.sqrt(blocks.size / (blocks.size - 1) * np.sum(blocks**2)) / nll.size)
