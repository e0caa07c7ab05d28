"""The fast ways to compute causal attention, whole or in a window; LongLoRA's groups arrive folded into the batch axis.

No kernel knows about groups or shifts: attend.py cuts a pattern into pieces that are causal inside, and
every piece comes here as rows of a batch. TPUs run JAX's splash attention, NVIDIA's GPUs cuDNN's flash attention where
it can (gpu_fault says where not; segments.py has its packed rows), CPUs the strips of strips.py for rows that are short
enough, and any device the blocks of blockwise.py.
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

from longlora_jax.attention.blockwise import NOBODY, Rules, blockwise_attention, padded
from longlora_jax.attention.segments import segmented_attention, segments_fault
from longlora_jax.attention.strips import strip_attention, strip_side

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


def kernel_name(
    dtype=jnp.bfloat16, head_dim: int = 128, softcap: float = 0.0, packed: bool = False, tokens: int = 1
) -> str:
    """The kernel that causal_attention runs here without a window, for logs; packed: for rows of several segments.

    tokens: of a row, or of a group of it.
    """
    fault = gpu_fault((1, 1, 1, head_dim), dtype, 1, packed, softcap=softcap, capability=device_capability())
    if platform() == "gpu" and not fault:
        return "cudnn's segments on gpu" if packed else "cudnn on gpu"
    in_strips = platform() == "cpu" and strip_side(tokens)
    name = "splash" if platform() == "tpu" else "xla-strips" if in_strips else "xla-blockwise"
    return f"{name} on {platform()}"


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
    side = strip_side(q.shape[1]) if platform() == "cpu" and not window else None
    if side:
        return strip_attention(q, k, v, side, segment_ids, softcap=softcap)
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
        q, k, v = (padded(x, 2) for x in (q, k, v))
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
    """causal_attention by JAX's splash kernel for TPUs; interpret: run its program on any device, to test it."""
    t, h = q.shape[1], q.shape[3]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    options = {"residual_checkpoint_name": "attention", "interpret": interpret}
    kernel, args = splash_kernel(q, k, v, segment_ids, segment_ids, Rules(True, window, softcap), **options)
    out: Any = jax.vmap(kernel)(*args)
    return out.swapaxes(1, 2)[:, :t, :, :h]


def splash_kernel(q, k, v, segments_q, segments_k, rules: Rules, **options):
    """JAX's splash kernel for a row, and its arguments: tokens padded to blocks, heads to the chip's 128 lanes.

    q: [Z, N, T, H]; k, v: [Z, K, S, H], S is T where rules are causal; segments_q: [Z, T] and segments_k: [Z, S], or
    both None. options: make_splash_mha's.
    """
    # Pallas for TPUs takes a second to import, and nothing else needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def side(tokens: int) -> int:
        # Of a block as long as the window half is seen; smaller ones than 512 would cost more than they save.
        most = max(rules.window, 512) if rules.window else tokens
        return next((b for b in (1024, 512, 256) if min(tokens, most) >= b and -tokens % b <= tokens // 16), 128)

    (z, n, t, h), s = q.shape, k.shape[2]
    side_q, side_k = side(t), side(s)
    # Without a mask, keys that are padding are nobody's; with one, they lie in the future of every real query.
    if segments_k is None and not rules.causal and s % side_k:
        segments_q, segments_k = jnp.zeros((z, t), jnp.int32), jnp.zeros((z, s), jnp.int32)
    segments = None
    if segments_k is not None:
        segments = splash.SegmentIds(q=padded(segments_q, side_q), kv=padded(segments_k, side_k, NOBODY))
    given = (q * jnp.asarray(1 / math.sqrt(h), q.dtype), side_q), (k, side_k), (v, side_k)
    q, k, v = (padded(x, side, axis=2, lanes=128) for x, side in given)
    shape = q.shape[2], k.shape[2]
    mask = causal_mask(shape[0], rules.window) if rules.causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * n),
        block_sizes=splash.BlockSizes(
            block_q=side_q, block_kv=side_k, block_kv_compute=side_k,
            block_q_dkv=side_q, block_kv_dkv=side_k, block_kv_dkv_compute=side_k,
            block_q_dq=side_q, block_kv_dq=side_k,  # dq on its own: the fused kernel holds one dq for every kv block
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=rules.softcap or None,
        **options,
    )  # fmt: skip
    return kernel, (q, k, v, segments)
