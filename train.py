"""Trains a LLaMA: python train.py --config configs/7b_32k.py --workdir runs/7b_32k

Any field of the config can be overridden: --config.optim.learning_rate=1e-4. Started again with the same
--workdir, a run goes on from its newest checkpoint. The config file and what it can hold: longlora_jax/config.py.
On several hosts the same command runs on each; launch/ has recipes. Exit code 0: done; 2: something is to be mended
first; 75: ended early (SIGTERM, a standstill), start the same command again. What a run survives: docs/reliability.md.
"""

import dataclasses
import gc
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jax.errors import JaxRuntimeError
from ml_collections import config_flags

from longlora_jax.attention.kernels import kernel_name
from longlora_jax.attention.patterns import FULL
from longlora_jax.config import Config
from longlora_jax.config_file import without_bytecode
from longlora_jax.data import Batches, in_order, show
from longlora_jax.data.new_tokens import load_with_tokens
from longlora_jax.errors import UserError, in_plain_words
from longlora_jax.model import trainable
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.parallel import distributed, sharding
from longlora_jax.plan import costs, meshes
from longlora_jax.progress import progress_bar
from longlora_jax.resilience import versions
from longlora_jax.resilience.checkpoints import Best, RunCheckpoints
from longlora_jax.resilience.health import Health
from longlora_jax.resilience.lock import WorkdirLock
from longlora_jax.resilience.watchdog import AGAIN, Watchdog
from longlora_jax.training import metrics, optim, run
from longlora_jax.training.resolve import keep_tokenizer, note_other_draws, resolve
from longlora_jax.training.step import TrainState, compile_train_step, jit_eval_step
from longlora_jax.weights.workdir import checkpoint_steps, write_run_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: a Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the resolved config.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; clusters that jax knows need no flags.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run; 1: this one alone.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.", lower_bound=0)
_START = flags.DEFINE_integer("start_seconds", 300, "How long processes wait for each other.", lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "After so long without a sign of life a process is given up.", lower_bound=1
)
_STALL = flags.DEFINE_integer(
    "stall_seconds", 3600, "A run that completes no step for so long is ended.", lower_bound=1
)

log = logging.getLogger("longlora_jax")


def train(config: Config, workdir: str, watch: Watchdog, lock: WorkdirLock) -> bool:
    """One run, from the config to the last checkpoint, or to where the watchdog ends it. Returns whether it is done."""
    config, resumed = resolve(config, workdir)
    metrics.check_wandb(config.wandb)
    distributed.check_same("config", lambda: dataclasses.asdict(config))
    config = meshes.resolve_mesh(config)
    if resumed:
        note_other_draws(config, workdir)
    distributed.check_same("mesh", lambda: {"mesh.auto (the memory of its devices)": dataclasses.asdict(config.mesh)})
    mesh = sharding.make_mesh(config.mesh)
    config = costs.resolve_remat(config, mesh)
    distributed.check_same("remat", lambda: {"remat=auto (the memory of its devices)": config.remat})
    batch_sharding = sharding.batch_sharding(mesh, config.batch_size // config.accumulation)
    model = run.build_model(config, mesh)
    rows = sharding.local_rows(batch_sharding, (config.batch_size, config.seq_len))
    data = run.open_batches(config, rows)
    distributed.check_same("data", lambda: {"the data": data.identity()})
    evaluate = Evaluation(config, model) if config.eval.every else None
    state, frozen = run.initial_state(config, model, mesh)

    begun = (checkpoint_steps(workdir) or [0])[-1]
    distributed.check_same("step", lambda: {"the newest checkpoint": begun})
    if config.attention.is_full(begun, config.steps):
        state = state.replace(model=model.clone(pattern=FULL))
    shape = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), "int32", sharding=batch_sharding)
    step_fns = {state.model.pattern: compile_train_step(state, frozen, shape, segmented=data.segmented)}

    # Nothing is written before this line: whatever the user got wrong has been said by now.
    lock.acquire()
    checkpoints = RunCheckpoints(workdir, keep=config.keep_checkpoints, keep_best=config.keep_best)
    checkpoints.best.of = evaluate.identity if evaluate else ""
    if distributed.is_first():  # also of a run that resumes: its parts may lie elsewhere by now
        write_run_config(workdir, keep_tokenizer(config, workdir))
    distributed.check_shared(f"{workdir}/config.json")
    if checkpoints.latest_step() is not None:
        state, data_state = checkpoints.restore(state)
        data.set_state(data_state)
        log.info("resumed at step %d", state.step)
    elif config.continue_from:
        state = run.continued_state(config, state)
    start = int(state.step)
    versions.record(workdir, start)
    print_census(config, state.model, mesh, step_fns[state.model.pattern], data)

    writer = metrics.MetricsLog(workdir, start_step=start, wandb=config.wandb, config=dataclasses.asdict(config))
    schedule = optim.make_schedule(config.optim, config.steps)
    health = Health(min(config.max_bad_steps, config.steps), skipped=int(state.skipped))

    def place(batch):
        run.check_ids(batch["tokens"], config)
        if not data.segmented:
            del batch["segment_ids"]  # a row is one segment: nothing to mask
        return sharding.place_batch(batch, batch_sharding, rows, config.batch_size)

    last = start == config.steps or _stops_early(config, checkpoints.best)
    batch = None if last else place(next(data))
    began, tokens, logged, done = time.perf_counter(), 0, start, start
    bar = progress_bar(config.steps, start=start, label=Path(workdir).name, unit="step")
    watch.begin(start)
    with checkpoints, bar:  # whatever ends the steps, the save under way is finished first
        for step in range(start, start if last else config.steps):
            pattern = FULL if config.attention.is_full(step, config.steps) else model.pattern
            if pattern != state.model.pattern:
                state = state.replace(model=state.model.clone(pattern=pattern))
                if pattern not in step_fns:
                    log.info("step %d: under %s attention (attention.full_last, full_every)", step, pattern)
                    step_fns[pattern] = compile_train_step(state, frozen, shape, segmented=data.segmented)
            state, values = step_fns[pattern](state, frozen, batch)
            tokens += config.batch_size * config.seq_len
            done = step + 1
            last = done == config.steps
            batch = None if last else place(next(data))  # while the step runs
            eval_due = evaluate is not None and (done % config.eval.every == 0 or last)
            if done % config.log_every == 0 or eval_due or last:
                loss = float(values["loss"])  # waits for the step
                seconds = time.perf_counter() - began
                line = {
                    "train/loss": loss,
                    "train/grad_norm": float(values["grad_norm"]),
                    "train/learning_rate": float(schedule(step)),
                    "perf/tokens_per_second": tokens / seconds,
                    "perf/step_seconds": seconds / (done - logged),
                }
                line |= metrics.peak_memory() | health.look(done, values)
                if evaluate is not None and eval_due:
                    line |= evaluate(state, frozen)
                    checkpoints.best.update(done, line["eval/loss"])
                    last = last or _stops_early(config, checkpoints.best)
                writer.write(done, line)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                health.check(done, values, data, workdir)
                began, tokens, logged = time.perf_counter(), 0, done
            bar.update()
            ends = watch.due(done)
            if done % config.save_every == 0 or last or ends or (config.keep_best and checkpoints.best.step == done):
                checkpoints.save(state, data.get_state(done))
            if ends or last:
                break
    data.close()
    writer.close()
    log.info("%s: %d steps in %s", "done" if last else "ended early, to be started again", done, workdir)
    return last


def _stops_early(config: Config, best: Best) -> bool:
    """Whether so many evaluations have brought nothing better that the run ends (early_stop), and says so."""
    if not config.early_stop or best.since < config.early_stop:
        return False
    log.info(
        "%d evaluations without a lower eval/loss than %.4f of step %d: the run ends here (early_stop)",
        *(best.since, best.loss, best.step),
    )
    return True


class Evaluation:
    """Loss and perplexity of fixed windows under full attention, averaged over tokens; identity: stands for these."""

    def __init__(self, config: Config, model: Llama):
        self._windows = windows = run.read_windows(config.eval.data, config)
        distributed.check_same("eval data", lambda: {"the data of eval": windows.identity()})
        self._batch_size, self._max_windows = config.batch_size // config.accumulation, config.eval.max_windows
        self._sharding = sharding.batch_sharding(model.mesh, self._batch_size)
        self._rows = sharding.local_rows(self._sharding, (self._batch_size, config.seq_len))
        self._step = jit_eval_step(model.clone(pattern=FULL), config.loss_chunk)
        self._config = config
        what = json.dumps([windows.identity(), self._max_windows], sort_keys=True)
        self.identity = hashlib.sha256(what.encode()).hexdigest()
        next(self._batches())  # what cannot be scored is said now, not after hours of training

    def __call__(self, state: TrainState, frozen) -> dict[str, float]:
        """Metrics of the state's weights: eval/loss in nats a token, eval/perplexity, eval/tokens scored."""
        params = trainable.combine(state.trainable, frozen)
        total = scored = 0.0
        for batch in self._batches():
            sums = self._step(params, sharding.place_batch(batch, self._sharding, self._rows, self._batch_size))
            total, scored = total + float(sums[0]), scored + float(sums[1])
        return {"eval/loss": total / scored, "eval/perplexity": math.exp(total / scored), "eval/tokens": scored}

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        few = {"batch_size": self._batch_size, "rows": self._rows, "max_windows": self._max_windows}
        for batch in in_order(self._windows, **few):
            run.check_ids(batch["tokens"], self._config, "eval.data")
            if not self._windows.segmented:
                del batch["segment_ids"]
            yield batch


def print_census(config: Config, model: Llama, mesh, step_fn, data: Batches) -> None:
    """What is about to happen: parameters by group, attention, data, tokens a step, memory, mesh."""
    if not distributed.is_first():
        return
    shapes = abstract_params(model.clone(quantization=None))  # codes are not parameters
    for line in metrics.census_lines(trainable.census(shapes, trainable.trainable_mask(shapes, config.mode))):
        print(line)
    tokens = config.batch_size * config.seq_len
    memory = step_fn.memory_analysis()
    held, temporary = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
    rope = config.model.rope_scaling
    scaled = f"{rope.rope_type} x{rope.factor:g} from {rope.original_max_position_embeddings:,}" if rope else "unscaled"
    print(f"model      window {config.model.max_position_embeddings:,}, rope {scaled}")
    tokens_seen = model.pattern.group_size or config.seq_len
    kernel = kernel_name(config.dtype, config.model.head_dim, packed=data.segmented, tokens=tokens_seen)
    if model.quantization:
        print(f"base       matrices of the blocks in {model.quantization}")
    print(f"attention  {model.pattern}, kernel {kernel}, dtype {config.dtype}, remat {config.remat}")
    for part, share, epochs in zip(data.parts, data.shares, data.epochs(config.steps), strict=True):
        print(f"data       {share:.1%} of rows, {epochs:.2f} epochs, {part.packing.line()}")
    if config.data.task == "sft":
        print(
            "\n".join(
                show.example_lines(data.parts[0].documents, load_with_tokens(config.data.tokenizer, config.new_tokens))
            )
        )
    print(f"step       {tokens:,} tokens, {config.steps:,} steps")
    if rates := optim.own_rates(config.optim):
        print(f"rates      {', '.join(f'{group} {rate:g}' for group, rate in rates.items())}, all else as optim says")
    print(
        f"memory     {held + temporary:.2f} GiB a device expected: {held:.2f} of weights and optimizer, "
        f"{temporary:.2f} of gradients and activations"
    )
    print(f"devices    {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}", flush=True)


def main(argv) -> None:
    """Checks the command line and trains; what the user got wrong is one line and exit code 2."""
    metrics.log_to_console()
    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]}: see python train.py --help")
        if _CONFIG.value is None or not _WORKDIR.value:
            raise UserError("--config FILE and --workdir DIR are needed: see python train.py --help")
        if not isinstance(_CONFIG.value, Config):
            raise UserError(
                f"get_config() of the --config file gives a {type(_CONFIG.value).__name__}: return a Config"
            )
        distributed.join(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            start_seconds=_START.value,
            heartbeat_seconds=_HEARTBEAT.value,
        )
        if not distributed.is_first():
            metrics.leave_talking()
        with Watchdog(_STALL.value) as watch, WorkdirLock(_WORKDIR.value) as lock, distributed.one_end():
            done = train(_CONFIG.value, _WORKDIR.value, watch, lock)
    except (UserError, OSError, MemoryError, JaxRuntimeError) as error:
        if not (reason := str(error) if isinstance(error, UserError) else in_plain_words(error)):
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    if not done:
        sys.exit(AGAIN)


def parse_flags(argv) -> list[str]:
    """absl's parser, with its faults in one line and exit code 2."""
    try:
        with without_bytecode():
            rest = flags.FLAGS(argv)
            if _CONFIG.value is not None:
                _ = _CONFIG.value.seq_len  # a file that could not be read says so here
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        fault = " ".join(str(error.args[0] if error.args else error).split())
        fault = fault.split("earlier failure to load: ")[-1]  # ml_collections' preamble
        hint = ": longlora_jax/config.py has all fields" if isinstance(error, KeyError | AttributeError) else ""
        print(f"error: {fault}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    # Tracing makes objects by the million, and nearly all stay: going through them took a sixth of a small run's start.
    gc.set_threshold(100_000, 20, 20)
    app.run(main, flags_parser=parse_flags)
