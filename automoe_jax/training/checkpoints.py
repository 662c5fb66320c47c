"""Orbax checkpoints of a run: one unreplicated copy, asynchronous, by step."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from automoe_jax.system.errors import UserError
from automoe_jax.training.step import TrainState

_ITEMS = ("params", "optimizer")


class Checkpoints:
    """The checkpoints in a folder (`checkpoints/` of a run)."""

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder, item_names=_ITEMS, options=options)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState):
        """Starts to save; returns before it is written. `state` holds NumPy arrays."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
            ),
        )

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of a step, as NumPy arrays.

        Args:
          abstract: shapes and dtypes, from `jax.eval_shape`.
          step: which.

        Raises:
          UserError: the checkpoint is torn, or of another model.
        """
        params, opt_state = (
            self._restore(name, tree, step)
            for name, tree in zip(_ITEMS, (abstract.params, abstract.opt_state), strict=True)
        )
        return TrainState(np.asarray(step, np.int32), params, opt_state)

    def has_optimizer(self, step: int) -> bool:
        """Whether a checkpoint can be gone on from as it is; converted weights come alone."""
        return (self._folder / str(step) / "optimizer").exists()

    def save_params(self, params: Any, step: int):
        """Saves parameters without an optimizer's state; returns when they are written."""
        self._manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        self.wait()

    def restore_params(self, abstract_params: Any, step: int) -> Any:
        """The parameters alone."""
        return self._restore("params", abstract_params, step)

    def _restore(self, name: str, abstract: Any, step: int) -> Any:
        # As NumPy: a checkpoint says nothing of the devices that will read it.
        target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        try:
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
            return self._manager.restore(step, args=args)[name]
        except Exception as e:  # Orbax raises whatever its parts raise: bare JSON errors among it
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"checkpoint {self._folder / str(step)} cannot be read ({reason}); remove that "
                "folder to go on from the checkpoint before it"
            ) from e

    def wait(self):
        """Until everything is written."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()
