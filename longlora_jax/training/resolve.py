"""From a config as it is given to one with nothing left open, and whether the workdir holds this very run."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from longlora_jax.attention.rope import extend_rope
from longlora_jax.config import Config, DataConfig, ModelConfig, validate, with_held_out_eval
from longlora_jax.config_file import read_run_config, with_base_of
from longlora_jax.data.new_tokens import add_tokens, load_with_tokens
from longlora_jax.errors import UserError
from longlora_jax.fields import flat
from longlora_jax.files import one_line
from longlora_jax.weights import hf, hub
from longlora_jax.weights.base import kept_as
from longlora_jax.weights.families import family_of
from longlora_jax.weights.hf_rope import check_longrope_only
from longlora_jax.weights.workdir import check_base, checkpoint_steps, is_workdir

log = logging.getLogger("longlora_jax")

TOKENIZER = "tokenizer"  # in a workdir: the tokenizer with new_tokens

# What may change when a run is resumed: what a step computes from its batch stays the same, up to the order of sums.
FREE_ON_RESUME = (
    *("log_every", "save_every", "keep_checkpoints", "keep_best", "early_stop", "max_bad_steps", "wandb", "eval"),
    *("mesh", "workers", "remat", "chunks", "loss_chunk", "accumulation"),
    "rope",  # what it did stands in the model
)


def resolve(config: Config, workdir: str) -> tuple[Config, bool]:
    """The config with nothing left open: model shape, extended rope, absolute base path; and whether it resumes.

    A run is what it computes, not where its parts lie: the base is known by its weights, the data by its tokens (see
    Batches.set_state). Raises UserError if the workdir holds another run, or if the config and the base model disagree.
    """
    done = checkpoint_steps(workdir)[-1:]  # [the step that this run goes on from], [] at its beginning
    config = with_held_out_eval(_with_base_of_earlier_run(config, workdir if done else config.continue_from))
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
    if config.continue_from and not done:
        _check_earlier_run(config)
    if (warmup := config.optim.warmup_steps) >= config.steps:
        log.warning(
            "optim.warmup_steps=%d of %d steps: the learning rate ends the run at %.0f%% of optim.learning_rate, still "
            "rising; lower optim.warmup_steps",
            *(warmup, config.steps, 100 * config.steps / warmup),
        )
    if not is_workdir(workdir):
        if (Path(workdir) / "config.json").exists():
            raise UserError(f"{workdir} holds the config.json of something else than a run: choose another --workdir")
        return config, False
    saved = read_run_config(workdir)
    check_base(workdir, config)
    if changed := _changed(config, saved, begun=bool(done)):
        how = (
            f"begin a new --workdir from its weights with --config.continue_from={workdir}"
            if done
            else f"remove {workdir}, which has no checkpoint yet"
        )
        raise UserError(
            f"{workdir} holds a run with another {', '.join(changed)}: give the config that it was started with, or "
            + how
        )
    if done and done[0] > config.steps:
        raise UserError(f"steps={config.steps}, and the run in {workdir} has done {done[0]}: give as many or more")
    return config, True


def note_other_draws(config: Config, workdir: str) -> None:
    """Logs a warning if a resumed run, its mesh resolved, draws other numbers than it would have."""
    before = read_run_config(workdir).accumulation
    if config.accumulation != before and (config.lora.dropout or config.neftune_alpha):
        log.warning(
            "accumulation=%d, it was %d: lora.dropout and neftune_alpha draw other numbers from here on",
            *(config.accumulation, before),
        )


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


def _changed(config: Config, saved: Config, begun: bool) -> list[str]:
    """The fields by which a config is another run than the saved one, each with both values; begun: that has a
    checkpoint."""
    free = FREE_ON_RESUME + (("continue_from",) if begun else ())  # which does its part at the start
    fixed = {name: getattr(Config(seq_len=1, steps=1), name) for name in free}

    def computed(config: Config) -> dict[str, Any]:
        parts = [dataclasses.replace(part, path="", tokenizer="") for part in (config.data, *config.mixture)]
        where = {"init_from": "", "data": parts[0], "mixture": tuple(parts[1:])}
        return dataclasses.asdict(dataclasses.replace(config, **fixed, **where))

    ours, theirs = ({name: _plain(x) for name, x in flat(computed(c)).items()} for c in (config, saved))
    changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if "steps" in changed and config.optim.schedule == "constant" and not config.attention.full_last:
        changed.remove("steps")  # nothing before the old last step depended on it

    def shown(values: dict[str, Any], name: str) -> str:
        return one_line(str(values.get(name)), 40)

    return [f"{name} ({shown(ours, name)}, it was {shown(theirs, name)})" for name in changed]


def _with_base_of_earlier_run(config: Config, workdir: str) -> Config:
    """The config with what a workdir says of the base, where it does not say it itself: that of continue_from, or the
    run's own once it has a checkpoint, and the earlier one may be gone."""
    if not config.continue_from:
        return config
    if not is_workdir(workdir):
        raise UserError(
            f"continue_from={workdir} is not the workdir of a run: give one, or set init_from to begin with a model's "
            "folder"
        )
    return dataclasses.replace(with_base_of(config, workdir), continue_from=str(Path(config.continue_from).absolute()))


def _check_earlier_run(config: Config) -> None:
    """Raises UserError if continue_from has no weights yet, or such as do not fit the model of this run."""
    if not checkpoint_steps(config.continue_from):
        raise UserError(
            f"continue_from={config.continue_from} has no checkpoint yet: wait for its first (save_every), or set "
            "init_from to begin with its base"
        )
    earlier = read_run_config(config.continue_from)
    check_base(config.continue_from, config)
    names = ("mode",) if config.mode == "full" else ("mode", "lora")
    if wrong := [f"{n}={getattr(earlier, n)}" for n in names if getattr(earlier, n) != getattr(config, n)]:
        raise UserError(f"continue_from={config.continue_from} was trained with {', '.join(wrong)}: set the same")
    assert earlier.model is not None and config.model is not None  # both are resolved
    check_same_shape(config.model, earlier.model, config.continue_from)


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
    if family_of(model).longrope_only:
        check_longrope_only(scaling)
    return dataclasses.replace(model, rope_scaling=scaling, max_position_embeddings=window)
