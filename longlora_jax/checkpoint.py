"""Checkpoints by orbax: a training run's state, and converted models; and one way to load any of them.

A run saves what it changed (trainables, optimizer, step, data position). Its frozen base is named, not copied:
by path and by a fingerprint of the files there, which is checked when the run is resumed or exported.
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from longlora_jax import hf
from longlora_jax.config import Config, LoraConfig, ModelConfig, from_dict
from longlora_jax.errors import UserError
from longlora_jax.files import new_folder, read_json, write_json
from longlora_jax.lora import merge_lora
from longlora_jax.model import Llama, abstract_params
from longlora_jax.trainable import combine, partition, trainable_mask


@dataclass
class LoadedModel:
    """A model from disk: its config, params (adapters still apart, if lora is given), its tokenizer's folder."""

    config: ModelConfig
    params: Any
    lora: LoraConfig | None
    tokenizer_dir: str

    def merged(self):
        """The params with every adapter folded into its kernel."""
        return self.params if self.lora is None else merge_lora(self.params, self.lora)


class RunCheckpoints:
    """The checkpoints/ of a workdir: saved asynchronously, complete or absent, the newest few kept."""

    def __init__(self, workdir: str, *, keep: int = 2):
        folder = Path(workdir).absolute() / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --workdir") from error
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state, data_state: dict) -> None:
        """Saves a TrainState and the position in the data under the state's step."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(_saved(state)), data=ocp.args.JsonSave(data_state))
        self._manager.save(int(state.step), args=args)

    def restore(self, state) -> tuple[Any, dict]:
        """The newest (TrainState, data position), in the shapes, dtypes and shardings of the given state."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _saved(state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest_step(), args=args)
        return state.replace(**restored["state"]), restored["data"]

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.close()


def _saved(state) -> dict:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}


def fingerprint(path: str) -> str:
    """A digest of a model folder's weights: of every safetensors file its size and 1 MiB at head, middle and tail."""
    digest = hashlib.sha256()
    files = sorted(
        p for p in Path(path).rglob("*") if p.is_file() and (p.suffix == ".safetensors" or "params" in p.parts)
    )
    for file in files:
        size, window = file.stat().st_size, 1 << 20
        digest.update(f"{file.relative_to(path)}:{size}".encode())
        with open(file, "rb") as stream:
            for start in sorted({0, max(size // 2 - window // 2, 0), max(size - window, 0)}):
                stream.seek(start)
                digest.update(stream.read(window))
    return digest.hexdigest()


def save_model(out: str, config: ModelConfig, params, *, dtype: str, tokenizer_from: str | None) -> None:
    """Writes a converted checkpoint: config.json as Hugging Face has it, tokenizer files, orbax params/.

    The folder is written aside and renamed when it is complete; raises UserError if `out` exists.
    """
    with new_folder(out) as aside:
        write_json(os.path.join(aside, "config.json"), hf.config_to_json(config, dtype))
        if tokenizer_from:
            hf.copy_tokenizer(tokenizer_from, aside)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(aside).absolute() / "params", params)


def read_run_config(workdir: str) -> Config:
    """The resolved config of a workdir."""
    values = read_json(os.path.join(workdir, "config.json"))
    values.pop("base_fingerprint", None)
    return from_dict(Config, values)


def write_run_config(workdir: str, config: Config) -> None:
    """Writes config.json: every field as the run uses it, and the fingerprint of the base weights."""
    base = fingerprint(config.init_from) if config.init_from else ""
    write_json(os.path.join(workdir, "config.json"), {**asdict(config), "base_fingerprint": base})


def check_base(workdir: str, config: Config) -> None:
    """Raises UserError if the base weights of a run are no longer those it was started from."""
    saved = read_json(os.path.join(workdir, "config.json")).get("base_fingerprint", "")
    if not config.init_from:
        return
    if not Path(config.init_from).is_dir():
        raise UserError(f"{workdir} continues {config.init_from}, which is gone: put the base model back there")
    if fingerprint(config.init_from) != saved:
        raise UserError(
            f"the weights in {config.init_from} changed since {workdir} was started from them: "
            "restore them, or start again with a new workdir"
        )


def is_workdir(path: str) -> bool:
    """Whether a folder is the workdir of a training run."""
    return (Path(path) / "checkpoints").is_dir() and (Path(path) / "config.json").is_file()


def load_model(path: str) -> LoadedModel:
    """Loads a Hugging Face folder, a converted checkpoint or the newest checkpoint of a workdir."""
    if not Path(path).is_dir():
        raise UserError(
            f"there is no model folder {path}: give a Hugging Face folder, a converted checkpoint or a workdir"
        )
    if is_workdir(path):
        return _load_workdir(path)
    if not (Path(path) / "params").is_dir():
        config, params = hf.load_hf(path)
        return LoadedModel(config, params, None, path)
    config = hf.load_config(path)
    return LoadedModel(config, _restore(Path(path) / "params", abstract_params(Llama(config))), None, path)


def _load_workdir(path: str) -> LoadedModel:
    config = read_run_config(path)
    assert config.model is not None  # a run is saved resolved
    checkpoints = Path(path).absolute() / "checkpoints"
    with ocp.CheckpointManager(checkpoints, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
    if step is None:
        raise UserError(f"{path} has no complete checkpoint yet: train it further, or name another folder")
    lora = config.lora if config.mode != "full" else None
    shapes = abstract_params(Llama(config.model, lora=lora))
    trained, _ = partition(shapes, trainable_mask(shapes, config.mode))
    trained = _restore(checkpoints / str(step) / "state", {"trainable": trained})["trainable"]
    tokenizer_dir = config.data.tokenizer or config.init_from
    if config.mode == "full":
        return LoadedModel(config.model, trained, None, tokenizer_dir)
    check_base(path, config)
    base = load_model(config.init_from).merged()
    frozen = partition({**base}, _absent_from(trained, base))[0]
    return LoadedModel(config.model, combine(trained, frozen), lora, tokenizer_dir)


def _absent_from(trained, base):
    """A mask over base: True where trained has no leaf of that name."""
    return {
        name: _absent_from(trained.get(name, {}), child) if isinstance(child, dict) else name not in trained
        for name, child in base.items()
    }


def _restore(path: Path, shapes):
    """The arrays of an orbax folder, as much of it as `shapes` names, in the dtype that each is stored in."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        args = ocp.args.PyTreeRestore(item=shapes, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(path.absolute(), args=args)
