"""Chunked cross entropy against optax over whole logits: values, gradients, and what it never builds."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxpr_arrays
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longlora_jax.model.losses import cross_entropy, token_nll

# Sums of at most 50 products of float32 numbers of size 1 to 10, each rounded to 6e-8 of its value.
F32 = {"rtol": 1e-5, "atol": 1e-5}
D, V = 8, 37
# The same program without the optimizations that take most of the time of so small an example.
QUICK = {"xla_backend_optimization_level": 0}


def example_batch(seed, *shape, d=D, v=V):
    """hidden [*shape, d], kernel [d, v], targets and weights [*shape]; a third of the weights are 0."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((*shape, d), np.float32)
    kernel = rng.standard_normal((d, v), np.float32)
    weights = rng.uniform(0.5, 2, shape) * (rng.random(shape) > 1 / 3)
    return hidden, kernel, rng.integers(0, v, shape).astype(np.int32), weights.astype(np.float32)


def dense(hidden, kernel, targets, weights):
    """The definition over the whole [T, V] logits."""
    nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets)
    return jnp.sum(nll * weights), jnp.sum(weights)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def graded(loss, hidden, kernel, targets, weights):
    """((value, count), both gradients) under an incoming gradient that is not 1."""

    def scaled(hidden, kernel):
        total, count = loss(hidden, kernel, targets, weights)
        return -3 * total, count

    return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(hidden, kernel)


def assert_same_loss(hidden, kernel, targets, weights, chunk):
    """Value, count and both gradients. The dense rows are filled up to one length, so that one program serves all."""
    ours = graded(functools.partial(cross_entropy, chunk=chunk), hidden, kernel, targets, weights)
    flat, filled = targets.size, 51 - targets.size
    rows = (np.pad(x.reshape(flat, -1), ((0, filled), (0, 0))) for x in (hidden, targets, weights))
    hidden, targets, weights = (x if x.shape[1] == D else x[:, 0] for x in rows)
    (value, count), (d_hidden, d_kernel) = graded(dense, hidden, kernel, targets, weights)
    oracle = (value, count), (d_hidden[:flat].reshape(ours[1][0].shape), d_kernel)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **F32), ours, oracle)


@settings(max_examples=3)
@given(rows=st.integers(1, 3), t=st.integers(1, 17), chunk=st.integers(1, 20), seed=st.integers(0, 99))
@example(rows=2, t=12, chunk=8, seed=0)  # divides
@example(rows=2, t=11, chunk=5, seed=1)  # does not
@example(rows=1, t=1, chunk=1024, seed=2)
def test_cross_entropy_is_the_dense_one(rows, t, chunk, seed):
    """Chunks lost or counted twice, a weight forgotten in the value or in one of the gradients."""
    assert_same_loss(*example_batch(seed, rows, t), chunk)


def test_skipped_chunks_leave_no_trace():
    """Whole chunks without a target (prompts, padding) between others: the sums must be carried across."""
    hidden, kernel, targets, weights = example_batch(3, 2, 16)
    weights[0, 4:12] = weights[1, :4] = weights[1, 12:] = 0
    assert_same_loss(hidden, kernel, targets, weights, 4)


def test_tied_embedding_gets_both_gradients():
    """The output projection of a tied model is the transposed embedding: two paths into one leaf."""
    rng = np.random.default_rng(4)
    embedding = rng.standard_normal((V, D), np.float32)
    tokens, targets = rng.integers(0, V, (2, 3, 7))
    weights = np.ones((3, 7), np.float32)

    def loss(function, embedding):
        return function(jnp.tanh(jnp.asarray(embedding)[tokens]), embedding.T, targets, weights)[0]

    ours = jax.jit(jax.grad(functools.partial(loss, functools.partial(cross_entropy, chunk=4))))(embedding)
    np.testing.assert_allclose(ours, jax.jit(jax.grad(functools.partial(loss, dense)))(embedding), **F32)


@pytest.mark.parametrize("train_kernel", [False, True])
def test_a_frozen_kernel_costs_nothing(train_kernel):
    """[D, V] sums for a gradient that nobody asked for: the head of LLaMA is frozen in LongLoRA."""
    hidden, kernel, targets, weights = example_batch(5, 3, 8)

    def gradients(hidden, kernel):
        loss = lambda h, k: cross_entropy(h, k, targets, weights, chunk=6)[0]  # noqa: E731
        return jax.grad(loss, argnums=(0, 1) if train_kernel else 0)(hidden, kernel)

    built = jaxpr_arrays.shapes(gradients, hidden, kernel)
    assert (6, V) in built  # the walk sees the logits of a chunk, so it would see the sums as well
    assert ((D, V) in built) == train_kernel
    ours = jax.tree.leaves(jax.jit(gradients)(hidden, kernel))
    oracle = jax.jit(jax.grad(lambda h, k: dense(h, k, targets, weights)[0], argnums=(0, 1)))(hidden, kernel)
    for x, y in zip(ours, oracle, strict=False):
        np.testing.assert_allclose(x, y, **F32)


@pytest.mark.parametrize("train_kernel", [False, True])
def test_logits_of_a_row_never_exist(train_kernel):
    """[T, V], in any layout: 12.8 GB in float32 at the paper's 100,000 tokens and 32,000 pieces."""
    t, d, v, chunk = 4096, 16, 1000, 256
    args = [
        jax.ShapeDtypeStruct((2, t, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((2, t), jnp.int32),
        jax.ShapeDtypeStruct((2, t), jnp.float32),
    ]
    loss = functools.partial(cross_entropy, chunk=chunk)
    graded = jax.value_and_grad(lambda *a: loss(*a)[0], argnums=(0, 1) if train_kernel else 0)
    nll = functools.partial(token_nll, chunk=chunk)
    for function, inputs in ((loss, args), (graded, args), (nll, args[:3])):
        built = jaxpr_arrays.shapes(function, *inputs)
        assert max(map(math.prod, built)) == chunk * v
    assert (2, t, v) in jaxpr_arrays.shapes(dense, *args)  # the walk would see it


def test_nothing_to_score_is_zero_and_not_nan():
    """The reference's SFT: a row whose labels are all masked divides 0 by 0."""
    hidden, kernel, targets, weights = example_batch(6, 2, 9)
    graded = jax.value_and_grad(functools.partial(cross_entropy, chunk=4), argnums=(0, 1), has_aux=True)
    (total, count), gradients = jax.jit(graded)(hidden, kernel, targets, np.zeros_like(weights))
    assert total == count == 0
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("ignored", [-100, V, 10**6])
def test_a_masked_target_may_be_anything(ignored):
    """-100, the mask of Hugging Face's labels, is no column of a small kernel: NaN * 0 is NaN."""
    hidden, kernel, targets, weights = example_batch(7, 2, 9)
    assert 0 < (weights == 0).sum() < weights.size
    graded = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, chunk=5), argnums=(0, 1), has_aux=True))
    expected = graded(hidden, kernel, targets, weights)
    ours = graded(hidden, kernel, np.where(weights == 0, ignored, targets), weights)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_count_is_the_sum_of_weights_and_takes_no_gradient():
    """A count that trains: the mean would then reward masking."""
    hidden, kernel, targets, weights = example_batch(8, 2, 9)
    count, gradient = jax.jit(jax.value_and_grad(lambda h: cross_entropy(h, kernel, targets, weights)[1]))(hidden)
    assert count == pytest.approx(weights.sum())
    assert not gradient.any()


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_token_nll_is_the_summand(chunk):
    """Padding rows of the last chunk scored, or values in another order."""
    hidden, kernel, targets, weights = example_batch(9, 2, 9)
    ours = token_nll(hidden, kernel, targets, chunk=chunk)
    assert ours.shape == targets.shape and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets), **F32)
    np.testing.assert_allclose(np.sum(ours * weights), cross_entropy(hidden, kernel, targets, weights)[0], rtol=1e-5)


def test_bfloat16_hidden_keeps_a_float32_loss():
    """A log-sum-exp in bfloat16 is off by several percent, and a sum of 100 of them by more."""
    hidden, kernel, targets, weights = example_batch(10, 4, 64, v=500)
    hidden, kernel = jnp.asarray(hidden, jnp.bfloat16), np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)
    graded = jax.value_and_grad(functools.partial(cross_entropy, chunk=50), argnums=(0, 1), has_aux=True)
    (total, _), (d_hidden, d_kernel) = jax.jit(graded)(hidden, kernel, targets, weights)
    oracle = jax.jit(jax.value_and_grad(lambda h, k: dense(h, k, targets, weights)[0], argnums=(0, 1)))
    expected, (eh, ek) = oracle(np.asarray(hidden, np.float32), kernel)
    assert total.dtype == d_kernel.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(total, expected, rtol=1e-5)  # products of bfloat16 numbers are exact in float32
    # Gradients pass through bfloat16 once: 2^-9 of each summand, here of the largest.
    np.testing.assert_allclose(d_kernel, ek, atol=2**-7 * float(jnp.abs(ek).max()))
    np.testing.assert_allclose(d_hidden.astype(jnp.float32), eh, atol=2**-7 * float(jnp.abs(eh).max()))


@pytest.mark.parametrize("train_kernel", [True, False])
def test_a_kernel_in_another_dtype_is_cast_once(train_kernel):
    """Catches: a tied embedding, float32 as it trains, that TPUs gather anew for every chunk of the logits."""
    hidden, kernel, targets, weights = example_batch(3, 16)

    def loss(hidden, kernel):
        kernel = kernel if train_kernel else jax.lax.stop_gradient(kernel)
        return cross_entropy(hidden, kernel, targets, weights, chunk=4)[0]

    grad = jax.grad(loss, argnums=(0, 1))
    found = jaxpr_arrays.casts(grad, jnp.asarray(hidden, jnp.bfloat16), kernel)
    assert [looped for shape, looped in found if shape == kernel.shape] == [False]
    nll = jaxpr_arrays.casts(
        lambda *given: token_nll(*given, targets, chunk=4), jnp.asarray(hidden, jnp.bfloat16), kernel
    )
    assert [looped for shape, looped in nll if shape == kernel.shape] == [False]
