"""Attention of some queries over a set of keys, and over several: joined by the log-sum-exp of their scores.

A chunk of a prompt sees all that was read before and, of itself, what is not ahead; in training a shard sees keys of
other devices beside its own. Each such set needs no mask or a causal one, so that a kernel computes it, whatever the
position: JAX's splash attention on TPUs, cuDNN's flash attention on NVIDIA's GPUs. The sums of two sets (blockwise.py
says what sums are) are put together as those of blocks are in FlashAttention (arXiv:2205.14135).

What joins the results also parts the gradients: given the output and the log-sum-exp of all sets together, the backward
pass of FlashAttention-2 (arXiv:2307.08691) finds the gradients of one set without the others. The functions for the
backward pass alone are not public, so that another JAX than those known trains by blockwise.py, and the log says so.
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlora_jax.attention.blockwise import (
    MASKED,
    NOBODY,
    Rules,
    blockwise_gradients,
    blockwise_sums,
    divided,
    padded,
)
from longlora_jax.attention.kernels import device_capability, gpu_fault, platform, say_once, splash_kernel
from longlora_jax.attention.segments import jax_fault

LEAST = 128  # queries of a chunk: a kernel's block; of fewer, the scores are small enough to be made
_SPLASH_BACKWARD = (  # its parameters in JAX 0.10.2 and 0.11.2
    *("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function"),
    *("attn_logits_soft_cap", "interpret", "res", "do"),
)


class Keys(NamedTuple):
    """A set of keys and values [Z, S, K, H] for one kernel, or [Z, K, S, H] where heads are first.

    segments: [Z, S] int32, or None; count: [Z] int32, a row sees its first so many keys, None: all.
    """

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None = None
    count: jax.Array | None = None


class Queries(NamedTuple):
    """Which queries see a set of keys: the first so many of them, None: all; turned: in reverse order, where causal."""

    first: int | None = None
    turned: bool = False


def partial_kernel(q_shape, dtype, kv_heads: int, packed: bool, softcap: float = 0.0) -> str:
    """Which kernel computes a set of keys for q [Z, T, N, H]: splash, cudnn or blockwise. The log says why the last."""
    kernel, fault = _choice(q_shape, dtype, kv_heads, packed, softcap)
    if fault:
        say_once(f"attention over keys of several devices runs the blockwise XLA kernel: {fault}")
    return kernel


def _choice(q_shape, dtype, kv_heads: int, packed: bool, softcap: float) -> tuple[str, str]:
    """partial_kernel, and why it is not the platform's own."""
    fault = ""
    if platform() == "tpu" and not (fault := splash_fault()):
        return "splash", ""
    if platform() == "gpu":
        fault = gpu_fault(q_shape, dtype, kv_heads, False, softcap=softcap, capability=device_capability())
        fault = fault or ("rows are packed" if packed else "")
        if not fault and jax_fault(jax.__version_info__):
            fault = f"cuDNN's backward pass is not public in JAX, and that of {jax.__version__} is not known"
        if not fault:
            return "cudnn", ""
    return "blockwise", fault


def slower_in_sets(q_shape, dtype, kv_heads: int, packed: bool, softcap: float = 0.0) -> bool:
    """Whether causal_attention has a fast kernel here and a set of keys has none.

    So it is of packed rows on Hopper GPUs, whose kernel gives no log-sum-exp, and where this JAX is not known.
    """
    options = {"softcap": softcap, "capability": device_capability()}
    fast = platform() == "tpu" or (platform() == "gpu" and not gpu_fault(q_shape, dtype, kv_heads, packed, **options))
    return fast and _choice(q_shape, dtype, kv_heads, packed, softcap)[0] == "blockwise"


def splash_fault() -> str:
    """Why this JAX is not trusted with splash's function for the backward pass, which is not public."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    backward = getattr(splash_attention_kernel, "_splash_attention_bwd", None)
    known = (0, 10, 2) <= jax.__version_info__ < (0, 12)
    if known and backward is not None and tuple(inspect.signature(backward).parameters) == _SPLASH_BACKWARD:
        return ""
    return f"splash's backward pass is not public, and that of JAX {jax.__version__} is not known"


def chunk_kernel(q_shape, dtype, kv_heads: int, keys: int, *, softcap: float = 0.0) -> str:
    """Which kernel computes sums for q [Z, N, T, H] of a prompt and sets of so many keys: splash, cudnn, "" for none.

    As causal_attention chooses, but that neither takes few tokens.
    """
    z, n, t, h = q_shape
    if t < LEAST or keys % LEAST:
        return ""
    if platform() == "gpu":
        options = {"softcap": softcap, "capability": device_capability()}
        if not (fault := gpu_fault((z, t, n, h), dtype, kv_heads, False, **options)):
            return "cudnn"
        say_once(f"prompts are read by blocks of XLA's, not by cuDNN's attention: {fault}")
        return ""
    return "splash" if platform() == "tpu" else ""


def sums_of(kernel: str, q, segments, keys: Keys, rules: Rules, *, heads_first: bool = False):
    """Sums of q [Z, T, N, H] over a set of keys; float32, but for values that a kernel gives in q's dtype.

    segments: [Z, T] or None, as the keys'. heads_first: q and out are [Z, N, T, H], keys and values [Z, K, S, H], as
    caches have them. A query that sees nothing has no weight beside others: its score is about MASKED, or below.
    """
    tokens = 2 if heads_first else 1
    if kernel == "cudnn":
        found = _cudnn_part(q, keys, rules, tokens)
    else:
        marks = _marks(segments, keys, q.shape[tokens], keys.k.shape[tokens])
        run = {"splash": splash_part, "blockwise": blockwise_sums}[kernel]
        swap = tuple if heads_first == (kernel == "splash") else _swapped
        found = swap(run(*swap((q, keys.k, keys.v)), *marks, rules))
    # A log-sum-exp is rounded where scores are large: only kernels that give nothing else are joined by it.
    return found if kernel == "blockwise" else (*found, jnp.ones_like(found[1]))


def gradients_of(kernel: str, q, segments, keys: Keys, found, d_out, rules: Rules):
    """Gradients for q, k and v of attention over a set of keys, and others; found: (out, log-sum-exp) of all together.

    Shapes: as sums_of's, log-sum-exp [Z, T, N] and d_out as q.
    """
    if kernel == "cudnn":
        return _cudnn_gradients(q, keys, found, d_out, rules)
    marks = _marks(segments, keys, q.shape[1], keys.k.shape[1])
    run = {"splash": splash_gradients, "blockwise": blockwise_gradients}[kernel]
    swap = _swapped if kernel == "splash" else tuple
    q, k, v, found, d_out = swap((q, keys.k, keys.v, found, d_out))
    return swap(run(q, k, v, *marks, found, d_out, rules))


def join(one, other):
    """The sums of two sets of keys together; float32."""
    top = jnp.maximum(one[1], other[1])
    left, right = jnp.exp(one[1] - top), jnp.exp(other[1] - top)
    acc = one[0].astype(jnp.float32) * left[..., None] + other[0].astype(jnp.float32) * right[..., None]
    return acc, top, one[2] * left + other[2] * right


def join_over(sums, axes: tuple[str, ...]):
    """The sums of what all devices along some axes of the mesh hold together, inside of shard_map; float32."""
    if not axes:
        return sums
    acc, own, total = sums
    top = jax.lax.pmax(own, axes)
    share = jnp.exp(own - top)
    acc, total = jax.lax.psum((acc * share[..., None], total * share), axes)
    return acc, top, total


def attend_sets(q, segments, sets, softcap: float):
    """Softmax attention of q [Z, T, N, H] over several sets of keys together, each seen under rules of its own.

    sets: [(Keys, Queries, Rules)], the first with every query's own key. Returns [Z, T, N, H] in q's dtype.
    """
    keys, queries, rules = zip(*sets, strict=True)
    packed = segments is not None
    kernel = partial_kernel(q.shape, q.dtype, keys[0].k.shape[2], packed, softcap)
    return _attend_sets(q, segments, keys, queries, tuple(x._replace(softcap=softcap) for x in rules), kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend_sets(q, segments, keys, queries, rules, kernel: str):
    return _sets_forward(q, segments, keys, queries, rules, kernel)[0]


def _taken(x, queries: Queries):
    """What of x [Z, T, ...] belongs to those queries."""
    if x is None:
        return None
    x = x[:, : queries.first]
    return jnp.flip(x, 1) if queries.turned else x


def _placed(x, queries: Queries, t: int, fill: float = 0):
    """_taken's x among t queries."""
    return padded(jnp.flip(x, 1) if queries.turned else x, t, fill)


def _sets_forward(q, segments, keys, queries, rules, kernel: str):
    together = None
    for one, some, rule in zip(keys, queries, rules, strict=True):
        sums = sums_of(kernel, _taken(q, some), _taken(segments, some), one, rule)
        sums = tuple(_placed(x, some, q.shape[1], fill) for x, fill in zip(sums, (0, MASKED, 0), strict=True))
        together = sums if together is None else join(together, sums)
    out, log_total = divided(together)
    # Named for the remat policy that keeps them (model.REMAT), as the kernels of whole rows do.
    out, log_total = checkpoint_name(out.astype(q.dtype), "attention"), checkpoint_name(log_total, "attention")
    return out, (q, segments, keys, out, log_total)


def _sets_backward(queries, rules, kernel: str, residuals, d_out):
    q, segments, keys, *given = residuals
    d_q, d_keys = jnp.zeros(q.shape, jnp.float32), []
    for one, some, rule in zip(keys, queries, rules, strict=True):
        mine, of_mine, out, log_total, d_mine = (_taken(x, some) for x in (q, segments, *given, d_out))
        d_one, d_k, d_v = gradients_of(kernel, mine, of_mine, one, (out, log_total), d_mine, rule)
        d_q += _placed(d_one, some, q.shape[1])
        d_keys.append(Keys(d_k, d_v))
    return d_q.astype(q.dtype), None, tuple(d_keys)


_attend_sets.defvjp(_sets_forward, _sets_backward)


def _marks(segments, keys: Keys, t: int, s: int):
    """Segments of t queries and s keys that say which keys are seen, for kernels that take no count."""
    if keys.count is None:
        return segments, keys.segments
    z, theirs = len(keys.count), keys.segments
    if segments is None or theirs is None:
        segments, theirs = jnp.zeros((z, t), jnp.int32), jnp.zeros((z, s), jnp.int32)
    return segments, jnp.where(jnp.arange(s)[None] < keys.count[:, None], theirs, NOBODY)


def _swapped(tree):
    """Tokens and heads in each other's place."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), tree)


def splash_part(q, k, v, segments_q, segments_k, rules: Rules, interpret: bool = False):
    """(out [Z, N, T, H] in q's dtype, log-sum-exp [Z, N, T] f32) of q [Z, N, T, H] over k and v [Z, K, S, H], by JAX's
    splash kernel for TPUs; segments as blockwise_sums'.

    interpret: run the kernel's program on any device, to test it.
    """
    kernel, args = splash_kernel(q, k, v, segments_q, segments_k, rules, save_residuals=True, interpret=interpret)
    out, (log_total,) = jax.vmap(kernel)(*args)
    t, h = q.shape[2:]
    return out[:, :, :t, :h], log_total[:, :, :t]


def splash_gradients(q, k, v, segments_q, segments_k, found, d_out, rules: Rules, interpret: bool = False):
    """blockwise_gradients by JAX's splash kernel for TPUs, heads before tokens, as splash_part."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    kernel, args = splash_kernel(q, k, v, segments_q, segments_k, rules, save_residuals=True, interpret=interpret)
    t, lanes = args[0].shape[2:]
    out, d_out = (padded(x, t, axis=2, lanes=lanes) for x in (found[0], d_out))
    # Queries that are padding get no weights, as in blockwise_gradients.
    log_total = padded(found[1], t, -MASKED, axis=2)
    names = ("mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function")
    options = {name: kernel.kwargs[name] for name in (*names, "attn_logits_soft_cap", "interpret")}

    def row(q, k, v, segments, out, log_total, d_out):
        residuals = (q, k, v, segments, None, out, log_total, *masks)
        return splash_attention_kernel._splash_attention_bwd(True, res=residuals, do=d_out, **options)[3:6]

    def flat(mask):
        blocks = mask.partial_mask_blocks
        return mask if blocks is None else mask._replace(partial_mask_blocks=blocks.reshape(-1, *blocks.shape[-2:]))

    masks = flat(kernel.dq_mask_info), flat(kernel.dkv_mask_info)
    grads = jax.vmap(row)(*args, out, log_total, d_out)
    d_q, d_k, d_v = (d[:, :, : x.shape[2], : x.shape[3]] for d, x in zip(grads, (q, k, v), strict=True))
    return d_q * jnp.asarray(1 / math.sqrt(q.shape[3]), q.dtype), d_k, d_v


def _cudnn_given(q, keys: Keys, rules: Rules, tokens: int):
    """(q, k, v, lengths of queries and keys or None, options) for JAX's calls of cuDNN, tokens made even.

    tokens: their axis, 1 or 2.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    count, s = keys.count, keys.k.shape[tokens]
    if count is None and s % 2 and not rules.causal:
        count = jnp.full(len(q), s, jnp.int32)
    q, k, v = (padded(x, 2, axis=tokens) for x in (q, keys.k, keys.v))  # see kernels.cudnn_attention
    kinds = (MaskType.NO_MASK, MaskType.CAUSAL) if count is None else (MaskType.PADDING, MaskType.PADDING_CAUSAL)
    options = {"mask_type": kinds[rules.causal], "scale": 1 / math.sqrt(q.shape[-1])}
    options["sliding_window_length"] = rules.window or None
    lengths = None if count is None else (jnp.full_like(count, q.shape[tokens]), jnp.maximum(count, 1))
    return q, k, v, lengths, options


def _cudnn_part(q, keys: Keys, rules: Rules, tokens: int):
    """(out, log-sum-exp) by cuDNN's flash attention, where gpu_fault finds nothing; tokens: their axis, 1 or 2."""
    # jax.nn.dot_product_attention calls this function, and rounds the log-sum-exp to the dtype of q: three digits.
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    t = q.shape[tokens]
    q, k, v, lengths, options = _cudnn_given(q, keys, rules, tokens)
    options |= {"qkv_layout": ("BTNH", "BNTH")[tokens - 1], "return_residual": True}
    if lengths is not None:
        options |= {"q_seqlen": lengths[0], "kv_seqlen": lengths[1]}
    found: Any = dot_product_attention(q, k, v, **options)
    out, log_total = found
    if keys.count is not None:
        log_total = jnp.where((keys.count > 0)[:, None, None], log_total, MASKED)
    log_total = log_total if tokens == 2 else log_total.swapaxes(1, 2)
    return tuple(jax.lax.slice_in_dim(x, 0, t, axis=tokens) for x in (out, log_total))


def _cudnn_gradients(q, keys: Keys, found, d_out, rules: Rules):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    t, s = q.shape[1], keys.k.shape[1]
    q, k, v, lengths, options = _cudnn_given(q, keys, rules, 1)
    log_total = padded(found[1], 2, -MASKED).swapaxes(1, 2)
    nothing = jnp.zeros(0, q.dtype)
    residuals = (q, k, v, nothing, *(lengths or (nothing, nothing)), *(nothing,) * 4, log_total, padded(found[0], 2))
    options |= {"seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False), "is_training": True}
    options |= {"layout": cudnn.AttentionLayout.BTNH.value, "return_residual": False}
    grads = cudnn._dot_product_attention_bwd_rule(**options, res=residuals, grad_output=padded(d_out, 2))
    d_q, d_k, d_v = grads[0][:, :t], grads[1][:, :s], grads[2][:, :s]
    if keys.count is None:
        return d_q, d_k, d_v
    some, seen = (x[..., None, None] for x in (keys.count[:, None] > 0, jnp.arange(s)[None] < keys.count[:, None]))
    return jnp.where(some, d_q, 0), jnp.where(seen, d_k, 0), jnp.where(seen, d_v, 0)
