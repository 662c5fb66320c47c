"""The one place where steps are mapped over devices: `jax.pmap` with axis "data".

`pmap` is JAX's own SPMD engine; over the processes of a pod it spans all their devices.
"""

from collections.abc import Callable
from typing import Any

import flax.jax_utils
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from automoe_jax.data.batches import Share
from automoe_jax.training import sharding
from automoe_jax.training.sharding import AXIS
from automoe_jax.training.step import TrainState


def share() -> Share:
    """This process's devices among those of all processes."""
    n = jax.local_device_count()
    return Share(jax.process_index() * n, n_local_devices=n, n_devices=jax.device_count())


def map_train_step(step: Callable, *, taught: bool = False) -> Callable:
    """(state, batch, subnets, key), all but the key with a leading device axis.

    With `taught`, a teacher's weights are a fifth argument, with that axis. The state is donated:
    the new state takes its buffers.
    """
    axes = (0, 0, 0, None, *[0] * taught)
    return jax.pmap(step, axis_name=AXIS, in_axes=axes, donate_argnums=(0,))


def map_train_step_over(step: Callable, mesh: Mesh) -> Callable:
    """`map_train_step` over the devices of a mesh of axis "data", which need not be here.

    The same function on each device; `pmap` itself takes the devices that there are.
    """

    def one(state, batch, subnets, key):
        own = (jax.tree.map(lambda x: x[0], tree) for tree in (state, batch, subnets))
        return jax.tree.map(lambda x: x[None], step(*own, key))

    each, all_of_them = PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(
        one, mesh=mesh, in_specs=(each, each, each, all_of_them), out_specs=each, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=(0,))


def map_eval_step(step: Callable) -> Callable:
    """(params, batch, subnet): params and batch with a device axis, one subnet for all devices."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, None))


def map_population_step(step: Callable) -> Callable:
    """(params, batch, subnet), all with a device axis: each device runs its own subnet."""
    return jax.pmap(step, in_axes=(0, 0, 0))


def replicate(tree: Any, *, consume: bool = False) -> Any:
    """One copy on each local device.

    `consume` deletes each array of the tree as soon as it is copied, so that the state of a large
    model is not in memory twice. The copies have the axis name of the steps: with another one, a
    step's second call, on its own output, would compile again.
    """

    def one(x):
        copy = flax.jax_utils.replicate(x, axis_name=AXIS)
        if consume and isinstance(x, jax.Array):
            jax.block_until_ready(copy)
            x.delete()
        return copy

    return jax.tree.map(one, tree)


def place(state: TrainState, *, cut: bool) -> TrainState:
    """A state on each local device, consumed; with `cut` each has its part of the optimizer's."""
    if not cut:
        return replicate(state, consume=True)
    rest = replicate(state._replace(opt_state=()), consume=True)
    return rest._replace(opt_state=sharding.place(state.opt_state, share()))


def taken(state: TrainState, like: TrainState, *, cut: bool) -> TrainState:
    """One whole copy of a state that `place` made, as NumPy arrays; `like` has its shapes."""
    if not cut:
        return one_copy(state)
    whole = sharding.collected(state.opt_state, like.opt_state, share())
    return one_copy(state._replace(opt_state=()))._replace(opt_state=whole)


def one_copy(tree: Any) -> Any:
    """The first device's copy, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), tree)
