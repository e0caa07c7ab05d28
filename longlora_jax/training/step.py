"""One training step and one evaluation step: pure functions of state and batch, no files, no printing."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.model.losses import output_kernel
from longlora_jax.model.on_mesh import cross_entropy_on_mesh
from longlora_jax.model.trainable import combine
from longlora_jax.parallel.sharding import weight_shardings
from longlora_jax.weights.rules import get_leaf


class TrainState(flax.struct.PyTreeNode):
    """What a step changes: the trainable partition (float32), its optimizer state and the counts of steps.

    step: all; skipped: those without an update, because their loss or gradient was not finite; in_a_row: the last of
    these, 0 after an update.
    model, optimizer, accumulation and loss_chunk are static: another value is another compiled step.
    """

    step: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    trainable: Any
    opt_state: Any
    dropout_key: jax.Array
    model: Llama = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    accumulation: int = flax.struct.field(pytree_node=False, default=1)
    loss_chunk: int = flax.struct.field(pytree_node=False, default=1024)

    @classmethod
    def create(cls, *, model, optimizer, trainable, seed: int = 0, **static) -> "TrainState":
        """A state at step 0 with a fresh optimizer."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            in_a_row=jnp.zeros((), jnp.int32),
            trainable=trainable,
            opt_state=optimizer.init(trainable),
            dropout_key=jax.random.PRNGKey(seed),
            model=model,
            optimizer=optimizer,
            **static,
        )


def loss_sums(params, batch, *, model: Llama, loss_chunk: int, dropout_key=None):
    """(sum of nll, number of scored tokens) of a batch of {tokens, positions, loss_mask: [B, T]}.

    loss_mask[t] scores token t as a target, predicted from the tokens before it. A token whose predecessor is
    of another segment is never scored; without segment_ids a row is one segment, and nothing is masked.
    """
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    hidden = model.apply({"params": params}, tokens, batch["positions"], segments, method="hidden", rngs=rngs)
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.roll(batch["loss_mask"], -1, axis=1).astype(jnp.float32).at[:, -1].set(0)
    if segments is not None:
        weights *= segments == jnp.roll(segments, -1, axis=1)
    how = {"chunk": loss_chunk, "softcap": model.config.final_logit_softcapping}
    return cross_entropy_on_mesh(hidden, output_kernel(params), targets, weights, model.mesh, **how)


def train_step(state: TrainState, frozen, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the trainable partition.

    frozen: the other partition, never differentiated; batch: leaves [B, T], cut into state.accumulation parts
    whose gradients are summed and divided by the tokens of the whole batch, so every token weighs the same.
    Where the loss or the gradient is not finite nothing is updated, but the step counts: its batch has had its turn,
    and the schedule goes on.
    Returns the new state and {loss, grad_norm, tokens, skipped, in_a_row}, scalars.
    """

    def sums(trainable, part, key):
        params = combine(trainable, frozen)
        total, tokens = loss_sums(params, part, model=state.model, loss_chunk=state.loss_chunk, dropout_key=key)
        return total, tokens

    def gradients(part, key):
        sums_of_part, grads = jax.value_and_grad(sums, has_aux=True)(state.trainable, part, key)
        return *sums_of_part, _where_weights_are(grads, state.model)

    def accumulate(carry, part_and_key):
        return jax.tree.map(jnp.add, carry, gradients(*part_and_key)), None

    key = jax.random.fold_in(state.dropout_key, state.step)
    if state.accumulation == 1:
        total, tokens, grads = gradients(batch, key)
    else:
        # Every part takes rows of every device: the rows lie on the devices in order, and stay where they are.
        parts = jax.tree.map(lambda x: x.reshape(-1, state.accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        zeros = (jnp.float32(0), jnp.float32(0), _where_weights_are(zeros, state.model))
        keys = jax.random.split(key, state.accumulation)
        (total, tokens, grads), _ = jax.lax.scan(accumulate, zeros, (parts, keys))
    scored = jnp.maximum(tokens, 1)
    grads = jax.tree.map(lambda g: g / scored, grads)
    updates, opt_state = state.optimizer.update(grads, state.opt_state, state.trainable)
    loss, norm = total / scored, optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    # Chosen leaf by leaf where the update is computed anyway: no copy, no branch for the compiler to work round.
    updated = (optax.apply_updates(state.trainable, updates), opt_state)
    kept = (state.trainable, _without_update(state.opt_state))
    trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, kept)
    new = state.replace(
        step=state.step + 1,
        skipped=state.skipped + ~good,
        in_a_row=jnp.where(good, 0, state.in_a_row + 1),
        trainable=trainable,
        opt_state=opt_state,
    )
    metrics = {"loss": loss, "grad_norm": norm, "tokens": tokens}
    return new, metrics | {"skipped": new.skipped, "in_a_row": new.in_a_row}


def _without_update(opt_state):
    """The optimizer's state after a step that is skipped: only the schedule has gone on."""

    def later(x):
        return x._replace(count=x.count + 1) if isinstance(x, optax.ScaleByScheduleState) else x

    return jax.tree.map(later, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))


def _where_weights_are(grads, model: Llama):
    """Gradients held to the shardings of their weights: every device keeps its share of a sum and no more."""
    if model.mesh is None or model.mesh.size == 1:
        return grads
    where = weight_shardings(model.mesh, logical_axes(model), abstract_params(model))
    where = jax.tree_util.tree_map_with_path(lambda path, _: get_leaf(where, [key.key for key in path]), grads)
    return jax.lax.with_sharding_constraint(grads, where)


def eval_step(params, batch, *, model: Llama, loss_chunk: int = 1024):
    """(sum of nll, number of scored tokens) of a batch; average over batches by tokens, not by batch."""
    return loss_sums(params, batch, model=model, loss_chunk=loss_chunk)


def jit_train_step(state: TrainState):
    """train_step compiled for states like this one: donated, and left on the devices where they were."""
    # Unless it is told, the compiler chooses where a result lives, and the next step compiles anew for that.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def compile_train_step(
    state: TrainState, frozen, rows: jax.ShapeDtypeStruct, *, segmented: bool = False, options: dict | None = None
):
    """jit_train_step compiled ahead of the first step, for batches of `rows` ([B, T] int32, sharded).

    segmented: batches hold segment_ids; without them a row is one segment, and no mask is paid for. options: XLA's, for
    this program alone.
    """
    names = ("tokens", "positions", "loss_mask", *(("segment_ids",) if segmented else ()))
    batch = dict.fromkeys(names, rows)
    return jit_train_step(state).lower(state, frozen, batch).compile(compiler_options=options)


def jit_eval_step(model: Llama, loss_chunk: int = 1024):
    """eval_step compiled for one model and pattern."""
    return jax.jit(functools.partial(eval_step, model=model, loss_chunk=loss_chunk))
