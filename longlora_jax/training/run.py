"""What a run is made of, out of its resolved config: model, windows of data, state on the mesh."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.config import Config, DataConfig, name_of
from longlora_jax.config_file import read_run_config
from longlora_jax.data import (
    Batches,
    Windows,
    batches,
    open_documents,
    pack,
)
from longlora_jax.data.new_tokens import load_with_tokens
from longlora_jax.errors import UserError
from longlora_jax.model import trainable
from longlora_jax.model.codes import Quantization
from longlora_jax.model.decoder import Llama, abstract_params, init_params, logical_axes
from longlora_jax.model.quantized import is_packed
from longlora_jax.parallel import sharding
from longlora_jax.resilience.checkpoints import RunCheckpoints
from longlora_jax.training import optim
from longlora_jax.training.step import TrainState
from longlora_jax.weights import load
from longlora_jax.weights.rules import with_rows

log = logging.getLogger("longlora_jax")


def continued_state(config: Config, state: TrainState) -> TrainState:
    """The state at step 0 with the trained weights and AdamW's moments of config.continue_from's newest checkpoint."""
    earlier = read_run_config(config.continue_from)
    optimizer = optim.make_optimizer(earlier.optim, earlier.steps)
    moments = optimizer.init(state.trainable)
    moments = jax.tree.map(lambda x: x if x.committed else jax.device_put(x, state.step.sharding), moments)
    like = state.replace(optimizer=optimizer, opt_state=moments)
    saved, _ = RunCheckpoints(config.continue_from, read_only=True).restore(like)
    moments = next(x for x in jax.tree.leaves(saved.opt_state, is_leaf=_is_adam) if _is_adam(x))
    opt_state = jax.tree.map(lambda x: moments if _is_adam(x) else x, state.opt_state, is_leaf=_is_adam)
    log.info("continued from step %d of %s: its weights and moments, step 0", saved.step, config.continue_from)
    return state.replace(trainable=saved.trainable, opt_state=opt_state)


def _is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def build_model(config: Config, mesh=None) -> Llama:
    """The model of a run under its training pattern, on a mesh if one is given."""
    assert config.model is not None  # resolve() filled it
    name, attention = config.attention.pattern, config.attention
    group = attention.group_tokens(config.seq_len)
    return Llama(
        config.model,
        lora=config.lora if config.mode != "full" else None,
        pattern=FULL if name == "full" else Pattern(name, group, attention.full_below),
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        mesh=mesh,
        chunks=config.chunks,
        neftune_alpha=config.neftune_alpha,
        quantization=Quantization.of(config.base_quantization),
    )


def read_windows(data: DataConfig, config: Config) -> Windows:
    """The documents of a corpus, packed into windows of seq_len tokens; faults say which of the config's data it is."""
    name, held_out = name_of(data, config), data is config.eval.data
    try:
        tokenizer = load_with_tokens(data.tokenizer, config.new_tokens)
        documents = open_documents(data, tokenizer, window=config.seq_len, held_out=held_out)
        return pack(documents, config.seq_len, data.packing, min_tokens=data.min_tokens, whole=data.task == "sft")
    except UserError as error:
        if name == "data":
            raise
        raise UserError(f"{name}: {error}") from error


def check_ids(tokens: np.ndarray, config: Config, name: str = "data") -> None:
    """Raises UserError if a batch, ids [B, T] on the host, has a token that the model has no row for.

    name: of the config's data, for the message. What counts are the ids in use: many a tokenizer has a few more pieces
    than its model has rows.
    """
    assert config.model is not None  # resolve() filled it
    largest = int(tokens.max(initial=0))
    if largest >= config.model.vocab_size:
        raise UserError(
            f"{name} holds token {largest}, and the model's vocabulary of {config.model.vocab_size} ends before it: "
            f"set {name}.tokenizer to the model's own, or prepare the data again with it"
        )


def open_batches(config: Config, rows) -> Batches:
    """The training batches of a run, of which this process reads these rows."""
    parts = (config.data, *config.mixture)
    return batches(
        [read_windows(part, config) for part in parts],
        weights=[part.weight for part in parts],
        batch_size=config.batch_size,
        seed=config.seed,
        rows=rows,
        workers=config.workers,
    )


def initial_state(config: Config, model: Llama, mesh):
    """(TrainState, frozen) on the mesh: base weights from init_from or random, adapters fresh.

    Trainables are float32, frozen weights config.dtype.
    """
    shapes = abstract_params(model)
    shardings = sharding.weight_shardings(mesh, logical_axes(model), shapes)
    mask = trainable.trainable_mask(shapes, config.mode)
    key = jax.random.PRNGKey(config.seed)
    dtypes = _dtypes(config, shapes, mask)
    if config.init_from:
        assert config.model is not None  # resolve() filled it
        table = with_rows(config.model, load.open_model(config.init_from).table)
        base = sharding.place_weights(config.model, table, shardings, dtypes, model.quantization)
        params = trainable.combine(_fresh_adapters(model, mesh)(key), base)  # pyright: ignore[reportArgumentType]
    else:

        def random(key):
            return jax.tree.map(lambda x, dtype: x.astype(dtype), init_params(model, key), dtypes)

        params = jax.jit(random, out_shardings=shardings)(key)
    trains, frozen = trainable.partition(params, mask)
    state = _fresh_state(config, model, trains)
    # The step leaves its scalars on the whole mesh: begun elsewhere, the second step would compile anew.
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, everywhere), state), frozen


@functools.lru_cache(maxsize=4)
def _fresh_adapters(model: Llama, mesh):
    """What draws the adapters of a model on the mesh, and nothing else, from a key; compiled once."""
    shapes = abstract_params(model)
    shardings = sharding.weight_shardings(mesh, logical_axes(model), shapes)
    is_new = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("lora_"), shapes)
    fresh = trainable.partition(shardings, is_new)[0]
    return jax.jit(lambda key: trainable.partition(init_params(model, key), is_new)[0], out_shardings=fresh)


def abstract_state(config: Config, model: Llama, mesh=None):
    """(TrainState, frozen) of initial_state as shapes and dtypes, without computing or holding anything.

    With a mesh, each leaf says where it would be: enough to compile the step for devices that are not here.
    """
    shapes = abstract_params(model)
    mask = trainable.trainable_mask(shapes, config.mode)
    cast = jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), shapes, _dtypes(config, shapes, mask))
    trains, frozen = trainable.partition(cast, mask)
    state = jax.eval_shape(lambda t: _fresh_state(config, model, t), trains)
    if mesh is None:
        return state, frozen
    where = sharding.weight_shardings(mesh, logical_axes(model), shapes)
    where_trains, where_frozen = trainable.partition(where, mask)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(x, sharding=everywhere):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    moments = optax.tree_utils.tree_map_params(
        state.optimizer, put, state.opt_state, where_trains, transform_non_params=put
    )
    placed = state.replace(
        step=put(state.step),
        skipped=put(state.skipped),
        in_a_row=put(state.in_a_row),
        dropout_key=put(state.dropout_key),
        trainable=jax.tree.map(put, state.trainable, where_trains),
        opt_state=moments,
    )
    return placed, jax.tree.map(put, frozen, where_frozen)


def _dtypes(config: Config, shapes, mask):
    """The dtype of every leaf: float32 of what trains, config.dtype of what is frozen, its own of what is packed."""

    def one(path, shape, trains: bool):
        if is_packed([key.key for key in path]):
            return shape.dtype
        return jnp.dtype(jnp.float32 if trains else config.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes, mask)


def _fresh_state(config: Config, model: Llama, trains) -> TrainState:
    return TrainState.create(
        model=model,
        optimizer=optim.make_optimizer(config.optim, config.steps),
        trainable=trains,
        seed=config.seed,
        accumulation=config.accumulation,
        loss_chunk=config.loss_chunk,
    )
