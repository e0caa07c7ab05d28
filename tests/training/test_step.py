"""The training step: what it changes, what it leaves alone, and how tokens weigh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxpr_arrays import shapes
from states import ADAMW, start
from tiny import random_batch

from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import LoraConfig
from longlora_jax.model.trainable import combine, trainable_mask
from longlora_jax.training.step import eval_step, jit_train_step, loss_sums, train_step

# Keeps the gradients where the moments of a real optimizer would be, and changes nothing.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)
SUMS = {"rtol": 1e-5, "atol": 1e-6}  # the same float32 numbers, added in another order


def gradients(batch, **options):
    """(gradients, metrics) of one step on a batch."""
    state, frozen = start(optimizer=KEEP_GRADIENTS, **options)
    state, values = jax.jit(train_step)(state, frozen, batch)
    return state.opt_state, values


def rows(*batches):
    """The rows of some batches and, so that one compiled step serves several tests, empty ones: [8, 20]."""
    padded = [jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 20 - x.shape[1]))), batch) for batch in batches]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *padded)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 8 - x.shape[0]), (0, 0))), joined)


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or SUMS)), one, other)


def names(tree) -> set[str]:
    return {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


TRAINED = {
    "lora": {"lora_a", "lora_b"},
    "longlora": {"lora_a", "lora_b", "embedding", "scale"},
    "full": {"embedding", "scale", "kernel"},
}


@pytest.mark.parametrize("mode", [pytest.param("lora", marks=pytest.mark.slow), "longlora", "full"])
def test_a_step_changes_what_trains_and_nothing_else(mode):
    """Catches: a frozen leaf that is decayed, donated or rounded; a trainable one that the optimizer forgets."""
    state, frozen = start(mode)
    assert names(state.trainable) == TRAINED[mode]
    before, frozen_before = jax.tree.map(np.array, (state.trainable, frozen))
    step = jit_train_step(state)
    for i in range(2):
        state, values = step(state, frozen, random_batch(2, 20, seed=i))
    assert step._cache_size() == 1  # the state comes back as it went in, so nothing compiles twice
    assert int(state.step) == 2 and float(values["tokens"]) == 2 * 19 and float(values["grad_norm"]) > 0
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    changed = jax.tree.map(lambda new, old: bool((np.asarray(new) != old).any()), state.trainable, before)
    assert all(jax.tree.leaves(changed)), changed


def kernel_shapes(tree) -> set[tuple[int, ...]]:
    return {x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == "kernel"}


@pytest.mark.parametrize("mode", TRAINED)
def test_frozen_weights_are_not_differentiated(mode):
    """Catches: a gradient of a frozen kernel that is computed and thrown away (43% more work in a LLaMA)."""
    state, frozen = start(mode)
    built = shapes(train_step, state, frozen, random_batch(2, 20))
    # The embedding is left out: it has the shape of the transposed lm_head, which every backward pass reads.
    kernels = {shape for tree in (state.trainable, frozen) for shape in kernel_shapes(tree)}
    # What a full run computes shows that a gradient would be seen here.
    assert built & kernels == kernel_shapes(state.trainable)
    assert bool(kernel_shapes(state.trainable)) == (mode == "full")


def test_the_update_equals_optax_masked():
    """Catches: clipping by the norm of more than the trainables; a moment or a decay that optax's own way has not."""
    state, frozen = start()
    batch = random_batch(2, 20)
    params = combine(state.trainable, frozen)
    mask = trainable_mask(params, "longlora")
    new, _ = jit_train_step(state)(jax.tree.map(jnp.copy, state), frozen, batch)

    masked = optax.chain(
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda trains: not trains, mask)), optax.masked(ADAMW, mask)
    )

    @jax.jit
    def whole_tree_step(params):
        loss = lambda p: (lambda sums: sums[0] / sums[1])(loss_sums(p, batch, model=state.model, loss_chunk=64))  # noqa: E731
        updates, _ = masked.update(jax.grad(loss)(params), masked.init(params), params)
        return optax.apply_updates(params, updates)

    # Adam divides by the gradient's own size, so rounding in a gradient near zero is seen in full; see SUMS.
    assert_close(combine(new.trainable, frozen), whole_tree_step(params), rtol=1e-4, atol=1e-5)


def test_accumulation_weighs_every_token_the_same():
    """Catches: a mean of means, which overweights the tokens of short parts; a part without tokens that gives NaN."""
    batch = random_batch(8, 20)
    kept = np.array([19, 1, 7, 0, 0, 3, 12, 19])  # tokens that are scored; parts of 2 rows, one of them without any
    batch["loss_mask"] *= jnp.asarray(np.arange(20) <= kept[:, None])
    whole, parts = gradients(batch), gradients(batch, accumulation=4)
    assert float(whole[1]["tokens"]) == kept.sum()
    assert_close(whole, parts)


def test_a_batch_without_targets_changes_nothing_but_the_decay():
    """Catches: 0 / 0 in the loss or in its gradient, which would destroy the weights without a word."""
    state, frozen = start()
    batch = random_batch(2, 20)
    batch["loss_mask"] *= 0
    before = jax.tree.map(np.array, state.trainable)
    step = jit_train_step(state)
    state, values = step(state, frozen, batch)
    assert {name: float(values[name]) for name in ("loss", "grad_norm", "tokens", "skipped")} == dict.fromkeys(
        ("loss", "grad_norm", "tokens", "skipped"), 0
    )

    # AdamW without a gradient: what is left is learning rate * weight decay, of all but norms.
    def decayed(path, x):
        return x if path[-1].key == "scale" else x * (1 - 1e-2 * 0.1)

    assert_close(state.trainable, jax.tree_util.tree_map_with_path(decayed, before))


def test_a_row_without_targets_adds_nothing():
    """Catches: a mean over rows, and padding rows whose hidden states reach the gradient."""
    batch = random_batch(2, 20)
    batch["loss_mask"] = batch["loss_mask"].at[1].set(0)
    alone = rows(jax.tree.map(lambda x: x[:1], batch))
    assert_close(gradients(rows(batch)), gradients(alone))


def test_packed_rows_are_separate_rows():
    """Catches: a target in the next document, a document that sees its neighbour, positions that run on."""
    one, two = random_batch(1, 11, seed=1), random_batch(1, 14, seed=2)
    # All ones on purpose: the first token of a document has no target, and padding is a segment of its own.
    packed = {
        "tokens": jnp.concatenate([one["tokens"], two["tokens"], jnp.zeros((1, 7), jnp.int32)], axis=1),
        "positions": jnp.concatenate([one["positions"], two["positions"], jnp.zeros((1, 7), jnp.int32)], axis=1),
        "loss_mask": jnp.asarray([[1] * 25 + [0] * 7]),
        "segment_ids": jnp.asarray([[1] * 11 + [2] * 14 + [0] * 7]),
    }
    together, apart = gradients(packed), gradients(rows(one, two))
    assert float(together[1]["tokens"]) == 10 + 13
    assert_close(together, apart)


def test_the_pattern_can_change_between_steps():
    """Catches: full_last that keeps the old pattern, loses the moments, or starts the schedule again."""
    state, frozen = start(pattern=Pattern("short", 5))
    batch = random_batch(2, 20)
    step = jit_train_step(state)
    state, _ = step(state, frozen, batch)
    full = state.replace(model=state.model.clone(pattern=FULL))
    total, tokens = jax.jit(functools.partial(eval_step, model=full.model))(combine(full.trainable, frozen), batch)
    new, values = jit_train_step(full)(jax.tree.map(jnp.copy, full), frozen, batch)
    assert [int(c) for c in jax.tree.leaves(new.opt_state) if c.dtype == jnp.int32] == [2, 2]
    np.testing.assert_allclose(values["loss"], total / tokens, rtol=1e-6)
    _, short = step(state, frozen, batch)
    assert abs(short["loss"] - values["loss"]) > 1e-3


def test_dropout_draws_by_seed_and_step():
    """Catches: the same mask at every step, or one that a resumed run would draw otherwise."""
    state, frozen = start("lora", lora=LoraConfig(rank=3, targets=("q_proj",), dropout=0.5))
    step, batch = jax.jit(train_step), random_batch(1, 20)
    loss = lambda s: float(step(s, frozen, batch)[1]["loss"])  # noqa: E731
    later = state.replace(step=state.step + 1)
    other_seed = state.replace(dropout_key=jax.random.PRNGKey(7))
    assert loss(state) == loss(state)
    assert len({loss(state), loss(later), loss(other_seed)}) == 3
