"""Rows of several segments by cuDNN's flash attention on Hopper: how segment ids become its offsets and lengths.

jax.nn.dot_product_attention takes no segments; the function below it in JAX, not public, takes the offset and the
length of each, at most so many a row, and computes nothing between two of them. Its backward pass wants room for
slots x row length tokens, so one slot for every document that a row could have would be quadratic. Here the segments of
a row of T tokens are computed by their length: those longer than T/4 as rows of T with 4 slots, those of T/16 to T/4 as
rows of T/4 with 4 slots, and so on. No more can begin in a row, whatever the documents; each call has room for 4T
tokens. Segments of at most SHORT tokens are left for jax.numpy: pieces of that length that see the one before.
"""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

SLOTS = 4
SHORT = 128
_BACKWARD = (  # its parameters in JAX 0.10.2 and 0.11.2
    *("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"),
    *("is_training", "return_residual", "res", "grad_output"),
)


def segments_fault(q_shape, window: int, capability: str | None) -> str:
    """Why segmented_attention cannot take packed rows q [Z, T, N, H]; "" where it can. Arguments as gpu_fault's."""
    if capability is None or capability.split(".")[0] != "9":
        here = f"this GPU has {capability}" if capability else "this machine's GPU is not known"
        return f"rows are packed, and its segments need a Hopper GPU (compute capability 9.0): {here}"
    if window:
        return "rows are packed, and a window inside of its segments is not tried"
    if q_shape[3] > 128:
        return f"rows are packed, and its segments take a head_dim of at most 128, not {q_shape[3]}"
    if math.prod(q_shape) * (1 + 1 / 32) >= 2**31:  # rows grow by less than a 32nd
        return f"rows are packed, and q of {math.prod(q_shape):,} numbers is too large for its offsets of 32 bits"
    return jax_fault(jax.__version_info__)


def jax_fault(version: tuple[int, ...]) -> str:
    """Why JAX of that version is not trusted with its functions for segments, which are not public."""
    try:
        backward = inspect.signature(_jax_cudnn()._dot_product_attention_bwd_rule)
    except (ImportError, AttributeError):
        backward = None
    if backward is not None and tuple(backward.parameters) == _BACKWARD and (0, 10, 2) <= version < (0, 12):
        return ""
    here = ".".join(map(str, version))
    return (
        f"rows are packed, and JAX's functions for that are not public: those of 0.10.2 to 0.11 are known, not {here}"
    )


def _jax_cudnn() -> Any:
    """JAX's module of calls of cuDNN, imported where it is used: another JAX may not have it."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def segmented_attention(q, k, v, segment_ids):
    """causal_attention inside segments, for what segments_fault has nothing against; a segment is a run of equal ids.

    q: [Z, T, N, H]; k, v: [Z, T, K, H]; segment_ids: [Z, T] int32, any number of segments. Returns [Z, T, N, H].
    """
    t, rep = q.shape[1], q.shape[2] // k.shape[2]
    if jax.__version_info__ < (0, 11, 2):  # earlier ones give k and v the offsets of q's heads
        k, v = (jnp.repeat(x, rep, axis=2) for x in (k, v))
    pad = -t % SLOTS ** calls_for(t)
    if pad:  # the last segment grows, in the future of every real query
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge")
    return _segmented(q, k, v, segment_ids)[:, :t]


def calls_for(t: int) -> int:
    """How many lengths of rows, T, T/4, T/16, ..., are left to cuDNN: until a quarter of the last is SHORT or less."""
    calls = 0
    while t > SHORT * SLOTS**calls:
        calls += 1
    return calls


def runs_of(segment_ids):
    """For every token, whether a segment begins with it, and its segment's length: bool and int32, [Z, T]."""
    t = segment_ids.shape[1]
    place = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    begin = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    later = jnp.pad(jnp.where(begins, place, t)[:, 1:], ((0, 0), (0, 1)), constant_values=t)
    return begins, jax.lax.cummin(later, axis=1, reverse=True) - begin


def call_of(length, t: int):
    """Which call computes a segment of so many tokens in a row of t: 0 for the longest; calls_for(t): jax.numpy's."""
    bounds = [t // SLOTS**i for i in range(1, calls_for(t) + 1)]
    return (length[..., None] <= np.array(bounds, np.int32).reshape((1,) * length.ndim + (-1,))).sum(-1)


def offsets_of(begins, length, call, i: int):
    """(offsets, lengths) of the segments of call i, for rows of T / SLOTS**i tokens.

    begins, length, call: [Z, T]. Returns [rows, SLOTS + 1] and [rows, SLOTS] int32: where in the row a segment begins
    and how many tokens it has, which may lie in the next row; -1 for a slot without one.
    """
    row = begins.shape[1] // SLOTS**i
    wanted, length = (begins & (call == i)).reshape(-1, row), length.reshape(-1, row)
    place = jax.vmap(lambda x: jnp.nonzero(x, size=SLOTS, fill_value=-1)[0])(wanted).astype(jnp.int32)
    lengths = jnp.where(place >= 0, jnp.take_along_axis(length, jnp.maximum(place, 0), axis=1), -1)
    return jnp.pad(place, ((0, 0), (0, 1)), constant_values=-1), lengths


@jax.custom_vjp
def _segmented(q, k, v, segment_ids):
    """segmented_attention of rows that SLOTS**calls_for(T) divides."""
    return _vjp_forward(q, k, v, segment_ids)[0]


def _vjp_forward(q, k, v, segment_ids):
    begins, length = runs_of(segment_ids)
    call = call_of(length, q.shape[1])
    out, sums = jnp.zeros_like(q), []
    for i in range(calls_for(q.shape[1])):
        cut = [x.reshape(-1, x.shape[1] // SLOTS**i, *x.shape[2:]) for x in (q, k, v)]
        offsets, lengths = offsets_of(begins, length, call, i)
        some, total = forward(cut[0], cut[1], cut[2], offsets, lengths)
        # What lies in no segment of the call was never written.
        out = jnp.where((call == i)[..., None, None], some.reshape(q.shape), out)
        sums.append(checkpoint_name(total, "attention"))
    short = call == calls_for(q.shape[1])

    def fill():
        return jnp.where(short[..., None, None], _short(q, k, v, jnp.cumsum(begins, axis=1)), out)

    # Named for the remat policy that keeps them (model.REMAT), as the blockwise kernel's.
    out = checkpoint_name(jax.lax.cond(jnp.any(short), fill, lambda: out), "attention")
    return out, (q, k, v, segment_ids, out, sums)


def _vjp_backward(residuals, d_out):
    q, k, v, segment_ids, out, sums = residuals
    begins, length = runs_of(segment_ids)
    call = call_of(length, q.shape[1])
    grads = tuple(map(jnp.zeros_like, (q, k, v)))

    def take(mine, new, others):
        return tuple(jnp.where(mine[..., None, None], x.reshape(y.shape), y) for x, y in zip(new, others, strict=True))

    for i, total in enumerate(sums):
        cut = [x.reshape(-1, x.shape[1] // SLOTS**i, *x.shape[2:]) for x in (q, k, v, out, d_out)]
        offsets, lengths = offsets_of(begins, length, call, i)
        grads = take(call == i, backward(cut[0], cut[1], cut[2], cut[3], cut[4], total, offsets, lengths), grads)
    short = call == len(sums)

    def fill():
        _, back = jax.vjp(lambda q, k, v: _short(q, k, v, jnp.cumsum(begins, axis=1)), q, k, v)
        return take(short, back(d_out), grads)

    return *jax.lax.cond(jnp.any(short), fill, lambda: grads), None


_segmented.defvjp(_vjp_forward, _vjp_backward)


def _short(q, k, v, runs):
    """Causal attention inside segments (runs [Z, T]: their numbers) that are at most T / SLOTS**calls_for(T) long.

    For queries of a longer segment the result is finite and of no use.
    """
    z, t, n, h = q.shape
    kv_heads = k.shape[2]
    pieces = SLOTS ** calls_for(t)
    size = t // pieces

    def twice(x):
        x = x.reshape(z, pieces, size, *x.shape[2:])
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))
        return jnp.concatenate([before, x], axis=2)

    q = q.reshape(z, pieces, size, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("zpqkrh,zpskh->zpkrqs", q, twice(k), preferred_element_type=jnp.float32) / math.sqrt(h)
    causal = np.tri(size, 2 * size, size, dtype=bool)[None, None]
    # Numbers begin at 1: the 0 before the first piece is nobody's.
    seen = causal & (runs.reshape(z, pieces, size)[..., None] == twice(runs)[:, :, None])
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, :, None, None]).astype(v.dtype)
    out = jnp.einsum("zpkrqs,zpskh->zpqkrh", weights, twice(v), preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(z, t, n, h)


def forward(q, k, v, offsets, lengths):
    """cuDNN's causal attention of segments: q [Z, T, N, H], k and v [Z, T, K, H]; offsets and lengths: see offsets_of.

    Returns the output, as q, and the log-sum-exp of each slot [Z * SLOTS, N, T] f32; what is in no segment is not
    written.
    """
    cudnn = _jax_cudnn()
    places = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": offsets, "kv_offsets": offsets}
    options = {"scale": 1 / math.sqrt(q.shape[-1]), "mask_type": cudnn.MaskType.PADDING_CAUSAL, "return_residual": True}
    return cudnn.dot_product_attention(q, k, v, **places, **options)


def backward(q, k, v, out, d_out, sums, offsets, lengths):
    """The gradients of forward, for q, k and v; what is in no segment is not written."""
    cudnn, nothing = _jax_cudnn(), jnp.zeros(0, q.dtype)
    residuals = (q, k, v, nothing, lengths, lengths, offsets, offsets, nothing, nothing, sums, out)
    given = {"scale": 1 / math.sqrt(q.shape[-1]), "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False)}
    given |= {"mask_type": cudnn.MaskType.PADDING_CAUSAL, "layout": cudnn.AttentionLayout.BTNH.value}
    given |= {"sliding_window_length": None, "is_training": True, "return_residual": False}
    return cudnn._dot_product_attention_bwd_rule(**given, res=residuals, grad_output=d_out)[:3]
