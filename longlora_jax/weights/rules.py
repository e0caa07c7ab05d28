"""One table of weights for every way in and out: names, shapes and layouts, there and here.

There: Hugging Face's names, [out, in] matrices, one tensor a layer. Here: the nested dict of model/decoder.py, kernels
[in, out] with the heads apart, a leading layer axis. A model in transit is a table {Hugging Face name: Tensor}.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longlora_jax.errors import UserError
from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.tensors import DTYPES, Tensor

Params = dict[str, Any]
Table = Mapping[str, Tensor]


class Rule(NamedTuple):
    """One weight: Hugging Face's name ("{}" stands for the layer) and ours, and both shapes.

    shape is without the layer axis. A kernel is [out, in] there and [in, out] here, with the
    heads split; everything else only splits its heads.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    input_axes: int = 0  # of a kernel: how many axes of shape are read; 0: no kernel

    @property
    def layered(self) -> bool:
        """Whether every layer has its own."""
        return "{}" in self.name

    def names(self, layers: int) -> list[str]:
        """Hugging Face's names of this weight, one a layer."""
        return [self.name.format(i) for i in range(layers)] if self.layered else [self.name]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """One tensor of hf_shape in our layout: a view."""
        return (array.T if self.input_axes else array).reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """One layer of shape in Hugging Face's layout: a view."""
        return array.reshape(self.hf_shape[::-1]).T if self.input_axes else array.reshape(self.hf_shape)

    def axes_in_hf_order(self) -> tuple[int, ...]:
        """The axes of shape in the order in which Hugging Face's layout has them."""
        axes = tuple(range(len(self.shape)))
        return axes[self.input_axes :] + axes[: self.input_axes]


def weight_rules(config: ModelConfig) -> list[Rule]:
    """The one table of weights, for both directions."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def path(name: str, leaf: str) -> tuple[str, ...]:
        return (*(part for part in name.split(".") if part not in ("model", "{}")), leaf)

    def norm(name: str, *shape: int, has_bias: bool = config.norm == "layer") -> list[Rule]:
        shape = shape or (d,)
        leaves = {"weight": "scale"} | ({"bias": "bias"} if has_bias else {})
        return [Rule(f"{name}.{key}", path(name, leaf), shape, (math.prod(shape),)) for key, leaf in leaves.items()]

    def linear(name: str, inputs: tuple, outputs: tuple, has_bias: bool = False) -> list[Rule]:
        size = math.prod(outputs)
        hf_shape = (size, math.prod(inputs))
        kernel = Rule(f"{name}.weight", path(name, "kernel"), inputs + outputs, hf_shape, len(inputs))
        bias = Rule(f"{name}.bias", path(name, "bias"), outputs, (size,))
        return [kernel, bias] if has_bias else [kernel]

    embed, layer = "model.embed_tokens", "model.layers.{}"
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    bias = config.attention_bias or config.qkv_bias
    pre, post = config.norm_placement != "post", config.norm_placement != "pre"
    all_heads = ((n, h), (k, h))
    heads = {"head": ((h,), (h,)), "own_head": all_heads, "projection": all_heads}.get(config.qk_norm)
    head_bias = config.norm == "layer" and config.qk_norm != "own_head"
    return [
        Rule(f"{embed}.weight", path(embed, "embedding"), (v, d), (v, d)),
        *(norm(f"{layer}.input_layernorm") if pre else []),
        *linear(f"{attn}.q_proj", (d,), (n, h), bias),
        *linear(f"{attn}.k_proj", (d,), (k, h), bias),
        *linear(f"{attn}.v_proj", (d,), (k, h), bias),
        *linear(f"{attn}.o_proj", (n, h), (d,), config.attention_bias),
        *(norm(f"{attn}.q_norm", *heads[0], has_bias=head_bias) if heads else []),
        *(norm(f"{attn}.k_norm", *heads[1], has_bias=head_bias) if heads else []),
        *([] if config.shared_norm else norm(f"{layer}.post_attention_layernorm")),
        *(norm(f"{layer}.pre_feedforward_layernorm") if pre and post else []),
        *(norm(f"{layer}.post_feedforward_layernorm") if post else []),
        *(linear(f"{mlp}.gate_proj", (d,), (f,), config.mlp_bias) if config.gated_mlp else []),
        *linear(f"{mlp}.up_proj", (d,), (f,), config.mlp_bias),
        *linear(f"{mlp}.down_proj", (f,), (d,), config.mlp_bias),
        *norm("model.norm"),
        *([] if config.tie_word_embeddings else linear("lm_head", (d,), (v,))),
    ]


def table_faults(config: ModelConfig, table: Table) -> Iterator[str]:
    """Compares the tensors of a model with the ones that its config asks for: names, shapes, dtypes."""
    layers = config.num_hidden_layers
    if layers > len(table) + 1000:  # said at once: a config can ask for more names than memory holds
        yield f"there are {len(table)} tensors, the {layers} layers of config.json need more"
        return
    needed = {name: rule.hf_shape for rule in weight_rules(config) for name in rule.names(layers)}
    for name, shape in needed.items():
        if name not in table:
            yield f"missing tensor {name}"
        elif table[name].shape != shape:
            yield f"{name} has shape {list(table[name].shape)}, it must be {list(shape)}"
    for name, tensor in table.items():
        if name not in needed:
            yield f"unexpected tensor {name}"
        if not isinstance(tensor.dtype, np.dtype):
            yield f"{name} is stored as {tensor.dtype}, it must be one of {', '.join(DTYPES)}"


# Between a param tree and a table


def build_params(config: ModelConfig, table: Table, dtype: str | None = None) -> Params:
    """Reads a table into a tree of numpy arrays, weight by weight; weights that the table lacks are left out.

    dtype: a key of DTYPES, or None for the dtype that each has. A stacked weight whose layers differ becomes
    float32, which holds all of them exactly.
    """
    params: Params = {}
    for rule in weight_rules(config):
        names = rule.names(config.num_hidden_layers)
        if names[0] not in table:
            continue
        kind = DTYPES[dtype] if dtype else stacked_dtype(table, names)
        rows = np.empty((len(names), *rule.shape), kind)
        for row, name in zip(rows, names, strict=True):
            _copy(rule.to_ours(cast(name, table[name].read(), kind)), row)
        set_leaf(params, rule.path, rows if rule.layered else rows[0])
    return params


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source; by strips where source is a transposed view: numpy's own order misses every cache."""
    strip = 32 if source.ndim > 1 and not source.flags.c_contiguous else len(source)
    for start in range(0, len(source), strip):
        target[start : start + strip] = source[start : start + strip]


def stacked_dtype(table: Table, names: Iterable[str]) -> np.dtype:
    """The dtype that holds all of these tensors: their own if it is one, else float32."""
    kinds = {table[name].dtype for name in names}
    kind = kinds.pop() if len(kinds) == 1 else DTYPES["float32"]
    assert isinstance(kind, np.dtype)  # table_faults has said so otherwise
    return kind


def params_table(config: ModelConfig, params: Params) -> dict[str, Tensor]:
    """The table of a param tree (numpy or jax arrays), or of the part of one; adapters are not in it."""
    table = {}
    for rule in weight_rules(config):
        leaf = get_leaf(params, rule.path)
        if leaf is None:
            continue
        for i, name in enumerate(rule.names(config.num_hidden_layers)):

            def read(rule=rule, leaf=leaf, i=i):
                return rule.to_hf(np.asarray(leaf[i] if rule.layered else leaf))

            table[name] = Tensor(np.dtype(leaf.dtype), rule.hf_shape, read)
    return table


def get_leaf(tree: Params, path: Sequence[str]) -> Any:
    """The leaf at a path, None where there is none."""
    node: Any = tree
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def set_leaf(tree: Params, path: tuple[str, ...], leaf: Any) -> None:
    """Puts a leaf in its place."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def flatten(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All (path, leaf) of a tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


# Changing a table


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in dtype, rounded to nearest; raises UserError where float16 cannot hold it."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    if dtype == np.float16 and array.dtype != dtype and np.isinf(result).any():
        raise UserError(f"{name} has values beyond float16's 65504: choose bfloat16 or float32")
    return result


def cast_table(table: Table, dtypes: Callable[[str], np.dtype]) -> dict[str, Tensor]:
    """The table with each tensor in the dtype that dtypes(name) gives."""
    return {
        name: Tensor(kind := dtypes(name), t.shape, lambda name=name, t=t, kind=kind: cast(name, t.read(), kind))
        for name, t in table.items()
    }


ROWS_OF_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")


def with_rows(config: ModelConfig, table: Table) -> dict[str, Tensor]:
    """The table with as many rows of the embedding and the output as the config has tokens: new ones are their mean."""

    def grown(t: Tensor) -> Tensor:
        more = config.vocab_size - t.shape[0] if len(t.shape) == 2 else 0

        def read():
            rows = t.read()
            mean = rows.astype(np.float32).mean(axis=0, keepdims=True).astype(rows.dtype)
            return np.concatenate([rows, np.repeat(mean, more, axis=0)])

        return Tensor(t.dtype, (config.vocab_size, *t.shape[1:]), read) if more > 0 else t

    return {name: grown(t) if name in ROWS_OF_TOKENS else t for name, t in table.items()}


class Adapter(NamedTuple):
    """A low-rank update of one matrix W [out, in]: W + scale * b a. a: [R, in]; b: [out, R]; float32.

    magnitude: DoRA's (arXiv:2402.09353), which the sum is scaled to along norm_axis; None: plain LoRA.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None  # [out], or [in] where norm_axis is 0
    norm_axis: int = 1


def adapters_of(config: ModelConfig, params: Params, scale: float) -> dict[str, Adapter]:
    """The adapters of a param tree, {Hugging Face name of the kernel: Adapter}."""
    adapters = {}
    for rule in weight_rules(config):
        parent = get_leaf(params, rule.path[:-1]) if rule.input_axes else None
        if not isinstance(parent, dict) or "lora_a" not in parent:
            continue
        a, b = (np.asarray(parent[leaf], np.float32) for leaf in ("lora_a", "lora_b"))
        out, inputs = rule.hf_shape
        for i, name in enumerate(rule.names(config.num_hidden_layers)):
            adapters[name] = Adapter(a[i].reshape(inputs, -1).T, b[i].reshape(-1, out).T, scale)
    return adapters


def merge_table(table: Table, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The table with every adapter summed into its matrix, in float32; the sum is not rounded here."""

    def merged(tensor: Tensor, adapter: Adapter) -> Tensor:
        def read() -> np.ndarray:
            update = adapter.b @ adapter.a
            update *= np.float32(adapter.scale)
            update += tensor.read()
            if adapter.magnitude is not None:
                norm = np.linalg.norm(update, axis=adapter.norm_axis)
                update *= np.expand_dims(adapter.magnitude / norm, adapter.norm_axis)
            return update

        return Tensor(DTYPES["float32"], tensor.shape, read)

    return {name: merged(t, adapters[name]) if name in adapters else t for name, t in table.items()}
