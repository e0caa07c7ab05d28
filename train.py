"""Trains a LLaMA: python train.py --config configs/7b_32k.py --workdir runs/7b_32k

Any field of the config can be overridden: --config.optim.learning_rate=1e-4. Started again with the same
--workdir, a run goes on from its newest checkpoint. The config file and what it can hold: longlora_jax/config.py.
"""

import dataclasses
import logging
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from longlora_jax import checkpoint, hf, metrics, optim, sharding, trainable
from longlora_jax.config import Config, DataConfig, ModelConfig, validate
from longlora_jax.data import (
    batches,
    load_tokenizer,
    pack_documents,
    read_documents,
    tokenize_documents,
)
from longlora_jax.errors import UserError
from longlora_jax.kernels import kernel_name
from longlora_jax.model import Llama, abstract_params, init_params, logical_axes
from longlora_jax.patterns import FULL, Pattern
from longlora_jax.rope import extend_rope
from longlora_jax.trainer import TrainState, jit_eval_step, jit_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: a Python file with get_config().", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the resolved config.")

log = logging.getLogger("longlora_jax")


def train(config: Config, workdir: str) -> None:
    """One run, from the config to the last checkpoint."""
    config, resumed = resolve(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    model = build_model(config)
    windows = read_windows(config.data, config)
    eval_windows = read_windows(config.eval.data, config)[: config.eval.max_windows] if config.eval.every else None

    Path(workdir).mkdir(parents=True, exist_ok=True)
    if not resumed:
        checkpoint.write_run_config(workdir, config)
    state, frozen = initial_state(config, model, mesh)
    data = batches(windows, batch_size=config.batch_size, seed=config.seed)
    checkpoints = checkpoint.RunCheckpoints(workdir, keep=config.keep_checkpoints)
    if checkpoints.latest_step() is not None:
        state, data_state = checkpoints.restore(state)
        data.set_state(data_state)
        log.info("resumed at step %d", state.step)
    print_census(config, model, mesh, state, frozen, data)

    start = int(state.step)
    writer = metrics.MetricsLog(workdir, start_step=start)
    evaluate = Evaluation(config, model, eval_windows)
    batch_sharding = sharding.batch_sharding(mesh, config.batch_size // config.accumulation)
    full_from = round(config.steps * (1 - config.attention.full_last))
    step_fn = jit_train_step()
    bar = metrics.progress_bar(config.steps, start=start, label=Path(workdir).name)
    began, tokens, logged = time.perf_counter(), 0, start
    for step in range(start, config.steps):
        if step >= full_from and state.model.pattern != FULL:
            log.info(
                "step %d: the last %g of the steps run under full attention",
                step,
                config.attention.full_last,
            )
            state = state.replace(model=state.model.clone(pattern=FULL))
        batch = next(data)
        del batch["segment_ids"]  # documents are joined: a window is one segment, nothing to mask
        state, values = step_fn(state, frozen, jax.device_put(batch, batch_sharding))
        tokens += batch["tokens"].size
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            loss = float(values["loss"])
            seconds = time.perf_counter() - began
            line = {
                "train/loss": loss,
                "train/grad_norm": float(values["grad_norm"]),
                "train/learning_rate": float(optim.make_schedule(config.optim, config.steps)(step)),
                "perf/tokens_per_second": tokens / seconds,
                "perf/step_seconds": seconds / (done - logged),
            }
            if config.eval.every and (done % config.eval.every == 0 or done == config.steps):
                line |= evaluate(state, frozen)
            writer.write(done, line)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            began, tokens, logged = time.perf_counter(), 0, done
        bar.update()
        if done % config.save_every == 0 or done == config.steps:
            checkpoints.save(state, data.get_state())
    bar.close()
    checkpoints.close()
    writer.close()
    log.info("done: %d steps in %s", config.steps, workdir)


def resolve(config: Config, workdir: str) -> tuple[Config, bool]:
    """The config with nothing left open: model shape, extended rope, absolute base path; and whether it resumes.

    Raises UserError if the workdir holds another run, or if the config and the base model disagree.
    """
    validate(config)
    config = dataclasses.replace(config)
    if config.init_from:
        config.init_from = str(Path(config.init_from).absolute())
        base = hf.load_config(config.init_from)
        if config.model is not None:
            check_same_shape(config.model, base, config.init_from)
        config.model = base
    if not config.data.tokenizer:
        config.data = dataclasses.replace(config.data, tokenizer=config.init_from)
    config.eval = dataclasses.replace(
        config.eval,
        data=dataclasses.replace(config.eval.data, tokenizer=config.eval.data.tokenizer or config.data.tokenizer),
    )
    config.model = extend_model(config.model, config)
    if not checkpoint.is_workdir(workdir):
        return config, False
    saved = checkpoint.read_run_config(workdir)
    checkpoint.check_base(workdir, saved)
    free = {"log_every": 0, "save_every": 0, "keep_checkpoints": 0, "mesh": None}
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
    """The model with its rope made fit for the training window."""
    if config.rope.type == "keep":
        return model
    scaling = extend_rope(
        scaling=model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
        seq_len=config.seq_len,
        rope_type=config.rope.type,
        factor=config.rope.factor or None,
    )
    window = max(config.seq_len, model.max_position_embeddings)
    return dataclasses.replace(model, rope_scaling=scaling, max_position_embeddings=window)


def build_model(config: Config) -> Llama:
    """The model of a run under its training pattern."""
    name = config.attention.pattern
    return Llama(
        config.model,
        lora=config.lora if config.mode != "full" else None,
        pattern=FULL if name == "full" else Pattern(name, config.attention.group_tokens(config.seq_len)),
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )


def read_windows(data: DataConfig, config: Config):
    """The corpus as windows [num, seq_len]."""
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {data.tokenizer} has {tokenizer.vocab_size} pieces, the model's vocabulary {config.model.vocab_size}: "
            "set data.tokenizer to the model's own"
        )
    documents = read_documents(
        data.source,
        data.path,
        hold_out=data.hold_out,
        only=data.only,
        text_key=data.text_key,
        split=data.split,
    )
    ids = tokenize_documents(documents, tokenizer, max_tokens=data.max_tokens)
    return pack_documents(ids, config.seq_len, eos_id=tokenizer.eos_id)


def initial_state(config: Config, model: Llama, mesh):
    """(TrainState, frozen) on the mesh: base weights from init_from or random, adapters fresh.

    Trainables are float32, frozen weights config.dtype.
    """
    shapes = abstract_params(model)
    shardings = sharding.weight_shardings(mesh, logical_axes(model), shapes)
    mask = trainable.trainable_mask(shapes, config.mode)
    key = jax.random.PRNGKey(config.seed)
    if config.init_from:
        params = checkpoint.load_model(config.init_from).merged()
        fresh = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("lora_"), shapes)
        adapters = jax.jit(lambda key: trainable.partition(init_params(model, key), fresh)[0])(key)
        params = trainable.combine(adapters, params)
        place = lambda x, trains, where: jax.device_put(jnp.asarray(x, jnp.float32 if trains else config.dtype), where)  # noqa: E731
        params = jax.tree.map(place, params, mask, shardings)
    else:
        params = jax.jit(lambda key: init_params(model, key), out_shardings=shardings)(key)
    trains, frozen = trainable.partition(params, mask)
    state = TrainState.create(
        model=model,
        optimizer=optim.make_optimizer(config.optim, config.steps),
        trainable=trains,
        seed=config.seed,
        accumulation=config.accumulation,
        loss_chunk=config.loss_chunk,
    )
    return state, frozen


class Evaluation:
    """Loss and perplexity of fixed windows under full attention, averaged over tokens."""

    def __init__(self, config: Config, model: Llama, windows):
        self._windows, self._rows = windows, max(config.batch_size // config.accumulation, 1)
        self._step = jit_eval_step(model.clone(pattern=FULL), config.loss_chunk)

    def __call__(self, state: TrainState, frozen) -> dict[str, float]:
        params = trainable.combine(state.trainable, frozen)
        total = scored = 0.0
        for start in range(0, len(self._windows), self._rows):
            sums = self._step(params, as_batch(self._windows[start : start + self._rows]))
            total, scored = total + float(sums[0]), scored + float(sums[1])
        return {
            "eval/loss": total / scored,
            "eval/perplexity": float(jnp.exp(total / scored)),
            "eval/tokens": scored,
        }


def as_batch(tokens):
    """Windows [B, T] as a batch in which every token but the first is scored."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return {
        "tokens": jnp.asarray(tokens),
        "positions": positions,
        "loss_mask": (positions > 0).astype(jnp.int32),
    }


def print_census(config: Config, model: Llama, mesh, state: TrainState, frozen, data) -> None:
    """What is about to happen: parameters by group, tokens a step, memory, kernel, dtype, mesh."""
    shapes = abstract_params(model)
    for line in metrics.census_lines(trainable.census(shapes, trainable.trainable_mask(shapes, config.mode))):
        print(line)
    tokens = config.batch_size * config.seq_len
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    held = size(frozen) + size(state.trainable) * 2 + size(state.opt_state)
    print(f"model      window {config.model.max_position_embeddings:,}, rope {config.model.rope_scaling or 'unscaled'}")
    print(f"attention  {model.pattern}, kernel {kernel_name()}, dtype {config.dtype}, remat {config.remat}")
    print(
        f"step       {tokens:,} tokens, {config.steps:,} steps, {config.steps * tokens / data.tokens_per_epoch:.2f} epochs"
    )
    print(
        f"memory     {held / 2**30:.2f} GiB of weights, optimizer and gradients over {mesh.size} device(s) {dict(mesh.shape)}"
    )
    sys.stdout.flush()


def main(argv) -> None:
    """Checks the command line and trains; what the user got wrong is one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("longlora_jax").setLevel(logging.INFO)
    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]}: see python train.py --help")
        if _CONFIG.value is None or not _WORKDIR.value:
            raise UserError("--config FILE and --workdir DIR are needed: see python train.py --help")
        train(_CONFIG.value, _WORKDIR.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_flags(argv) -> list[str]:
    """absl's parser, with its faults in one line and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        FileNotFoundError,
        ImportError,
    ) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
