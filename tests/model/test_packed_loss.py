"""Packed rows against the documents one by one: the same loss, the same gradients."""

import functools
import math

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, tiny_config

from longlora_jax import data
from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import LoraConfig
from longlora_jax.model import decoder
from longlora_jax.training.step import loss_sums

T, G = 32, 8
S2 = Pattern("s2", G)
# Of each window all documents but the last fill groups, so that all begin where a group does: then a document sees of
# itself what it would see alone. Windows: 16 + 8 + 5 and padding, 8 + 24.
ALIGNED = (16, 8, 24, 8, 5)
ANYHOW = (11, 7, 29, 13, 1, 2)
# The same float32 numbers, added in another order: a few units of the last place (6e-8) of the largest sum.
CLOSE = 1e-5
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiled twice as fast


def documents(lengths) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, scored) of each, as supervised examples are: about half of the tokens are scored."""
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 37, n), rng.integers(0, 2, n)) for n in lengths]


@functools.cache
def compiled(pattern):
    """(the program of sums_and_gradients, weights)."""
    llama = decoder.Llama(
        tiny_config(), lora=LoraConfig(rank=3, targets=("q_proj", "o_proj")), pattern=pattern, remat="none"
    )
    loss = jax.value_and_grad(lambda p, b: loss_sums(p, b, model=llama, loss_chunk=64), has_aux=True)
    return jax.jit(loss, compiler_options=QUICK), random_params(llama)


def sums_and_gradients(pattern, batch, program=compiled):
    """((sum of nll, tokens), gradients of all weights) of a tiny model."""
    loss, params = program(pattern)
    return loss(params, jax.tree.map(jnp.asarray, batch))


def packed(lengths):
    """Documents packed whole, as one batch."""
    windows = data.pack(data.InMemory(documents(lengths), None), T, "best_fit")
    (batch,) = data.in_order(windows, batch_size=len(windows), rows=np.arange(len(windows)))
    return batch


def one_by_one(lengths):
    """Each document in a row of its own, without segments: what comes after it is not scored, nor ever seen by it."""
    rows = [[np.pad(x, (0, T - len(x))) for x in document] for document in documents(lengths)]
    batch = data.as_batch(np.stack([ids for ids, _ in rows]))
    del batch["segment_ids"]
    batch["loss_mask"] *= np.stack([scored for _, scored in rows]).astype(np.int32)
    return batch


def assert_same(one, other):
    (loss, tokens), gradients = one
    (other_loss, other_tokens), other_gradients = other
    assert tokens == other_tokens > 10
    np.testing.assert_allclose(loss, other_loss, rtol=CLOSE)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
        assert np.abs(y).max() > 0
        np.testing.assert_allclose(x, y, rtol=0, atol=CLOSE * np.abs(y).max())


@pytest.mark.parametrize(
    ("pattern", "lengths"), [pytest.param(FULL, ANYHOW, marks=pytest.mark.slow), (S2, ALIGNED)], ids=["full", "s2"]
)
def test_packed_rows_are_the_documents_one_by_one(pattern, lengths):
    """Catches: a token that sees another document or its padding, positions that run on, a first token or a prompt
    that is scored, a document counted twice."""
    batch = packed(lengths)
    assert len(batch["tokens"]) == 2 and (batch["segment_ids"] == 0).any()
    assert_same(sums_and_gradients(pattern, batch), sums_and_gradients(pattern, one_by_one(lengths)))


def by_brute_force(q, k, v, pattern, mesh, *, segment_ids):
    """Attention by the pattern's definition: a query sees what it does in a row of one document, of its own segment."""
    heads, t = q.shape[2], q.shape[1]
    seen = brute_force.mask(pattern.name, pattern.group_size, heads=heads, t=t)[None]
    if segment_ids is not None:  # flax looks at the model without them first
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqnh,bsnh->bnqs", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bnqs,bsnh->bqnh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def test_documents_that_begin_inside_a_group(monkeypatch):
    """Catches: the same where groups cut documents anywhere. Then s2 in a packed row is not s2 of the document alone
    (its groups begin elsewhere), so the oracle is the definition, with segments."""
    batch = packed(ANYHOW)
    ours = sums_and_gradients(S2, batch)
    monkeypatch.setattr(decoder, "attend_on_mesh", by_brute_force)
    assert_same(ours, sums_and_gradients(S2, batch, program=compiled.__wrapped__))
