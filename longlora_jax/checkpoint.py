"""Checkpoints by orbax: a training run's state, and converted models; and one way to load any of them.

A run saves what it changed (trainables, optimizer, step, data position). Its frozen base is named, not copied:
by path and by a fingerprint of the files there, which is checked when the run is resumed or exported.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from longlora_jax import hf
from longlora_jax.config import Config, LoraConfig, ModelConfig, from_dict
from longlora_jax.errors import UserError
from longlora_jax.lora import merge_lora
from longlora_jax.trainable import combine


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
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)

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
    target = Path(out).absolute()
    if target.exists():
        raise UserError(f"{out} exists: choose a new folder or remove it")
    aside = target.with_name(target.name + ".incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    (aside / "config.json").write_text(json.dumps(hf.config_to_json(config, dtype), indent=2) + "\n")
    if tokenizer_from:
        hf.copy_tokenizer(tokenizer_from, str(aside))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(aside / "params", params)
    os.replace(aside, target)


def read_run_config(workdir: str) -> Config:
    """The resolved config of a workdir."""
    values = json.loads((Path(workdir) / "config.json").read_text())
    values.pop("base_fingerprint", None)
    return from_dict(Config, values)


def write_run_config(workdir: str, config: Config) -> None:
    """Writes config.json: every field as the run uses it, and the fingerprint of the base weights."""
    base = fingerprint(config.init_from) if config.init_from else ""
    aside = Path(workdir) / "config.json.incomplete"
    aside.write_text(json.dumps({**asdict(config), "base_fingerprint": base}, indent=2) + "\n")
    os.replace(aside, Path(workdir) / "config.json")


def check_base(workdir: str, config: Config) -> None:
    """Raises UserError if the base weights of a run are no longer those it was started from."""
    saved = json.loads((Path(workdir) / "config.json").read_text()).get("base_fingerprint", "")
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
    """Loads a Hugging Face folder, a converted checkpoint or the newest checkpoint of a workdir, as numpy arrays."""
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
    with ocp.PyTreeCheckpointer() as checkpointer:
        params = checkpointer.restore(Path(path).absolute() / "params", restore_args=_as_numpy(path))
    return LoadedModel(config, params, None, path)


def _as_numpy(path: str):
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(Path(path).absolute() / "params").item_metadata.tree
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=None), metadata)


def _load_workdir(path: str) -> LoadedModel:
    config = read_run_config(path)
    checkpoints = Path(path).absolute() / "checkpoints"
    with ocp.CheckpointManager(checkpoints, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{path} has no complete checkpoint yet: train it further, or name another folder")
    with ocp.PyTreeCheckpointer() as checkpointer:
        state_dir = checkpoints / str(step) / "state"
        metadata = checkpointer.metadata(state_dir).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=None), {"trainable": metadata["trainable"]})
        trainable = checkpointer.restore(
            state_dir,
            item={"trainable": metadata["trainable"]},
            restore_args=restore_args,
            transforms={},
        )["trainable"]
    tokenizer_dir = config.data.tokenizer or config.init_from
    lora = config.lora if config.mode != "full" else None
    if config.mode == "full":
        return LoadedModel(config.model, trainable, None, tokenizer_dir)
    check_base(path, config)
    base = load_model(config.init_from)
    return LoadedModel(config.model, _overlay(base.merged(), trainable), lora, tokenizer_dir)


def _overlay(base: dict, trained: dict) -> dict:
    """base with the trained leaves in place of its own, and with the adapters beside them."""

    def without(node, other):
        return {
            name: without(child, other[name]) if isinstance(child, dict) and name in other else child
            for name, child in node.items()
            if name not in other or isinstance(child, dict)
        }

    return combine(trained, without(base, trained))
