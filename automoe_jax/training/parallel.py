"""The one place where steps are mapped over devices: `jax.pmap` with axis "data".

`pmap` is JAX's own SPMD engine; over the processes of a pod it spans all their devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.jax_utils
import jax
from jax.sharding import Mesh, PartitionSpec

from automoe_jax.data.batches import Share
from automoe_jax.training import sharding
from automoe_jax.training.sharding import AXIS, Layout
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


def replicate(tree: Any) -> Any:
    """One copy on each local device."""
    return jax.tree.map(lambda x: flax.jax_utils.replicate(x, axis_name=AXIS), tree)


def place(state: TrainState, layout: Layout) -> TrainState:
    """A state on the local devices, as `sharding.place`; consumed."""
    return sharding.place(layout, state, share())


def taken(state: TrainState, like: TrainState, layout: Layout) -> TrainState:
    """One whole copy of a state that `place` made, as NumPy arrays; `like` has its shapes."""
    return sharding.collected(layout, state, like, share())


def taken_params(params: Any, like: Any, layout: Layout) -> Any:
    """As `taken`, of weights alone."""
    return sharding.collected(layout, params, like, share())


def map_gathering(layout: Layout, like: Any) -> Callable[[Any], Any]:
    """The function that makes placed weights, of the shapes `like`, whole on each device.

    But for spread experts.
    """
    if not layout.cut:
        return lambda params: params
    whole = functools.partial(sharding.gathered, layout, params=like)
    return jax.pmap(whole, axis_name=AXIS)
