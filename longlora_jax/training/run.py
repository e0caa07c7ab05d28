"""From a config to what a run is made of: resolved config, model, windows of data, state on the mesh."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from longlora_jax.attention.patterns import FULL, Pattern
from longlora_jax.attention.rope import extend_rope
from longlora_jax.config import Config, DataConfig, ModelConfig, validate
from longlora_jax.data import (
    Batches,
    Windows,
    batches,
    load_tokenizer,
    open_documents,
    pack,
)
from longlora_jax.errors import UserError
from longlora_jax.model import trainable
from longlora_jax.model.decoder import Llama, abstract_params, init_params, logical_axes
from longlora_jax.parallel import sharding
from longlora_jax.training import optim
from longlora_jax.training.step import TrainState
from longlora_jax.weights import hf, hub, load


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The Config of a file with get_config(), changed by flags such as --config.seq_len=4096.

    Raises UserError if the file cannot be read or a flag does not fit.
    """
    values, words = flags.FlagValues(), ["", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    try:
        values(words)
        config = values["config"].value
        _ = getattr(config, "seq_len", None)  # a file that could not be read says so here
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        fault = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(fault.split("earlier failure to load: ")[-1]) from error
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} gives a {type(config).__name__}: return a Config")
    return config


def resolve(config: Config, workdir: str) -> tuple[Config, bool]:
    """The config with nothing left open: model shape, extended rope, absolute base path; and whether it resumes.

    Raises UserError if the workdir holds another run, or if the config and the base model disagree.
    """
    validate(config)
    config = dataclasses.replace(config)
    if config.init_from:
        folder = hub.local_folder(config.init_from, what="a Hugging Face folder or a converted checkpoint")
        config.init_from = str(Path(folder).absolute())
        base = hf.load_config(config.init_from)
        if config.model is not None:
            check_same_shape(config.model, base, config.init_from)
        config.model = base
    tokenizer = str(Path(config.data.tokenizer or config.init_from).absolute())
    config.data = dataclasses.replace(config.data, tokenizer=tokenizer)
    tokenizer = str(Path(config.eval.data.tokenizer or tokenizer).absolute())
    config.eval = dataclasses.replace(config.eval, data=dataclasses.replace(config.eval.data, tokenizer=tokenizer))
    config.mixture = tuple(
        dataclasses.replace(part, tokenizer=str(Path(part.tokenizer or config.data.tokenizer).absolute()))
        for part in config.mixture
    )
    assert config.model is not None  # validate() wants one where there is no init_from
    config.model = extend_model(config.model, config)
    if not load.is_workdir(workdir):
        if (Path(workdir) / "config.json").exists():
            raise UserError(f"{workdir} holds the config.json of something else than a run: choose another --workdir")
        return config, False
    saved = load.read_run_config(workdir)
    load.check_base(workdir, saved)
    free = {
        "log_every": 0,
        "save_every": 0,
        "keep_checkpoints": 0,
        "max_bad_steps": 0,
        "mesh": None,
        "workers": 0,
        "remat": "",
        "wandb": "",
    }
    ours, theirs = (dataclasses.asdict(dataclasses.replace(c, **free)) for c in (config, saved))
    if changed := [name for name in ours if _plain(ours[name]) != _plain(theirs[name])]:
        raise UserError(
            f"{workdir} holds a run with another {', '.join(changed)}: choose a new --workdir, or give the config "
            "that it was started with"
        )
    return config, True


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
    )


def read_windows(data: DataConfig, config: Config) -> Windows:
    """The documents of a corpus, packed into windows of seq_len tokens."""
    assert config.model is not None  # resolve() filled it
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {data.tokenizer} has {tokenizer.vocab_size} pieces, the model's vocabulary "
            f"{config.model.vocab_size}: set data.tokenizer to the model's own"
        )
    documents = open_documents(data, tokenizer)
    # An answer that is cut is none: an example longer than a window is left out.
    return pack(documents, config.seq_len, data.packing, min_tokens=data.min_tokens, whole=data.task == "sft")


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
    dtypes = jax.tree.map(lambda trains: _dtype(config, trains), mask)
    if config.init_from:
        table = load.open_model(config.init_from).table
        assert config.model is not None  # resolve() filled it
        base = sharding.place_weights(config.model, table, shardings, dtypes)
        is_new = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("lora_"), shapes)
        fresh = trainable.partition(shardings, is_new)[0]
        adapters = jax.jit(lambda key: trainable.partition(init_params(model, key), is_new)[0], out_shardings=fresh)
        params = trainable.combine(adapters(key), base)
    else:

        def random(key):
            return jax.tree.map(lambda x, dtype: x.astype(dtype), init_params(model, key), dtypes)

        params = jax.jit(random, out_shardings=shardings)(key)
    trains, frozen = trainable.partition(params, mask)
    state = _fresh_state(config, model, trains)
    # The step leaves its scalars on the whole mesh: begun elsewhere, the second step would compile anew.
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, everywhere), state), frozen


def abstract_state(config: Config, model: Llama, mesh=None):
    """(TrainState, frozen) of initial_state as shapes and dtypes, without computing or holding anything.

    With a mesh, each leaf says where it would be: enough to compile the step for devices that are not here.
    """
    shapes = abstract_params(model)
    mask = trainable.trainable_mask(shapes, config.mode)
    cast = lambda x, trains: jax.ShapeDtypeStruct(x.shape, _dtype(config, trains))  # noqa: E731
    trains, frozen = trainable.partition(jax.tree.map(cast, shapes, mask), mask)
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


def _dtype(config: Config, trains: bool):
    return jnp.dtype(jnp.float32 if trains else config.dtype)


def _fresh_state(config: Config, model: Llama, trains) -> TrainState:
    return TrainState.create(
        model=model,
        optimizer=optim.make_optimizer(config.optim, config.steps),
        trainable=trains,
        seed=config.seed,
        accumulation=config.accumulation,
        loss_chunk=config.loss_chunk,
    )
