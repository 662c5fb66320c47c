"""Orbax checkpoints of a run: one unreplicated copy per step, written asynchronously."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from automoe_jax.system.errors import UserError
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.step import TrainState
from automoe_jax.training.target import TrainingTarget, abstract_state

CHECKPOINTS = "checkpoints"  # folder of a run


class Checkpoints:
    """The checkpoints in a folder; to be closed."""

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        items = ("params", "optimizer")
        self._manager = ocp.CheckpointManager(folder, item_names=items, options=options)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState):
        """Starts writing a state of NumPy arrays and returns; `wait` waits for it."""
        self._save(int(state.step), params=state.params, optimizer=state.opt_state)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of a step, as NumPy arrays in the structure of `abstract`.

        Raises `UserError` if the checkpoint is incomplete or of another model.
        """
        params = self.restore_params(abstract.params, step)
        opt_state = self._restore("optimizer", abstract.opt_state, step)
        return TrainState(np.asarray(step, np.int32), params, opt_state)

    def has_optimizer(self, step: int) -> bool:
        """True if the checkpoint has optimizer state (converted ones have only params)."""
        return (self._folder / str(step) / "optimizer").exists()

    def save_params(self, params: Any, step: int):
        """Writes parameters without optimizer state, and waits."""
        self._save(step, params=params)
        self.wait()

    def restore_params(self, abstract_params: Any, step: int) -> Any:
        """The parameters of a step."""
        return self._restore("params", abstract_params, step)

    def _save(self, step: int, **items: Any):
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**args))

    def _restore(self, name: str, abstract: Any, step: int) -> Any:
        # As NumPy arrays: whoever reads a checkpoint may have other devices.
        target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        try:
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
            return self._manager.restore(step, args=args)[name]
        except Exception as e:  # Orbax passes on errors of its parts, such as bare JSON errors
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"checkpoint {self._folder / str(step)} cannot be read ({reason}); remove that "
                "folder to go on from the checkpoint before it"
            ) from e

    def wait(self):
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint of a run's folder, or None."""
    if not (folder / CHECKPOINTS).is_dir():
        return None
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS)) as checkpoints:
        return checkpoints.latest()


def load_params(target: TrainingTarget, config: TrainingConfig, folder: Path) -> tuple[Any, int]:
    """The newest parameters in a run's folder, as NumPy arrays, and their step.

    Raises `UserError` if there is no checkpoint or it is incomplete.
    """
    step = latest_step(folder)
    if step is None:
        raise UserError(f"{folder} has no checkpoint; train it first (launch/train.py)")
    params = abstract_state(target, config, 0).params
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS)) as checkpoints:
        return checkpoints.restore_params(params, step), step
