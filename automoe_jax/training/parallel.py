"""The one place where steps are mapped over devices: `jax.pmap` with axis "data".

`pmap` is JAX's own SPMD engine; over the processes of a pod it spans all their devices.
"""

from collections.abc import Callable
from typing import Any

import flax.jax_utils
import jax
import numpy as np

from automoe_jax.data.batches import Share
from automoe_jax.training.step import AXIS


def share() -> Share:
    """This process's devices among all."""
    return Share(
        first_device=jax.process_index() * jax.local_device_count(),
        n_local_devices=jax.local_device_count(),
        n_devices=jax.device_count(),
    )


def map_train_step(step: Callable) -> Callable:
    """(state, batch, choices, key), all but the key with a leading device axis.

    The state's buffers are given up to the new state.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, 0, None), donate_argnums=(0,))


def map_eval_step(step: Callable) -> Callable:
    """(params, batch, choice): device axis on params and batch, one choice for all."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, None))


def map_population_step(step: Callable) -> Callable:
    """(params, batch, choice), all with a device axis: each device has a subnet of its own."""
    return jax.pmap(step, in_axes=(0, 0, 0))


def replicate(tree: Any, consume: bool = False) -> Any:
    """One copy on each local device.

    With `consume` an array of the tree is given up as soon as it is copied, so that the state of a
    large model is not in memory twice.

    Under the axis name of the steps: with another one, a step's second call would see its own
    output as an argument of a new kind and compile again.
    """

    def one(x):
        copy = flax.jax_utils.replicate(x, axis_name=AXIS)
        if consume and isinstance(x, jax.Array):
            jax.block_until_ready(copy)
            x.delete()
        return copy

    return jax.tree.map(one, tree)


def one_copy(tree: Any) -> Any:
    """The first device's copy, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), tree)
