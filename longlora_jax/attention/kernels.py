"""The fast ways to compute causal attention, whole or in a window; LongLoRA's groups arrive folded into the batch axis.

No kernel knows about groups or shifts: attend.py cuts a pattern into pieces that are causal inside, and
every piece comes here as rows of a batch. TPUs run JAX's splash attention, NVIDIA's GPUs cuDNN's flash attention where
it can (gpu_fault says where not; segments.py has its packed rows). The XLA kernel below runs on any device: it is the
tiling of FlashAttention-2 (arXiv:2307.08691) written with jax.numpy: blocks of scores are made, used and dropped,
blocks above the diagonal or before the window are never visited, and the backward pass recomputes scores from the saved
log-sum-exp of each row.
"""

import contextlib
import contextvars
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from longlora_jax.attention.segments import segmented_attention, segments_fault

# Finite: a block without any visible key then gives weights and not NaN. They are dropped by the diagonal block,
# which comes last and where every query sees at least itself.
MASKED = -1e30

log = logging.getLogger(__name__)

_target: contextvars.ContextVar[tuple[str | None, str | None]] = contextvars.ContextVar("target", default=(None, None))


@contextlib.contextmanager
def compiled_for(platform: str, capability: str | None = None) -> Iterator[None]:
    """Within it, what is traced is for that platform (tpu, gpu, cpu) and that GPU, whatever this machine has."""
    token = _target.set((platform, capability))
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """The platform that is traced for: compiled_for's, else this machine's."""
    return _target.get()[0] or jax.default_backend()


def kernel_name(dtype=jnp.bfloat16, head_dim: int = 128, softcap: float = 0.0, packed: bool = False) -> str:
    """The kernel that causal_attention runs here without a window, for logs; packed: for rows of several segments."""
    fault = gpu_fault((1, 1, 1, head_dim), dtype, 1, packed, softcap=softcap, capability=device_capability())
    if platform() == "gpu" and not fault:
        return "cudnn's segments on gpu" if packed else "cudnn on gpu"
    return f"splash on {platform()}" if platform() == "tpu" else f"xla-blockwise on {platform()}"


def causal_attention(q, k, v, segment_ids=None, *, window: int = 0, softcap: float = 0.0):
    """Causal attention of each batch row by itself.

    q: [Z, T, N, H]; k, v: [Z, T, K, H] with N a multiple of K (query head n reads kv head n // (N // K));
    segment_ids: [Z, T] int32 or None, tokens see their own segment only, a run of equal ids (none is used twice);
    window: tokens see themselves and the window - 1 before them (0: all before); softcap: scores become
    softcap * tanh(scores / softcap) (0: as they are). Returns [Z, T, N, H] in q's dtype; scores, softmax and sums are
    float32.
    """
    window = 0 if window >= q.shape[1] else window
    if platform() == "tpu":
        return splash_attention(q, k, v, segment_ids, window=window, softcap=softcap)
    if platform() == "gpu":
        packed, cap = segment_ids is not None, device_capability()
        fault = gpu_fault(q.shape, q.dtype, k.shape[2], packed, softcap=softcap, window=window, capability=cap)
        if not fault:
            return segmented_attention(q, k, v, segment_ids) if packed else cudnn_attention(q, k, v, window=window)
        say_once(f"attention runs the blockwise XLA kernel, not cuDNN's: {fault}")
    return blockwise_attention(q, k, v, segment_ids, window=window, softcap=softcap)


def gpu_fault(
    q_shape, dtype, kv_heads: int, segments: bool, *, softcap=0.0, window=0, capability: str | None = None
) -> str:
    """Why cuDNN's flash attention cannot take q [Z, T, N, H] and kv_heads heads of keys and values; "" where it can.

    segments: whether segment ids restrict it; capability: the GPU's, such as "9.0", "" where it is not NVIDIA's, None
    where it is not known. What jax.nn.dot_product_attention refuses, and what would cost it [T, T] memory.
    """
    heads, head_dim = q_shape[2:]
    known = tuple(map(int, capability.split("."))) if capability else None
    if capability == "":
        return "it is made for NVIDIA's GPUs"
    if known and known < (8, 0):
        return f"it needs compute capability 8.0 or later, this GPU has {capability}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    most = 256 if known and known >= (9, 0) else 128  # JAX takes an unknown GPU for one before Hopper, too
    if head_dim % 8 or head_dim > most:
        return f"it takes a head_dim that is a multiple of 8 and at most {most}, not {head_dim}"
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} kv heads"
    if softcap:
        return "scores are capped, and jax.nn.dot_product_attention cannot ask it for that"
    return segments_fault(q_shape, window, capability) if segments else ""


def device_capability() -> str | None:
    """The compute capability of the GPU that is traced for: "" if it is not NVIDIA's, None if there is none."""
    return _target.get()[1] or _capability_here()


@functools.cache
def _capability_here() -> str | None:
    device = jax.local_devices()[0]
    here = device.compute_capability if "cuda" in device.client.platform_version else ""
    return here if device.platform == "gpu" else None


@functools.cache
def say_once(message: str) -> None:
    """Warns in the log, the first time that this is said."""
    log.warning(message)


def cudnn_attention(q, k, v, *, window: int = 0):
    """causal_attention by cuDNN's flash attention, for what gpu_fault has nothing against."""
    t = q.shape[1]
    if t % 2:  # JAX refuses to train on an odd length; the token more lies in the future of every query
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    reach = (window - 1, 0) if window else None  # JAX counts the tokens to the left without the query's own
    options: Any = {"is_causal": True, "local_window_size": reach, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, k, v, **options)[:, :t]


def keeps_cudnn(primitive, *_, **__) -> bool:
    """A remat policy: keeps what cuDNN's backward pass needs of its forward, output and log-sum-exp.

    They are made inside of JAX's own function, where they cannot be given names; without it the backward pass would
    begin by computing attention again.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


@functools.lru_cache(maxsize=8)  # the kernel keeps what it made of the same mask
def causal_mask(t: int, window: int = 0):
    """The causal mask of t tokens, or that of a window, for the splash kernel, ready at once.

    The kernel asks of every block whether all or any of it is seen. JAX's own mask answers with as many bools as the
    block has pairs, which takes minutes at 262,144 tokens; off the diagonal and the window's edge one bool says it, and
    on them the answer depends on how far the keys lie before the queries.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    reach, edges = window or t, {}

    class Quick(splash.Mask):
        def __getitem__(self, index):
            q, k = index
            nearest, farthest = q.start - (k.stop - 1), q.stop - 1 - k.start  # from a query back to a key
            if farthest < 0 or nearest >= reach:
                return np.array([[False]])
            if nearest >= 0 and farthest < reach:
                return np.array([[True]])
            if (nearest, farthest) not in edges:
                edges[nearest, farthest] = super().__getitem__(index)
            return edges[nearest, farthest]

    class Causal(Quick, splash.CausalMask): ...

    class Local(Quick, splash.LocalMask): ...

    return Local((t, t), (window - 1, 0), 0) if window else Causal((t, t))


def splash_attention(q, k, v, segment_ids=None, *, window: int = 0, softcap: float = 0.0, interpret: bool = False):
    """causal_attention by JAX's splash kernel for TPUs: rows padded to blocks, heads to the chip's 128 lanes.

    interpret: run the kernel's program on any device, to test it.
    """
    # Pallas for TPUs takes a second to import, and nothing else needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    z, t, n, h = q.shape
    # Of a block as long as the window half is seen; smaller ones than 512 would cost more than they save.
    largest = max(window, 512) if window else t
    block = next((b for b in (1024, 512, 256) if min(t, largest) >= b and -t % b <= t // 16), 128)
    pad, lanes = -t % block, -h % 128
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, lanes))).swapaxes(1, 2) for x in (q, k, v))
    segments = None
    if segment_ids is not None:  # padding lies in the future of every real query
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
        segments = splash.SegmentIds(q=segment_ids, kv=segment_ids)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([causal_mask(t + pad, window)] * n),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            block_q_dq=block, block_kv_dq=block,  # dq on its own: the fused kernel holds one dq for every kv block
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )  # fmt: skip
    q = q * jnp.asarray(1 / math.sqrt(h), q.dtype)
    out: Any = jax.vmap(kernel)(q, k, v, segments) if segments is not None else jax.vmap(kernel)(q, k, v)
    return out.swapaxes(1, 2)[:, :t, :, :h]


def blockwise_attention(q, k, v, segment_ids=None, *, window: int = 0, softcap: float = 0.0, block: int | None = None):
    """causal_attention in jax.numpy, for any device.

    block: side of a block of scores in tokens; no array is larger than Z * N * T * max(H, block).
    """
    z, t, n, h = q.shape
    kv_heads = k.shape[2]
    rep = n // kv_heads
    assert rep * kv_heads == n, (n, kv_heads)
    # An eighth of what is seen wastes little at its edges; the bounds suit a CPU's cache and its loop overhead.
    block = min(t, block or min(max(min(t, window or t) // 8, 64), 512))
    blocks = -(-t // block)
    pad = blocks * block - t
    if pad:  # padded keys lie in the future of every real query
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    # Blocks first, so that a loop step reads contiguous memory; the queries that share a kv head are rows.
    q = q.reshape(z, blocks, block, kv_heads, rep, h).transpose(1, 0, 3, 4, 2, 5)
    q = q.reshape(blocks, z, kv_heads, rep * block, h)
    k, v = (x.reshape(z, blocks, block, kv_heads, h).transpose(1, 0, 3, 2, 4) for x in (k, v))
    if segment_ids is not None:
        segment_ids = segment_ids.reshape(z, blocks, block).transpose(1, 0, 2)
    out: Any = _blocks(q, k, v, segment_ids, window, softcap)
    out = out.reshape(blocks, z, kv_heads, rep, block, h).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(z, blocks * block, n, h)[:, :t]


def _reach(window: int, block: int) -> tuple[int, int]:
    """How many of the blocks before its own a block of queries sees in a window: (wholly, at all)."""
    return max(window // block - 1, 0), (window + block - 2) // block


def _scores(q, k, segments_q, segments_k, window: int, softcap: float, back=None):
    """Scaled, capped scores [Z, K, rep * b, b] in float32 of a block of queries against a block of keys.

    back: how many blocks the keys lie before the queries, None where all of them may be seen.
    """
    scores = jnp.einsum("zkqh,zksh->zkqs", q, k, preferred_element_type=jnp.float32)
    scores *= 1.0 / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    block = k.shape[-2]
    rep = q.shape[-2] // block
    allowed = None
    if back is not None:
        distance = np.arange(rep * block)[:, None] % block - np.arange(block) + back * block
        allowed = ((distance >= 0) & (distance < window) if window else distance >= 0)[None, None]
    if segments_q is not None:
        same = segments_q[:, :, None] == segments_k[:, None, :]
        same = jnp.tile(same, (1, rep, 1))[:, None]
        allowed = same if allowed is None else same & allowed
    return scores if allowed is None else jnp.where(allowed, scores, MASKED)


def _at(x, i) -> Any:  # None only for None: callers know
    return None if x is None else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocks(q, k, v, segment_ids, window: int, softcap: float) -> jax.Array:
    """q: [n, Z, K, rep * b, H]; k, v: [n, Z, K, b, H]; segment_ids: [n, Z, b] or None. Returns q's shape."""
    return _forward(q, k, v, segment_ids, window, softcap)[0]


def _forward(q, k, v, segment_ids, window: int, softcap: float):
    def query_block(i):
        q_i, seg_i = _at(q, i), _at(segment_ids, i)

        def key_block(j, carry, back=None):
            acc, top, total = carry
            scores = _scores(q_i, _at(k, j), seg_i, _at(segment_ids, j), window, softcap, back)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            decay = jnp.exp(top - new_top)
            acc = acc * decay[..., None] + jnp.einsum(
                "zkqs,zksh->zkqh",
                weights.astype(v.dtype),
                _at(v, j),
                preferred_element_type=jnp.float32,
            )
            return acc, new_top, total * decay + weights.sum(-1)

        rows = q_i.shape[:-1]
        start = (
            jnp.zeros(q_i.shape, jnp.float32),
            jnp.full(rows, MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        whole = 0
        if window:
            whole, touched = (jnp.maximum(i - blocks, 0) for blocks in _reach(window, k.shape[-2]))
            start = jax.lax.fori_loop(touched, whole, lambda j, carry: key_block(j, carry, i - j), start)
        acc, top, total = key_block(i, jax.lax.fori_loop(whole, i, key_block, start), back=0)
        return (acc / total[..., None]).astype(q.dtype), top + jnp.log(total)

    return jax.lax.map(query_block, jnp.arange(q.shape[0]))


def _vjp_forward(q, k, v, segment_ids, window: int, softcap: float):
    # Named for the remat policy that keeps them (model.REMAT): then the backward pass starts without this forward.
    out, log_total = (checkpoint_name(x, "attention") for x in _forward(q, k, v, segment_ids, window, softcap))
    return out, (q, k, v, segment_ids, out, log_total)


def _vjp_backward(window: int, softcap: float, residuals, d_out):
    q, k, v, segment_ids, out, log_total = residuals
    n = q.shape[0]
    scale = 1.0 / math.sqrt(q.shape[-1])
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def key_block(d_q, j):
        k_j, v_j, seg_j = _at(k, j), _at(v, j), _at(segment_ids, j)

        def query_block(i, carry, back=None):
            d_q, d_k, d_v = carry
            q_i, d_out_i = _at(q, i), _at(d_out, i)
            scores = _scores(q_i, k_j, _at(segment_ids, i), seg_j, window, softcap, back)
            weights = jnp.exp(scores - _at(log_total, i)[..., None])
            f32 = {"preferred_element_type": jnp.float32}
            d_v += jnp.einsum("zkqs,zkqh->zksh", weights.astype(q.dtype), d_out_i, **f32)
            d_weights = jnp.einsum("zkqh,zksh->zkqs", d_out_i, v_j, **f32)
            d_scores = weights * (d_weights - _at(delta, i)[..., None]) * scale
            if softcap:  # those that a mask hides have no weight, and their square no room in float32
                d_scores *= 1 - jnp.square(jnp.maximum(scores, -softcap) / softcap)
            d_scores = d_scores.astype(q.dtype)
            d_k += jnp.einsum("zkqs,zkqh->zksh", d_scores, q_i, **f32)
            d_q = d_q.at[i].add(jnp.einsum("zkqs,zksh->zkqh", d_scores, k_j, **f32))
            return d_q, d_k, d_v

        start = (d_q, jnp.zeros(k_j.shape, jnp.float32), jnp.zeros(v_j.shape, jnp.float32))
        whole = n
        if window:
            whole, touched = (jnp.minimum(j + 1 + blocks, n) for blocks in _reach(window, k.shape[-2]))
        carry = jax.lax.fori_loop(j + 1, whole, query_block, query_block(j, start, back=0))
        if window:
            carry = jax.lax.fori_loop(whole, touched, lambda i, carry: query_block(i, carry, i - j), carry)
        d_q, d_k, d_v = carry
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(n))
    return d_q.astype(q.dtype), d_k, d_v, None


_blocks.defvjp(_vjp_forward, _vjp_backward)
