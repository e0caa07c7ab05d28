"""Attention over several sets of keys, with gradients: each set by a kernel, joined by the log-sum-exp of their scores.

What joins the results also parts the gradients: given the output and the log-sum-exp of all sets together, the backward
pass of FlashAttention-2 (arXiv:2307.08691) finds the gradients of one set without the others. TPUs run JAX's splash
attention and NVIDIA's GPUs cuDNN's flash attention; their functions for the backward pass alone are not public, so that
another JAX than those known runs blockwise.py, and the log says so.
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlora_jax.attention.blockwise import MASKED, NOBODY, Rules, blockwise_gradients, blockwise_sums
from longlora_jax.attention.kernels import causal_mask, device_capability, gpu_fault, platform, say_once
from longlora_jax.attention.segments import jax_fault

_SPLASH_BACKWARD = (  # its parameters in JAX 0.10.2 and 0.11.2
    *("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function"),
    *("attn_logits_soft_cap", "interpret", "res", "do"),
)


class Keys(NamedTuple):
    """A set of keys and values [Z, S, K, H] for one kernel.

    segments: [Z, S] int32, or None; count: int32 [], its first so many keys are seen, None: all.
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


def sums_of(kernel: str, q, segments, keys: Keys, rules: Rules):
    """Attention of q [Z, T, N, H] over a set of keys: (out, as q; log-sum-exp [Z, N, T] f32).

    segments: [Z, T] or None, as the keys'. The log-sum-exp of a query that sees nothing is about MASKED, or below.
    """
    if kernel == "cudnn":
        return _cudnn_sums(q, keys, rules)
    segments, keys = _marked(q, segments, keys)
    run = {"splash": splash_sums, "blockwise": blockwise_sums}[kernel]
    return run(q, keys.k, keys.v, segments, keys.segments, rules)


def gradients_of(kernel: str, q, segments, keys: Keys, sums, d_out, rules: Rules):
    """Gradients (q, k, v) of attention over a set of keys, and others; sums: (out, log-sum-exp) of all together."""
    if kernel == "cudnn":
        return _cudnn_gradients(q, keys, sums, d_out, rules)
    segments, keys = _marked(q, segments, keys)
    run = {"splash": splash_gradients, "blockwise": blockwise_gradients}[kernel]
    return run(q, keys.k, keys.v, segments, keys.segments, sums, d_out, rules)


def join(one, other):
    """The sums of two sets of keys together; out is float32."""
    (out, log_total), (more, log_more) = one, other
    both = jnp.logaddexp(log_total, log_more)

    def share(x, log_x):
        return x.astype(jnp.float32) * jnp.exp(log_x - both).swapaxes(1, 2)[..., None]

    return share(out, log_total) + share(more, log_more), both


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


def _taken(x, queries: Queries, axis: int = 1):
    """What of x belongs to those queries."""
    if x is None:
        return None
    x = jax.lax.slice_in_dim(x, 0, queries.first, axis=axis)
    return jnp.flip(x, axis) if queries.turned else x


def _placed(x, queries: Queries, t: int, axis: int = 1, fill: float = 0.0):
    """_taken's x among t queries."""
    x = jnp.flip(x, axis) if queries.turned else x
    return jnp.pad(x, [(0, t - x.shape[i] if i == axis else 0) for i in range(x.ndim)], constant_values=fill)


def _sets_forward(q, segments, keys, queries, rules, kernel: str):
    t, sums = q.shape[1], None
    for one, some, rule in zip(keys, queries, rules, strict=True):
        out, log_total = sums_of(kernel, _taken(q, some), _taken(segments, some), one, rule)
        found = _placed(out, some, t), _placed(log_total, some, t, axis=2, fill=MASKED)
        sums = found if sums is None else join(sums, found)
    assert sums is not None
    # Named for the remat policy that keeps them (model.REMAT), as the kernels of whole rows do.
    out, log_total = checkpoint_name(sums[0].astype(q.dtype), "attention"), checkpoint_name(sums[1], "attention")
    return out, (q, segments, keys, out, log_total)


def _sets_backward(queries, rules, kernel: str, residuals, d_out):
    q, segments, keys, out, log_total = residuals
    d_q, d_keys = jnp.zeros(q.shape, jnp.float32), []
    for one, some, rule in zip(keys, queries, rules, strict=True):
        sums = _taken(out, some), _taken(log_total, some, axis=2)
        mine, d_k, d_v = gradients_of(
            kernel, _taken(q, some), _taken(segments, some), one, sums, _taken(d_out, some), rule
        )
        d_q += _placed(mine, some, q.shape[1])
        d_keys.append(Keys(d_k, d_v))
    return d_q.astype(q.dtype), None, tuple(d_keys)


_attend_sets.defvjp(_sets_forward, _sets_backward)


def _marked(q, segments, keys: Keys):
    """Segments that say which keys are seen, for kernels that take no count."""
    if keys.count is None:
        return segments, keys
    if segments is None:
        segments, theirs = jnp.zeros(q.shape[:2], jnp.int32), jnp.zeros(keys.k.shape[:2], jnp.int32)
    else:
        theirs = keys.segments
        assert theirs is not None
    theirs = jnp.where(jnp.arange(keys.k.shape[1])[None] < keys.count, theirs, NOBODY)
    return segments, keys._replace(segments=theirs, count=None)


def _splash(q, k, v, segments_q, segments_k, rules: Rules, interpret: bool):
    """JAX's splash kernel for a set of keys, its arguments, and how it wants what else is [Z, T, N, H]."""
    # Pallas for TPUs takes a second to import, and nothing else needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (t, n, h), s = q.shape[1:], k.shape[1]

    def side(tokens):  # see kernels.splash_attention
        most = max(rules.window, 512) if rules.window else tokens
        return next((b for b in (1024, 512, 256) if min(tokens, most) >= b and -tokens % b <= tokens // 16), 128)

    def pad(x, tokens=t, fill=0.0):
        pads = (0, 0), (0, -tokens % side(tokens)), (0, 0), (0, -h % 128 if x.shape[-1] == h else 0)
        return jnp.pad(x, pads, constant_values=fill).swapaxes(1, 2)

    if segments_k is None and not rules.causal and s % side(s):
        segments_q, segments_k = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    q, k, v = pad(q * jnp.asarray(1 / math.sqrt(h), q.dtype)), pad(k, s), pad(v, s)
    segments = None
    if segments_k is not None:  # causal: padding lies in the future of every real query
        segments_q = jnp.pad(segments_q, ((0, 0), (0, q.shape[2] - t)))
        segments_k = jnp.pad(segments_k, ((0, 0), (0, k.shape[2] - s)), constant_values=NOBODY)
        segments = splash.SegmentIds(q=segments_q, kv=segments_k)
    shape = q.shape[2], k.shape[2]
    mask = causal_mask(shape[0], rules.window) if rules.causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * n),
        block_sizes=splash.BlockSizes(
            block_q=side(t), block_kv=side(s), block_kv_compute=side(s),
            block_q_dkv=side(t), block_kv_dkv=side(s), block_kv_dkv_compute=side(s),
            block_q_dq=side(t), block_kv_dq=side(s),
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        attn_logits_soft_cap=rules.softcap or None,
        interpret=interpret,
    )  # fmt: skip
    return kernel, (q, k, v, segments), pad


def splash_sums(q, k, v, segments_q, segments_k, rules: Rules, interpret: bool = False):
    """blockwise_sums by JAX's splash kernel for TPUs; interpret: its program on any device, to test it."""
    kernel, args, _ = _splash(q, k, v, segments_q, segments_k, rules, interpret)
    out, (log_total,) = jax.vmap(kernel)(*args)
    t, h = q.shape[1], q.shape[3]
    return out.swapaxes(1, 2)[:, :t, :, :h], log_total[:, :, :t]


def splash_gradients(q, k, v, segments_q, segments_k, sums, d_out, rules: Rules, interpret: bool = False):
    """blockwise_gradients by JAX's splash kernel for TPUs; interpret: its program on any device, to test it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    kernel, args, pad = _splash(q, k, v, segments_q, segments_k, rules, interpret)
    out, log_total = sums
    # Queries that are padding get no weights, as in blockwise_gradients.
    log_total = pad(log_total.swapaxes(1, 2)[..., None], fill=-MASKED)[..., 0]
    names = ("mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function")
    options = {name: kernel.kwargs[name] for name in (*names, "attn_logits_soft_cap", "interpret")}

    def row(q, k, v, segments, out, log_total, d_out):
        residuals = (q, k, v, segments, None, out, log_total, *masks)
        return splash_attention_kernel._splash_attention_bwd(True, res=residuals, do=d_out, **options)[3:6]

    def flat(mask):
        blocks = mask.partial_mask_blocks
        return mask if blocks is None else mask._replace(partial_mask_blocks=blocks.reshape(-1, *blocks.shape[-2:]))

    masks = flat(kernel.dq_mask_info), flat(kernel.dkv_mask_info)
    d_q, d_k, d_v = (x.swapaxes(1, 2) for x in jax.vmap(row)(*args, pad(out), log_total, pad(d_out)))
    (t, h), s = (q.shape[1], q.shape[3]), k.shape[1]
    return (d_q[:, :t, :, :h] * jnp.asarray(1 / math.sqrt(h), q.dtype)), d_k[:, :s, :, :h], d_v[:, :s, :, :h]


def _cudnn_given(q, keys: Keys, rules: Rules):
    """(q, k, v, lengths of queries and keys or None, options) for JAX's calls of cuDNN, tokens made even."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    count, (z, s) = keys.count, keys.k.shape[:2]
    if count is None and s % 2 and not rules.causal:
        count = jnp.int32(s)
    q, k, v = (_even(x) for x in (q, keys.k, keys.v))
    kinds = (MaskType.NO_MASK, MaskType.CAUSAL) if count is None else (MaskType.PADDING, MaskType.PADDING_CAUSAL)
    options = {"mask_type": kinds[rules.causal], "scale": 1 / math.sqrt(q.shape[-1])}
    options["sliding_window_length"] = rules.window or None
    lengths = (
        None if count is None else (jnp.full(z, q.shape[1], jnp.int32), jnp.broadcast_to(jnp.maximum(count, 1), z))
    )
    return q, k, v, lengths, options


def _even(x, axis: int = 1, fill: float = 0.0):
    """An odd number of tokens and one more: see kernels.cudnn_attention."""
    pads = [(0, x.shape[i] % 2 if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads, constant_values=fill)


def _cudnn_sums(q, keys: Keys, rules: Rules):
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    t = q.shape[1]
    q, k, v, lengths, options = _cudnn_given(q, keys, rules)
    if lengths is not None:
        options |= {"q_seqlen": lengths[0], "kv_seqlen": lengths[1]}
    found: Any = dot_product_attention(q, k, v, return_residual=True, **options)
    out, log_total = found
    if keys.count is not None:
        log_total = jnp.where(keys.count > 0, log_total, MASKED)
    return out[:, :t], log_total[:, :, :t]


def _cudnn_gradients(q, keys: Keys, sums, d_out, rules: Rules):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    t, s = q.shape[1], keys.k.shape[1]
    q, k, v, lengths, options = _cudnn_given(q, keys, rules)
    out, log_total = _even(sums[0]), _even(sums[1], axis=2, fill=-MASKED)
    nothing = jnp.zeros(0, q.dtype)
    residuals = (q, k, v, nothing, *(lengths or (nothing, nothing)), *(nothing,) * 4, log_total, out)
    options |= {"seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False), "is_training": True}
    options |= {"layout": cudnn.AttentionLayout.BTNH.value, "return_residual": False}
    found = cudnn._dot_product_attention_bwd_rule(**options, res=residuals, grad_output=_even(d_out))[:3]
    d_q, d_k, d_v = found[0][:, :t], found[1][:, :s], found[2][:, :s]
    if keys.count is None:
        return d_q, d_k, d_v
    seen = (jnp.arange(s) < keys.count)[None, :, None, None]
    return jnp.where(keys.count > 0, d_q, 0), jnp.where(seen, d_k, 0), jnp.where(seen, d_v, 0)
