"""From a config to what a run is made of: resolved config, model, windows of data, state on the mesh."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.attention.rope import extend_rope
from longlora_jax.config import Config, DataConfig, ModelConfig, name_of, validate, with_held_out_eval
from longlora_jax.data import (
    Batches,
    Windows,
    batches,
    open_documents,
    pack,
)
from longlora_jax.data.new_tokens import add_tokens, load_with_tokens
from longlora_jax.errors import UserError
from longlora_jax.model import trainable
from longlora_jax.model.codes import Quantization
from longlora_jax.model.decoder import Llama, abstract_params, init_params, logical_axes
from longlora_jax.model.quantized import is_packed
from longlora_jax.parallel import sharding
from longlora_jax.resilience.checkpoints import RunCheckpoints
from longlora_jax.training import optim
from longlora_jax.training.step import TrainState
from longlora_jax.weights import hf, hub, load
from longlora_jax.weights.base import kept_as
from longlora_jax.weights.families import family_of
from longlora_jax.weights.rules import with_rows

log = logging.getLogger("longlora_jax")

TOKENIZER = "tokenizer"  # in a workdir: the tokenizer with new_tokens


# What may change when a run is resumed: what a step computes from its batch stays the same, up to the order of sums.
FREE_ON_RESUME = (
    *("log_every", "save_every", "keep_checkpoints", "keep_best", "early_stop", "max_bad_steps", "wandb", "eval"),
    *("mesh", "workers", "remat", "chunks", "loss_chunk", "accumulation"),
    "rope",  # what it did stands in the model
    "continue_from",  # it did its part at the start
)


def resolve(config: Config, workdir: str) -> tuple[Config, bool]:
    """The config with nothing left open: model shape, extended rope, absolute base path; and whether it resumes.

    A run is what it computes, not where its parts lie: the base is known by its weights, the data by its tokens (see
    Batches.set_state). Raises UserError if the workdir holds another run, or if the config and the base model disagree.
    """
    config = with_held_out_eval(_with_base_of_earlier_run(config))
    validate(config)
    config = dataclasses.replace(config)
    if config.init_from:
        folder = hub.local_folder(config.init_from, what="a Hugging Face folder or a converted checkpoint")
        config.init_from = str(Path(folder).absolute())
        base = hf.load_config(config.init_from)
        if config.model is not None:
            check_same_shape(config.model, base, config.init_from)
        config.model = base
        config.base_quantization = kept_as(config)
    tokenizer = str(Path(config.data.tokenizer or config.init_from).absolute())
    if config.new_tokens:
        kept = Path(workdir, TOKENIZER).absolute()
        tokenizer = str(kept) if kept.is_dir() else tokenizer
        largest = load_with_tokens(tokenizer, config.new_tokens).max_id
        assert config.model is not None  # validate() wants one where there is no init_from
        config.model = dataclasses.replace(config.model, vocab_size=max(config.model.vocab_size, largest + 1))
    config.data = dataclasses.replace(config.data, tokenizer=tokenizer)
    tokenizer = str(Path(config.eval.data.tokenizer or tokenizer).absolute())
    config.eval = dataclasses.replace(config.eval, data=dataclasses.replace(config.eval.data, tokenizer=tokenizer))
    config.mixture = tuple(
        dataclasses.replace(part, tokenizer=str(Path(part.tokenizer or config.data.tokenizer).absolute()))
        for part in config.mixture
    )
    assert config.model is not None  # validate() wants one where there is no init_from
    config.model = extend_model(config.model, config)
    if config.mode != "full" and (lacking := set(config.lora.targets) - set(config.model.targets)):
        raise UserError(
            f"lora.targets holds {', '.join(sorted(lacking))}, which a {config.model.model_type} does not have: use "
            f"names out of {', '.join(config.model.targets)}"
        )
    if config.continue_from:
        _check_earlier_run(config)
    if (warmup := config.optim.warmup_steps) >= config.steps:
        log.warning(
            "optim.warmup_steps=%d of %d steps: the learning rate ends the run at %.0f%% of optim.learning_rate, still "
            "rising; lower optim.warmup_steps",
            *(warmup, config.steps, 100 * config.steps / warmup),
        )
    if not load.is_workdir(workdir):
        if (Path(workdir) / "config.json").exists():
            raise UserError(f"{workdir} holds the config.json of something else than a run: choose another --workdir")
        return config, False
    saved = load.read_run_config(workdir)
    load.check_base(workdir, config)
    if changed := _changed(config, saved):
        raise UserError(
            f"{workdir} holds a run with another {', '.join(changed)}: give the config that it was started with, or "
            f"begin a new --workdir from its weights with --config.continue_from={workdir}"
        )
    return config, True


def keep_tokenizer(config: Config, workdir: str) -> Config:
    """The config with its tokenizer in the workdir, if new_tokens makes one: it is written there, for exports."""
    kept = Path(workdir, TOKENIZER).absolute()
    if not config.new_tokens or config.data.tokenizer == str(kept):
        return config
    if not kept.is_dir():
        add_tokens(config.data.tokenizer, str(kept), config.new_tokens)

    def there(data: DataConfig) -> DataConfig:
        return dataclasses.replace(data, tokenizer=str(kept)) if data.tokenizer == config.data.tokenizer else data

    evaluation = dataclasses.replace(config.eval, data=there(config.eval.data))
    return dataclasses.replace(
        config, data=there(config.data), mixture=tuple(map(there, config.mixture)), eval=evaluation
    )


def _changed(config: Config, saved: Config) -> list[str]:
    """The fields by which a config is another run than the saved one."""
    fixed = {name: getattr(Config(seq_len=1, steps=1), name) for name in FREE_ON_RESUME}

    def computed(config: Config) -> dict[str, Any]:
        parts = [dataclasses.replace(part, path="", tokenizer="") for part in (config.data, *config.mixture)]
        where = {"init_from": "", "data": parts[0], "mixture": tuple(parts[1:])}
        return dataclasses.asdict(dataclasses.replace(config, **fixed, **where))

    ours, theirs = computed(config), computed(saved)
    changed = [name for name in ours if _plain(ours[name]) != _plain(theirs[name])]
    if "steps" in changed and config.optim.schedule == "constant" and not config.attention.full_last:
        changed.remove("steps")  # nothing before the old last step depended on it
    return changed


def _with_base_of_earlier_run(config: Config) -> Config:
    """The config with what continue_from says of the base, where it does not say it itself."""
    if not config.continue_from:
        return config
    if not load.is_workdir(config.continue_from):
        raise UserError(
            f"continue_from={config.continue_from} is not the workdir of a run: give one, or set init_from to begin "
            "with a model's folder"
        )
    earlier = load.read_run_config(config.continue_from)
    tokenizer = config.data.tokenizer or (config.init_from or earlier.data.tokenizer)
    return dataclasses.replace(
        config,
        continue_from=str(Path(config.continue_from).absolute()),
        init_from=config.init_from or earlier.init_from,
        model=config.model or (None if earlier.init_from else earlier.model),
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
    )


def _check_earlier_run(config: Config) -> None:
    """Raises UserError if the weights of continue_from do not fit the model of this run."""
    earlier = load.read_run_config(config.continue_from)
    load.check_base(config.continue_from, config)
    names = ("mode",) if config.mode == "full" else ("mode", "lora")
    if wrong := [f"{n}={getattr(earlier, n)}" for n in names if getattr(earlier, n) != getattr(config, n)]:
        raise UserError(f"continue_from={config.continue_from} was trained with {', '.join(wrong)}: set the same")
    assert earlier.model is not None and config.model is not None  # both are resolved
    check_same_shape(config.model, earlier.model, config.continue_from)


def continued_state(config: Config, state: TrainState) -> TrainState:
    """The state at step 0 with the trained weights and AdamW's moments of config.continue_from's newest checkpoint."""
    earlier = load.read_run_config(config.continue_from)
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


def _plain(value):
    """A value as it looks after JSON: tuples are lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def check_same_shape(given: ModelConfig, base: ModelConfig, path: str) -> None:
    """Raises UserError if the config's model is not the one in the folder; windows and token ids may differ."""
    free = {
        "max_position_embeddings",
        "rope_scaling",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "model_type",
    }
    names = [f.name for f in dataclasses.fields(given) if f.name not in free]
    if wrong := [
        f"{n}={getattr(base, n)}, not {getattr(given, n)}" for n in names if getattr(base, n) != getattr(given, n)
    ]:
        raise UserError(f"{path} is another model than the config's: it has {'; '.join(wrong)}")


def extend_model(model: ModelConfig, config: Config) -> ModelConfig:
    """The model with its rope made fit for the training window, which becomes its own if it is longer."""
    window = max(config.seq_len, model.max_position_embeddings)
    if config.rope.type == "keep":
        return dataclasses.replace(model, max_position_embeddings=window)
    scaling = extend_rope(
        scaling=model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
        seq_len=config.seq_len,
        rope_type=config.rope.type,
        factor=config.rope.factor or None,
        unscaled=family_of(model).rope_type,
    )
    return dataclasses.replace(model, rope_scaling=scaling, max_position_embeddings=window)


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


def check_ids(tokens: np.ndarray, config: Config) -> None:
    """Raises UserError if a batch, ids [B, T] on the host, has a token that the model has no row for.

    What counts are the ids in use: many a tokenizer has a few more pieces than its model has rows.
    """
    assert config.model is not None  # resolve() filled it
    largest = int(tokens.max(initial=0))
    if largest >= config.model.vocab_size:
        raise UserError(
            f"the data holds token {largest}, and the model's vocabulary of {config.model.vocab_size} ends before it: "
            "set data.tokenizer to the model's own, or prepare the data again with it"
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
