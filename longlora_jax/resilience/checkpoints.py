"""The checkpoints of a run: saved while it goes on, complete or absent, and never read when they are damaged."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from longlora_jax.errors import UserError
from longlora_jax.files import one_line
from longlora_jax.weights import checksums
from longlora_jax.weights.load import readable
from longlora_jax.weights.workdir import checkpoint_steps

log = logging.getLogger("longlora_jax")

BEST = "best"  # beside the position in the data: Best, as a dict
_SAVE_SECONDS = 1200  # a save that takes longer has failed


@dataclass
class Best:
    """The lowest eval/loss of a run, the step that had it, and how many evaluations have come since.

    of: what stands for the data of these evaluations; "": there are none, or a version before had none.
    """

    step: int = 0
    loss: float = math.inf
    since: int = 0
    of: str = ""

    def update(self, step: int, loss: float) -> bool:
        """Takes in an evaluation; returns whether it is the best so far."""
        better = loss < self.loss  # never, for NaN
        self.step, self.loss, self.since = (step, loss, 0) if better else (self.step, self.loss, self.since + 1)
        return better


class RunCheckpoints:
    """The checkpoints/ of a workdir: saved asynchronously, complete or absent, the newest few kept.

    Each has the digests of its files, and is compared with them before it is read. Half of a save, left by a process
    that was killed, is removed here, unless read_only: then nothing in the folder is changed.
    best: of the evaluations so far, saved and restored with the state if its data are the same. keep_best: its step
    is kept as well.
    """

    def __init__(self, workdir: str, *, keep: int = 2, keep_best: bool = False, read_only: bool = False):
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._saving: int | None = None
        self.best = Best()
        if read_only:
            self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(read_only=True))
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder} cannot be made ({error.strerror}): choose another --workdir") from error
        kept = [policies.LatestN(keep), *([_Keep(self)] if keep_best else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            # orbax calls it in its own thread when all files are written, before it gives their folder its name.
            async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS, post_finalization_callback=self._checksum),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state, data_state: dict) -> None:
        """Saves a TrainState and the position in the data under the state's step, once the save before it is done.

        Raises UserError if that one or this one could not be written.
        """
        beside = data_state | ({BEST: dataclasses.asdict(self.best)} if self.best.step else {})
        args = ocp.args.Composite(state=ocp.args.StandardSave(_saved(state)), data=ocp.args.JsonSave(beside))
        with self._written():
            self._manager.wait_until_finished()
            self._saving = int(state.step)
            self._manager.save(self._saving, args=args)

    def restore(self, state) -> tuple[Any, dict]:
        """The newest (TrainState, data position), in the shapes, dtypes and shardings of the given state.

        Raises UserError if it is damaged, or of another model; the line says what to do to go on from the one before.
        """
        step = self.latest_step()
        assert step is not None  # the caller has asked
        folder = self._folder / str(step)
        if jax.process_index() == 0:  # the others are ended if it finds something
            if not checksums.has_checksums(folder):
                log.warning("%s has no digests: whether its files are as they were saved is not known", folder)
            if faults := checksums.verify(folder):
                raise self._damaged(step, faults)
        wanted = _saved(state)
        with readable(lambda fault: self._damaged(step, [fault])):
            if faults := list(_shape_faults(_shapes(folder / "state"), wanted)):
                raise self._damaged(step, faults)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=args)
            data_state = dict(restored["data"])
            best = Best(**data_state.pop(BEST, {}))
            if not self.best.of or best.of in ("", self.best.of):
                self.best = dataclasses.replace(best, of=self.best.of or best.of)
            else:
                log.info("the data of eval has changed: which step is best, and early_stop, begin anew")
            return state.replace(**restored["state"]), data_state

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Waits for the save under way. Raises UserError if it fails, unless there is an error already."""
        if error is None:
            with self._written():
                self._manager.wait_until_finished()
                self._manager.close()
        elif jax.process_count() == 1:  # where another process has failed, the save may wait for it in vain
            with contextlib.suppress(OSError, ValueError):
                self._manager.wait_until_finished()

    def _checksum(self) -> None:
        for unfinished in self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            checksums.write_checksums(unfinished, skip="_CHECKPOINT_METADATA")  # it gets the time of the end

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # the second is tensorstore's
            good = self._newest_good(before=self._saving)
            raise UserError(
                f"step {self._saving} could not be saved in {self._folder} ({one_line(str(error), 200)}): free some "
                f"space there, or see why it cannot be written; started again, the run {_goes_on(good)}"
            ) from error

    def _damaged(self, step: int, faults: list[str]) -> UserError:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        good = self._newest_good(before=step)
        return UserError(
            f"{self._folder / str(step)} is damaged or of another run ({'; '.join(faults[:3])}{more}): "
            f"remove this folder and start again, the run {_goes_on(good)}"
        )

    def _newest_good(self, before: int | None) -> int | None:
        """The newest checkpoint before a step whose files are as they were saved."""
        steps = reversed(checkpoint_steps(str(self._folder.parent)))
        earlier = (step for step in steps if before is None or step < before)
        return next((step for step in earlier if not checksums.verify(self._folder / str(step))), None)


@dataclass
class _Keep(policies.PreservationPolicy):
    """Keeps the best step of a run's checkpoints."""

    checkpoints: RunCheckpoints

    def should_preserve(self, checkpoints, *, context):
        del context
        return [info.step == self.checkpoints.best.step for info in checkpoints]


def _goes_on(step: int | None) -> str:
    return "starts from its beginning: there is no other checkpoint" if step is None else f"goes on from step {step}"


def _shape_faults(saved, wanted) -> Iterator[str]:
    """Where a saved tree is not like the wanted one, by name."""
    saved, wanted = _by_name(saved), _by_name(wanted)
    for name in dict.fromkeys((*saved, *wanted)):
        if name not in saved or name not in wanted:
            yield f"{name} is {'missing' if name in wanted else 'too much'}"
        elif tuple(saved[name].shape) != tuple(wanted[name].shape):
            yield f"{name} has shape {list(saved[name].shape)}, it must be {list(wanted[name].shape)}"


def _shapes(folder: Path):
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree


def _by_name(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _saved(state) -> dict:
    names = ("step", "skipped", "in_a_row", "trainable", "opt_state")
    return {name: getattr(state, name) for name in names}
