"""A chunk of queries against a piece of the keys before it, or against its own: attention in parts.

Where a prompt is read in chunks, a chunk sees all that came before and, of itself, what is not ahead. The first needs
no mask and the second no offset, so that the kernels of training (kernels.py) compute either, whatever the position.
Parts are put together by the log-sum-exp of their scores, as blocks are in FlashAttention (arXiv:2205.14135): by `join`
on one device, by `join_over` those of devices that hold a piece each. What no kernel computes is made of small blocks
of scores (`block_scores`, `add_block`), under any mask.

Sums are a softmax that is not yet divided: (weighted values [..., H], largest score [...], sum of weights [...]), f32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from longlora_jax.attention.blockwise import MASKED
from longlora_jax.attention.kernels import causal_mask, device_capability, gpu_fault, platform, say_once

LEAST = 128  # queries: a kernel's block; of fewer, the scores are small enough to be made


def chunk_kernel(q_shape, dtype, kv_heads: int, keys: int, *, softcap: float = 0.0) -> str:
    """Which kernel attend_piece runs for q [B, N, T, H] against pieces of so many keys: splash, cudnn, or "" for none.

    As causal_attention chooses, but that neither takes few tokens.
    """
    b, n, t, h = q_shape
    if t < LEAST or keys % LEAST:
        return ""
    if platform() == "gpu":
        options = {"softcap": softcap, "capability": device_capability()}
        if not (fault := gpu_fault((b, t, n, h), dtype, kv_heads, False, **options)):
            return "cudnn"
        say_once(f"prompts are read by blocks of XLA's, not by cuDNN's attention: {fault}")
        return ""
    return "splash" if platform() == "tpu" else ""


def attend_piece(kernel: str, q, k, v, counts=None, *, softcap: float = 0.0):
    """Softmax attention of q [B, N, T, H] over k, v [B, K, S, H], not causal, and its log-sum-exp, as sums.

    counts: [B] int32, a row sees its first so many keys (none: the sums have no weight beside others); None: S is T,
    and attention is causal. kernel: of chunk_kernel. Scores and sums are float32, and so is what is returned.
    """
    run = {"splash": splash_piece, "cudnn": cudnn_piece}[kernel]
    out, log_total = run(q, k, v, counts, softcap=softcap)
    if counts is not None:
        log_total = jnp.where((counts > 0)[:, None, None], log_total, MASKED)
    return out.astype(jnp.float32), log_total, jnp.ones_like(log_total)


def splash_piece(q, k, v, counts=None, *, softcap: float = 0.0, interpret: bool = False):
    """(out [B, N, T, H] in q's dtype, log-sum-exp [B, N, T] f32) of attend_piece by JAX's splash kernel for TPUs.

    interpret: run the kernel's program on any device, to test it.
    """
    # Pallas for TPUs takes a second to import, and nothing else needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, n, t, h = q.shape
    block_q = _block(t)
    pad, lanes = -t % block_q, -h % 128
    q = jnp.pad(q * jnp.asarray(1 / math.sqrt(h), q.dtype), ((0, 0), (0, 0), (0, pad), (0, lanes)))
    own = pad if counts is None else 0  # padding lies in the future of every real query
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, own), (0, lanes))) for x in (k, v))
    t_padded, s = t + pad, k.shape[2]
    block_kv = block_q if counts is None else _block(s)
    mask = causal_mask(t_padded) if counts is None else splash.FullMask((t_padded, s))
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * n),
        block_sizes=splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    if counts is None:
        found: Any = jax.vmap(kernel)(q, k, v)
    else:
        seen = (jnp.arange(s)[None] >= counts[:, None]).astype(jnp.int32)  # what is seen is of the queries' segment
        found = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q=jnp.zeros((len(q), t_padded), jnp.int32), kv=seen))
    out, (log_total,) = found
    return out[:, :, :t, :h], log_total[:, :, :t]


def _block(tokens: int) -> int:
    """The largest block that wastes little on so many tokens."""
    return next((b for b in (1024, 512, 256) if tokens >= b and -tokens % b <= tokens // 16), 128)


def cudnn_piece(q, k, v, counts=None, *, softcap: float = 0.0):
    """As splash_piece, by cuDNN's flash attention, for what gpu_fault has nothing against."""
    # jax.nn.dot_product_attention calls this function, and rounds the log-sum-exp to the dtype of q: three digits.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    assert not softcap, "gpu_fault refuses it"
    options: Any = {"scale": 1 / math.sqrt(q.shape[-1]), "qkv_layout": "BNTH", "return_residual": True}
    t = q.shape[2]
    if counts is None:
        options["mask_type"] = MaskType.CAUSAL
    else:
        options |= {"mask_type": MaskType.PADDING, "kv_seqlen": jnp.maximum(counts, 1)}
        options["q_seqlen"] = jnp.full_like(counts, t)
    if t % 2:  # see kernels.cudnn_attention
        q, *own = (jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))) for x in ((q, k, v) if counts is None else (q,)))
        k, v = own or (k, v)
    both: Any = dot_product_attention(q, k, v, **options)
    out, log_total = both
    return out[:, :, :t], log_total[:, :, :t]


def nothing(shape):
    """Sums of no keys for queries of a shape [..., H]."""
    rows = shape[:-1]
    return jnp.zeros(shape, jnp.float32), jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)


def by_kv_head(q, kv_heads: int):
    """[B, T, N, H] as [B, K, N/K, T, H]."""
    b, t, n, h = q.shape
    return q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def block_scores(q, keys, seen, softcap: float | None):
    """Scaled scores [B, K, R, T, s] in float32 of by_kv_head's queries and keys [B, K, s, H]; seen: [B, T, s]."""
    scores = jnp.einsum("bkrth,bksh->bkrts", q, keys, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    return jnp.where(seen[:, None, None], scores, MASKED)


def add_block(sums, scores, values):
    """Sums of by_kv_head's queries with those of a block more: block_scores and values [B, K, s, H]."""
    acc, top, total = sums
    new_top = jnp.maximum(top, scores.max(-1))
    # Where nothing was seen yet all weights are one: the first score that counts makes them vanish.
    weights, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
    new = jnp.einsum("bkrts,bksh->bkrth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return acc * decay[..., None] + new, new_top, total * decay + weights.sum(-1)


def join(one, other):
    """The sums of two sets of keys together."""
    top = jnp.maximum(one[1], other[1])
    left, right = jnp.exp(one[1] - top), jnp.exp(other[1] - top)
    acc = one[0] * left[..., None] + other[0] * right[..., None]
    return acc, top, one[2] * left + other[2] * right


def join_over(sums, axes: tuple[str, ...]):
    """The sums of what all devices along some axes of the mesh hold together, inside of shard_map."""
    if not axes:
        return sums
    acc, own, total = sums
    top = jax.lax.pmax(own, axes)
    share = jnp.exp(own - top)
    acc, total = jax.lax.psum((acc * share[..., None], total * share), axes)
    return acc, top, total


def mean_of(sums):
    """[B, T, N, H] float32 of the sums of by_kv_head's queries."""
    acc, _, total = sums
    out = acc / total[..., None]
    b, kv_heads, rep, t, h = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, kv_heads * rep, h)
