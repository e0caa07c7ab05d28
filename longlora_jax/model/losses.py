"""Next-token cross entropy in chunks: the logits of a whole row, [T, V], never exist.

The gradient is taken chunk by chunk in the forward pass, while the logits are at hand, so nothing is computed
twice; the backward pass only scales it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

CHUNK = 1024


def output_kernel(params):
    """The output projection [D, V] of a param tree: lm_head, or the transposed embedding of a tied model."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"].T


def output_logits(hidden, kernel, softcap: float | None = None):
    """Logits [..., V] float32 of hidden [..., D] and the output projection [D, V].

    softcap: they become softcap * tanh(logits / softcap) (arXiv:2408.00118); None: as they are.
    """
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def cross_entropy(hidden, kernel, targets, weights, *, chunk: int = CHUNK, softcap: float | None = None):
    """Sum of the weighted negative log likelihoods of the targets, in nats.

    hidden: [..., D] after the final norm; kernel: [D, V], the output projection (lm_head, or the transposed
    embedding); targets: [...] int32; weights: [...], 0 leaves a token out; softcap: of output_logits. Returns (sum of
    weight * nll, sum of weights), float32 scalars; divide them for the mean. Chunks of rows whose weights are all 0 are
    skipped, so a masked row costs nothing and cannot give NaN, whatever its targets are.
    """
    d = hidden.shape[-1]
    weights = weights.reshape(-1).astype(jnp.float32)
    total = _sum_nll(hidden.reshape(-1, d), kernel, targets.reshape(-1), weights, chunk, softcap)
    return total, weights.sum()


def token_nll(hidden, kernel, targets, *, chunk: int = CHUNK, softcap: float | None = None):
    """The negative log likelihood of every target, [...] float32 in nats; shapes as in cross_entropy."""
    rows, d = targets.size, hidden.shape[-1]
    kernel = kernel.astype(hidden.dtype)
    chunks = _split((hidden.reshape(-1, d), targets.reshape(-1)), rows, chunk)
    nll = jax.lax.map(lambda c: _log_likelihood(c[0], kernel, c[1], softcap)[0], chunks)
    return nll.reshape(-1)[:rows].reshape(targets.shape)


def _split(arrays, rows: int, chunk: int):
    """Each [rows, ...] as [chunks, chunk, ...], padded with zeros."""
    chunk = min(chunk, rows)
    count = -(-rows // chunk)
    pad = count * chunk - rows

    def one(x):
        x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)) if pad else x
        return x.reshape(count, chunk, *x.shape[1:])

    return jax.tree.map(one, arrays)


def _log_likelihood(hidden, kernel, targets, softcap):
    """nll [rows] and, for the gradient, logits and logits - log_total [rows, V], all float32."""
    logits = output_logits(hidden, kernel, softcap)
    log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0], logits, log_probs


def _weighted_sum(nll, weights):
    # Not nll * weights alone: the nll of a masked target that is no column (-100 of a small kernel) is NaN.
    return jnp.sum(jnp.where(weights != 0, nll * weights, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sum_nll(hidden, kernel, targets, weights, chunk, softcap):
    kernel = kernel.astype(hidden.dtype)

    def step(total, c):
        hidden_c, targets_c, weights_c = c
        score = lambda: _weighted_sum(_log_likelihood(hidden_c, kernel, targets_c, softcap)[0], weights_c)  # noqa: E731
        return total + jax.lax.cond(jnp.any(weights_c != 0), score, lambda: jnp.float32(0)), None

    chunks = _split((hidden, targets, weights), targets.shape[0], chunk)
    return jax.lax.scan(step, jnp.float32(0), chunks)[0]


def _sum_nll_forward(hidden, kernel, targets, weights, chunk, softcap):
    train_kernel, kernel = kernel.perturbed, kernel.value
    hidden, targets, weights = hidden.value, targets.value, weights.value
    rows, d = hidden.shape
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if train_kernel else None
    # Once, and not in each chunk, where a compiler may gather it as well.
    dtype, kernel = kernel.dtype, kernel.astype(hidden.dtype)

    def step(carry, c):
        hidden_c, targets_c, weights_c = c

        def score(total, d_kernel):
            nll, logits, log_probs = _log_likelihood(hidden_c, kernel, targets_c, softcap)
            hit = targets_c[:, None] == jnp.arange(kernel.shape[1])[None]
            d_logits = (jnp.exp(log_probs) - hit) * weights_c[:, None]
            if softcap is not None:
                d_logits *= 1 - (logits / softcap) ** 2
            d_logits = d_logits.astype(hidden_c.dtype)
            d_hidden = jnp.dot(d_logits, kernel.T)
            if d_kernel is not None:
                d_kernel += jnp.dot(hidden_c.T, d_logits, preferred_element_type=jnp.float32)
            return total + _weighted_sum(nll, weights_c), d_kernel, d_hidden

        def skip(total, d_kernel):
            return total, d_kernel, jnp.zeros_like(hidden_c)

        total, d_kernel, d_hidden = jax.lax.cond(jnp.any(weights_c != 0), score, skip, *carry)
        return (total, d_kernel), d_hidden

    chunks = _split((hidden, targets, weights), rows, chunk)
    (total, d_kernel), d_hidden = jax.lax.scan(step, (jnp.float32(0), d_kernel), chunks)
    if d_kernel is not None:
        d_kernel = d_kernel.astype(dtype)
    return total, (d_hidden.reshape(-1, d)[:rows], d_kernel)


def _sum_nll_backward(chunk, softcap, residuals, d_total):
    if isinstance(d_total, SymbolicZero):
        d_total = jnp.float32(0)
    d_hidden, d_kernel = residuals
    scale = lambda x: None if x is None else (x * d_total).astype(x.dtype)  # noqa: E731
    return scale(d_hidden), scale(d_kernel), None, None


_sum_nll.defvjp(_sum_nll_forward, _sum_nll_backward, symbolic_zeros=True)
