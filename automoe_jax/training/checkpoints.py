"""Orbax checkpoints of a run: one unreplicated copy per step, written asynchronously.

Each is sealed by the hashes of its files. One that is torn or changed is put aside, and the one
before it is used.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.step import TrainState
from automoe_jax.training.target import TrainingTarget, abstract_state

CHECKPOINTS = "checkpoints"  # folder of a run
BEST = "best_checkpoint"  # folder of a run: the weights with the lowest validation loss so far
DAMAGED = "damaged_checkpoints"  # folder of a run, for those that could not be read
_ITEMS = _PARAMS, _OPTIMIZER, _AVERAGE, _LOG = "params", "optimizer", "average", "log"
_SEAL = "sha256.json"  # in a checkpoint: hashes of the files of its items

Note = Callable[[str], None]  # takes a line for the user


class Restored(NamedTuple):
    """The content of a checkpoint, as NumPy arrays."""

    step: int
    params: Any
    opt_state: Any | None  # None in converted weights
    average: Any  # moving average of the weights; () if none was asked for or there is none
    log: dict[str, Any]  # as `save` was given; {} in checkpoints of earlier versions


class Checkpoints:
    """The checkpoints in a folder; to be closed."""

    def __init__(self, folder: Path, keep: int = 2, every: int = 1, *, read_only: bool = False):
        """Keeps the newest checkpoint, and the newest `keep` of steps that `every` divides.

        So one of a run that was stopped in between takes no other's place.
        """
        self._folder, self._read_only = folder, read_only
        self._saving: int | None = None  # step
        kept = [policies.LatestN(1), policies.EveryNSteps(every, max_to_keep=keep)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else policies.AnyPreservationPolicy(kept),
            create=not read_only, read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were killed
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(folder, item_names=_ITEMS, options=options)

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def is_whole(self, step: int) -> bool:
        """True if a checkpoint is what was sealed."""
        try:
            _check_seal(self._folder / str(step))
        except (ValueError, UserError):
            return False
        return True

    def log(self, step: int) -> dict[str, Any]:
        """What `save` was given for the training loop; {} in checkpoints of earlier versions."""
        if not (self._folder / str(step) / _LOG).exists():
            return {}
        args = ocp.args.Composite(**{_LOG: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=args)[_LOG]

    def save(self, state: TrainState, log: dict[str, Any]):
        """Starts writing a state of NumPy arrays and returns; `wait` waits for it.

        A step that is there already stays.

        `log` is a JSON object, for the training loop. `UserError` if the disk has no room.
        """
        step = int(state.step)
        if step != self.latest():
            trees = {_PARAMS: state.params, _OPTIMIZER: state.opt_state}
            if jax.tree.leaves(state.average):
                trees[_AVERAGE] = state.average
            self._save(step, trees, {_LOG: ocp.args.JsonSave(log)})

    def save_params(self, params: Any, step: int):
        """Writes parameters without optimizer state, and waits; a step that is there stays."""
        if step != self.latest():
            self._save(step, {_PARAMS: params}, {})
            self.wait()

    def _check_space(self, arrays: Any):
        """Raises `UserError` if the disk has no room for them, before anything is written."""
        if jax.process_index() > 0:  # writes nothing
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(
                f"{self._folder} has {free / 1e6:,.0f} MB of disk left, and a checkpoint takes up "
                f"to {needed / 1e6:,.0f} MB; earlier ones are good: free some space, and the same "
                "command goes on"
            )

    def _save(self, step: int, trees: dict[str, Any], others: dict[str, Any]):
        """Starts to write trees of arrays, and other items as Orbax takes them."""
        self.wait()  # the one before takes room, and may not be sealed yet
        self._check_space(trees)
        self._saving = step
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, **others))

    def _seal(self):
        """Seals what was just written: Orbax calls this before it renames the folder."""
        if jax.process_index() == 0:
            temporary = self._folder.glob(f"{self._saving}.*")
            folder = max(temporary, key=lambda path: path.stat().st_mtime)
            files.write_json(folder / _SEAL, {"version": 1, "files": _hashes(folder)})

    def restore(self, abstract: TrainState, note: Note) -> Restored | None:
        """The newest checkpoint that can be read, as `readable` gives it; None without one."""
        return next(self.readable(abstract, note), None)

    def readable(self, abstract: TrainState, note: Note) -> Iterator[Restored]:
        """The checkpoints that can be read, newest first, in the structure of `abstract`.

        Tells `note` of newer ones that cannot, and moves them to `DAMAGED`, out of the way of the
        ones to come. `UserError` if there are some and none can be read.
        """
        damaged: dict[int, str] = {}
        any_read = False
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(abstract, step)
            except Exception as e:  # Orbax passes on errors of its parts, such as bare JSON errors
                damaged[step] = " ".join(str(e).split())[:200] or type(e).__name__
                continue
            for other, reason in damaged.items():
                moved = self._put_aside(other)
                note(
                    f"warning: checkpoint {self._folder / str(other)} is damaged ({reason}); "
                    f"step {step:,} is used instead{moved}"
                )
            damaged, any_read = {}, True
            yield restored
        if damaged and not any_read:
            raise UserError(
                f"no checkpoint in {self._folder} can be read ({max(damaged)}: "
                f"{damaged[max(damaged)]}); remove the folder to begin again"
            )

    def _restore(self, abstract: TrainState, step: int) -> Restored:
        folder = self._folder / str(step)
        _check_seal(folder)
        targets = {_PARAMS: abstract.params}
        if abstract.opt_state is not None and (folder / _OPTIMIZER).exists():
            targets[_OPTIMIZER] = abstract.opt_state
        if jax.tree.leaves(abstract.average) and (folder / _AVERAGE).exists():
            targets[_AVERAGE] = abstract.average
        # As NumPy arrays: whoever reads a checkpoint may have other devices.
        arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), targets)
        args: dict[str, Any] = {name: ocp.args.StandardRestore(x) for name, x in arrays.items()}
        found: Any = self._manager.restore(step, args=ocp.args.Composite(**args))
        opt_state = found[_OPTIMIZER] if _OPTIMIZER in args else None
        average = found[_AVERAGE] if _AVERAGE in args else ()
        return Restored(step, found[_PARAMS], opt_state, average, self.log(step))

    def _put_aside(self, step: int) -> str:
        """Moves a damaged checkpoint; says where it is."""
        if self._read_only or jax.process_index() != 0:
            return ""
        folder = self._folder.with_name(DAMAGED)
        folder.mkdir(exist_ok=True)
        to = next(path for n in itertools.count() if not (path := folder / f"{step}_{n}").exists())
        os.rename(self._folder / str(step), to)
        self._manager.reload()
        return f", and it is moved to {to}"

    def preempted(self, step: int) -> bool:
        """True if the processes of a pod are to save this step and end, all of them alike."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self):
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint's items, by its path in the checkpoint."""
    paths = [path for item in _ITEMS for path in sorted((folder / item).rglob("*"))]
    paths = [path for path in paths if path.is_file()]

    def one(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        names = (str(path.relative_to(folder)) for path in paths)
        return dict(zip(names, pool.map(one, paths), strict=True))


def _check_seal(folder: Path):
    """Raises `ValueError` if a checkpoint is not what was sealed; earlier versions sealed none."""
    if not (folder / _SEAL).exists():
        return
    sealed = files.read_json(folder / _SEAL, "seal")["files"]
    found = _hashes(folder)
    for name in sorted(sealed.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if sealed.get(name) != found[name]:
            raise ValueError(f"{name} is not what was saved")


@contextlib.contextmanager
def reader(folder: Path, name: str = CHECKPOINTS) -> Iterator[Checkpoints | None]:
    """The checkpoints of a run's folder, to read; None if it has no folder of them."""
    if not (folder / name).is_dir():
        yield None
        return
    with contextlib.closing(Checkpoints(folder / name, read_only=True)) as checkpoints:
        yield checkpoints


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint of a run's folder, or None."""
    with reader(folder) as checkpoints:
        return checkpoints and checkpoints.latest()


def load_params(
    target: TrainingTarget, config: TrainingConfig, folder: Path, note: Note
) -> tuple[Any, int]:
    """The final weights in a run's folder, as NumPy arrays, and their step.

    `TrainingConfig.final_weights` says which; an average has the step of its newest, and leaves out
    what a stop saved between two checkpoints of the plan. A folder of converted weights has these
    alone. `note` is told of checkpoints that cannot be read. Raises `UserError` if there is none
    that can, or no such weights.
    """
    abstract = abstract_state(target, config, 0)._replace(opt_state=None)
    kind = config.final_weights
    if kind != "ema":
        abstract = abstract._replace(average=())
    if kind == "best":
        with reader(folder, BEST) as best:
            found = best and best.restore(abstract, note)
        if found is not None:
            return found.params, found.step
    with reader(folder) as checkpoints:
        readable = iter(()) if checkpoints is None else checkpoints.readable(abstract, note)
        newest = next(readable, None)
        if newest is None:
            raise UserError(f"{folder} has no checkpoint; train it first (launch/train.py)")
        if newest.step == 0:  # converted
            return newest.params, 0
        if kind == "average":
            return _average(newest, readable, config, folder, note), newest.step
    if kind == "best":
        raise UserError(
            f"{folder} has no {BEST}, as nothing was evaluated yet or by an earlier version; use "
            "another final_weights"
        )
    if kind == "ema" and newest.average == ():
        raise UserError(
            f"{folder} has no moving average of its weights, as it was trained without ema_decay; "
            "use another final_weights"
        )
    return newest.average if kind == "ema" else newest.params, newest.step


def final_step(folder: Path, config: TrainingConfig) -> int | None:
    """The step of what `load_params` gives, if its newest can be read; None if there is none."""
    if config.final_weights == "best":
        with reader(folder, BEST) as best:
            step = best and best.latest()
        if step is not None:
            return step
    return latest_step(folder)


def _average(
    newest: Restored, others: Iterator[Restored], config: TrainingConfig, folder: Path, note: Note
) -> Any:
    """The mean of the weights of the newest checkpoints of the plan, the last step among them."""
    planned = (own for own in others if own.step and own.step % config.checkpoint_every == 0)
    total, count = jax.tree.map(lambda x: x.astype(np.float64), newest.params), 1
    for own in itertools.islice(planned, config.averaged_checkpoints - 1):
        total, count = jax.tree.map(np.add, total, own.params), count + 1
    if count < config.averaged_checkpoints:
        note(f"{folder} has {count} checkpoints, not {config.averaged_checkpoints}: their mean")
    return jax.tree.map(lambda x, own: (x / count).astype(own.dtype), total, newest.params)


def drop_best_beyond(folder: Path, step: int):
    """Removes the best weights of a run's folder from steps that are yet to come.

    They are of another training, or of steps that a killed run will do again.
    """
    for path in (folder / BEST).glob("[0-9]*"):
        # Others are what is left of saves that were killed, which Orbax removes.
        if path.name.isdecimal() and (int(path.name) > step or step == 0):
            shutil.rmtree(path, ignore_errors=True)  # another process may be at it
