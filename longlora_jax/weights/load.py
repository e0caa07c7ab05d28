"""One way to open any model: a Hugging Face folder, a converted checkpoint, or a checkpoint of a run.

Tensors are read when they are asked for, adapters merged into them; orbax's reader is behind the last two.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.errors import JaxRuntimeError

from longlora_jax.config import Config, LoraConfig, ModelConfig
from longlora_jax.config_file import read_run_config
from longlora_jax.data.chat import ChatFormat, folder_format
from longlora_jax.errors import UserError
from longlora_jax.files import one_line
from longlora_jax.model.codes import Quantization
from longlora_jax.model.lora import merge_lora
from longlora_jax.model.trainable import combine
from longlora_jax.weights import checksums, hf, hub
from longlora_jax.weights.bnb import agreed
from longlora_jax.weights.config_faults import refuse
from longlora_jax.weights.converted import is_converted, open_converted, orbax_quiet
from longlora_jax.weights.rules import (
    ROWS_OF_TOKENS,
    adapters_of,
    build_params,
    cast_table,
    flatten,
    get_leaf,
    merge_table,
    params_table,
    set_leaf,
    table_faults,
    with_rows,
)
from longlora_jax.weights.tensors import DTYPES, Tensor
from longlora_jax.weights.workdir import check_base, checkpoint_steps, is_workdir, split_step, workdir_format

_FOLDERS = "a Hugging Face folder, a converted checkpoint or a workdir"


@dataclass
class LoadedModel:
    """A model from disk: its config, params (adapters still apart, if lora is given), its tokenizer's folder.

    quantization: how the kernels in params are packed.
    """

    config: ModelConfig
    params: Any
    lora: LoraConfig | None
    tokenizer_dir: str
    quantization: Quantization | None = None

    def merged(self):
        """The params with every adapter folded into its kernel."""
        return self.params if self.lora is None else merge_lora(self.params, self.lora)


@contextlib.contextmanager
def readable(refusal: Callable[[str], UserError]) -> Iterator[None]:
    """Around a reader of orbax: what it says of a damaged folder has many types, and raises refusal(fault) here."""
    try:
        yield
    except (UserError, JaxRuntimeError):  # a device without memory, a lost host
        raise
    except Exception as error:
        raise refusal(f"{type(error).__name__}: {one_line(str(error), 150)}") from error


def _damaged(folder: Path, fault: str) -> UserError:
    return UserError(f"{folder} is damaged ({fault}): remove it, and an earlier checkpoint is taken if there is one")


class OpenModel(NamedTuple):
    """A model on disk, not read yet: its config, its tensors with adapters merged, its tokenizer's folder.

    workdir, step: the run that it comes from and its checkpoint; "", None: it is in a folder of its own. quantization:
    how the blocks' matrices are to be kept on devices, None for plain ones.
    """

    config: ModelConfig
    table: dict[str, Tensor]
    tokenizer_dir: str
    workdir: str = ""
    quantization: Quantization | None = None
    step: int | None = None

    def chat_format(self) -> ChatFormat:
        """How it is asked and what ends its answers: what its run trained under, else what its folder says."""
        found = workdir_format(self.workdir) if self.workdir else folder_format(self.tokenizer_dir)
        if not found.end_ids and self.config.eos_token_id is not None:
            found = replace(found, end_ids=(self.config.eos_token_id,))
        return found


def open_model(
    path: str, dtype: str | None = None, *, check: bool = False, base: str | None = None, quantize: str = "none"
) -> OpenModel:
    """Opens a Hugging Face folder (or a name of the hub), a converted checkpoint, or a checkpoint of a run.

    That is a workdir's newest one, or the one of WORKDIR/checkpoints/STEP; base: where the run's base lies by now.

    Adapters are merged when a tensor is read: summed in float32 and rounded once, to dtype (a key of DTYPES).
    None leaves every tensor in the dtype that it has on disk; what a run trained takes its base's.
    check: compare the tensors of a converted checkpoint with their digests when they are read, and the files of a
    run's checkpoint with theirs now. quantize: nf4, int8 and so on keep the blocks' matrices so on devices, quantized
    when they are read from the dtype that they have on disk.
    """
    path, step = split_step(hub.local_folder(path, what=_FOLDERS))
    if base and not is_workdir(path):
        raise UserError(f"--base {base} is of a run, and {path} is no workdir of train.py: leave it out")
    if is_workdir(path):
        step = _newest_step(path) if step is None else step
        config, table, tokenizer_dir = _open_workdir(path, step, dtype, check, base)
    elif (Path(path) / "params").is_dir():
        (config, table), tokenizer_dir = _open_params(path, check), path
    else:
        (config, table), tokenizer_dir = hf.open_hf(path), path
    workdir = path if is_workdir(path) else ""
    if quantize != "none":
        return OpenModel(config, table, tokenizer_dir, workdir, agreed(config, table, quantize, path), step)
    if dtype:
        table = cast_table(table, lambda _: DTYPES[dtype])
    return OpenModel(config, table, tokenizer_dir, workdir, step=step)


def load_model(path: str) -> LoadedModel:
    """Loads whatever open_model opens into memory, the adapters of a workdir apart from their kernels."""
    path, step = split_step(hub.local_folder(path, what=_FOLDERS))
    if not is_workdir(path):
        config, table, tokenizer_dir = open_model(path)[:3]
        return LoadedModel(config, build_params(config, table), None, tokenizer_dir)
    config, model, trained = _open_run(path, step)
    base = _open_base(path, config)
    trained = jax.tree.map(np.asarray, trained)
    lora = config.lora if config.mode != "full" else None
    frozen = {}
    if lora:
        missing = {n: t for n, t in base.items() if n not in params_table(model, trained)}
        frozen = build_params(model, missing)
    return LoadedModel(model, combine(trained, frozen), lora, _tokenizer_of(config))


def open_adapters(workdir: str) -> tuple[Config, dict]:
    """The config of a run and what its newest checkpoint trained: adapters, and with them embedding and norms."""
    workdir, step = split_step(workdir)
    if not is_workdir(workdir):
        raise UserError(f"{workdir} is not a workdir of train.py: only there are adapters apart from their model")
    config, _, trained = _open_run(workdir, step)
    if config.mode == "full":
        raise UserError(f"{workdir} trained every weight (mode=full), there is no adapter: use to-hf")
    return config, trained


def check_adapter_base(workdir: str, config: Config, base: str | None = None) -> None:
    """Raises UserError if a run's adapter would not fit its base; config: as open_adapters gives it.

    base: a folder or a name of the hub to use in place of config.init_from. A Hugging Face folder in place of a
    converted checkpoint has other files: its shapes must fit. What a name of the hub stands for is not looked up.
    """
    workdir, _ = split_step(workdir)
    if base and not Path(base).is_dir():
        if Path(base).exists() or not hub.is_name(base):
            raise UserError(f"--base {base} is not a folder: give that of the run's base, or its name on the hub")
    elif base and is_converted(config.init_from):
        check_base(workdir, config)
        assert config.model is not None  # a run is saved resolved
        refuse(base, list(table_faults(config.model, with_rows(config.model, hf.open_hf(base)[1]))))
    else:
        check_base(workdir, replace(config, init_from=base or config.init_from))


def with_new_rows(
    workdir: str, config: Config, trained: dict, base: str | None = None
) -> tuple[dict[str, Any], int | None]:
    """What a run trained, and embedding and lm_head whole where its model has more rows than its base; and the base's.

    config, trained: as open_adapters gives them. Rows that were not trained are the mean of the base's, as in the run.
    base: where the run's base lies if it is not in its place. The second is None where the base has as many rows.
    """
    workdir, _ = split_step(workdir)
    model = config.model
    assert model is not None  # a run is saved resolved
    if not config.new_tokens or not config.init_from:
        return trained, None
    if base and not Path(config.init_from).is_dir():
        config = replace(config, init_from=hub.local_folder(base))
    check_base(workdir, config)
    rows = hf.load_config(config.init_from).vocab_size
    if rows >= model.vocab_size:
        return trained, None
    whole = {name: t for name, t in _open_base(workdir, config).items() if name in ROWS_OF_TOKENS}
    missing = {name: t for name, t in whole.items() if name not in params_table(model, trained)}
    return combine(trained, build_params(model, missing)), rows


def _open_params(path: str, check: bool) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A converted checkpoint, or a param tree that orbax saved in another form of its own beside a config.json."""
    if is_converted(path):
        return open_converted(path, check=check)
    config = hf.load_config(path)
    table = params_table(config, _saved_tree(Path(path) / "params"))
    refuse(path, list(table_faults(config, table)))
    return config, table


def _open_workdir(
    path: str, step: int | None, dtype: str | None, check: bool, moved: str | None
) -> tuple[ModelConfig, dict[str, Tensor], str]:
    config, model, trained = _open_run(path, step, check)
    if moved:
        there = hub.local_folder(moved)
        tokenizer = there if config.data.tokenizer == config.init_from else config.data.tokenizer
        config = replace(config, init_from=there, data=replace(config.data, tokenizer=tokenizer))
    base = _open_base(path, config, check)
    table = dict(base) | params_table(model, trained)
    if config.mode != "full":
        table = merge_table(table, adapters_of(model, trained, config.lora.scale))
    kinds: dict[str, Any] = {n: DTYPES[dtype] if dtype else base.get(n, t).dtype for n, t in table.items()}
    return model, cast_table(table, kinds.__getitem__), _tokenizer_of(config)


def _open_run(path: str, step: int | None, check: bool = False) -> tuple[Config, ModelConfig, dict]:
    """(config, model, what was trained) of a run's checkpoint, the newest for None; nothing read yet."""
    config = read_run_config(path)
    assert config.model is not None  # a run is saved resolved
    checkpoints = Path(path).absolute() / "checkpoints"
    step = _newest_step(path) if step is None else step
    if check and (faults := checksums.verify(checkpoints / str(step))):
        raise _damaged(checkpoints / str(step), faults[0])
    return config, config.model, _saved_tree(checkpoints / str(step) / "state", "trainable")


def _newest_step(workdir: str) -> int:
    if not (steps := checkpoint_steps(workdir)):
        raise UserError(f"{workdir} has no complete checkpoint yet: train it further, or name another folder")
    return steps[-1]


def _open_base(workdir: str, config: Config, check: bool = False) -> dict[str, Tensor]:
    """The tensors of a run's base; none where every weight was trained."""
    if config.mode == "full":
        return {}
    check_base(workdir, config)
    assert config.model is not None  # a run is saved resolved
    return with_rows(config.model, open_model(config.init_from, check=check).table)


def _tokenizer_of(config: Config) -> str:
    return config.data.tokenizer or config.init_from


class _SavedLeaf:
    """An array of an orbax folder, read when it is asked for; the last one read stays, its layers come in a row."""

    _last: tuple[Any, Any] = (None, None)

    def __init__(self, folder: Path, path: tuple[str, ...], metadata):
        self._folder, self._path = folder, path
        self.shape, self.dtype = metadata.shape, np.dtype(metadata.dtype)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        key, array = _SavedLeaf._last
        if key != (self._folder, self._path):
            array = self._read()
            _SavedLeaf._last = ((self._folder, self._path), array)
        return array if dtype is None else array.astype(dtype)

    def __getitem__(self, index) -> np.ndarray:
        return np.asarray(self)[index]

    def _read(self) -> np.ndarray:
        item: dict[str, Any] = {}
        restore: dict[str, Any] = {}
        set_leaf(item, self._path, jax.ShapeDtypeStruct(self.shape, self.dtype))
        set_leaf(restore, self._path, ocp.RestoreArgs(restore_type=np.ndarray))
        refusal = functools.partial(_damaged, self._folder.parent)
        with readable(refusal), orbax_quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
            return get_leaf(checkpointer.restore(self._folder, args=args), self._path)


def _saved_tree(folder: Path, *prefix: str) -> dict:
    """The tree that orbax saved in a folder, or the part of it under a prefix; leaves are read when asked for."""
    folder = folder.absolute()
    refusal = functools.partial(_damaged, folder.parent)
    with readable(refusal), orbax_quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata.tree
    tree: dict[str, Any] = {}
    for path, leaf in flatten(get_leaf(metadata, prefix)):
        set_leaf(tree, path, _SavedLeaf(folder, (*prefix, *path), leaf))
    return tree
