"""How the state of a training lies on the devices: whole on each, or a part on each.

The state can be cut: each device keeps and updates a part of moments and weights (ZeRO stage 1,
Rajbhandari et al. 2020, arXiv 1910.02054), and a step begins by gathering the weights. (Gathered at
its end, the weights would be its output, into which a TPU copies what was gathered.) An array is
cut along its first axis that the number of devices divides; a small one, or one without such an
axis, stays whole on each device. Moments, weights and gradients have the same shapes, so they are
cut alike.

The experts of a supernet can be spread (expert parallelism, see `ops.spread_experts`): weights,
gradients and moments of an expert are on one device of each group alone.

Checkpoints hold whole arrays.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from automoe_jax.data.batches import Share
from automoe_jax.model import stacked
from automoe_jax.ops import spread_experts
from automoe_jax.ops.spread_experts import AXIS
from automoe_jax.training.config import TrainingConfig

LEAST = 1 << 14  # values of an array that is cut; fewer are cheaper to keep than to send


class Layout(NamedTuple):
    """How a state lies on the devices."""

    cut: bool = False  # the state is
    spread: int = 1  # devices that the experts of a layer are spread over

    @property
    def copied(self) -> bool:
        """True if each device has all."""
        return not self.cut and self.spread == 1

    def cut_axis(self, shape: tuple[int, ...], n_devices: int) -> int | None:
        """The axis along which an array is cut; None for one that stays whole."""
        if not self.cut or n_devices == 1 or math.prod(shape) < LEAST:
            return None
        return next((i for i, size in enumerate(shape) if size % n_devices == 0), None)


def layout_of(config: TrainingConfig) -> Layout:
    """The layout that a training's config asks for."""
    return Layout(config.shard_optimizer, config.expert_parallel)


def _map(layout: Layout, of_expert: Callable, of_other: Callable, tree: Any, *trees: Any) -> Any:
    """`of_expert` of the arrays of spread experts, `of_other` of all others."""

    def one(path: Any, *arrays: Any) -> Any:
        names = [entry.key for entry in path if hasattr(entry, "key")]
        is_expert = layout.spread > 1 and names[-2:-1] == ["experts"] and names[-1] in stacked.FLAT
        return (of_expert if is_expert else of_other)(*arrays)

    return jax.tree_util.tree_map_with_path(one, tree, *trees)


# --- in a step, under axis `AXIS` --------------------------------------------------------------


def summed(layout: Layout, gradient: Any) -> Any:
    """The sum over all devices; of what is cut, the device's parts."""
    n = lax.axis_size(AXIS)

    def of_other(x: jax.Array) -> jax.Array:
        axis = layout.cut_axis(x.shape, n)
        if axis is None:
            return lax.psum(x, AXIS)
        return lax.psum_scatter(x, AXIS, scatter_dimension=axis, tiled=True)

    def of_expert(x: jax.Array) -> jax.Array:
        if n == layout.spread:  # the group's rows are all rows
            return x
        return lax.psum(x, AXIS, axis_index_groups=spread_experts.same_place(layout.spread))

    return _map(layout, of_expert, of_other, gradient)


def gathered(layout: Layout, parts: Any, params: Any) -> Any:
    """The weights that a step runs, from the parts of all devices; `params` have their shapes.

    Of experts that are spread, those of the device.
    """
    n = lax.axis_size(AXIS)

    def of_other(part: jax.Array, x: jax.Array) -> jax.Array:
        axis = layout.cut_axis(x.shape, n)
        return part if axis is None else lax.all_gather(part, AXIS, axis=axis, tiled=True)

    return _map(layout, lambda part, x: part, of_other, parts, params)


def sum_of_squares(layout: Layout, gradient: Any, params: Any) -> jax.Array:
    """Of all values of a gradient, [], from what each device has; `params` have whole shapes."""
    n = lax.axis_size(AXIS)

    def of_other(part: jax.Array, x: jax.Array) -> jax.Array:
        """On each device the share that is its own to add."""
        whole = layout.cut_axis(x.shape, n) is None
        return jnp.sum(jnp.square(part)) / (n if whole else 1)

    def of_expert(part: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(part)) * (layout.spread / n)

    sums = _map(layout, of_expert, of_other, gradient, params)
    return lax.psum(sum(jax.tree.leaves(sums)), AXIS)


# --- outside of it -----------------------------------------------------------------------------


def part_shapes(layout: Layout, tree: Any, n_devices: int) -> Any:
    """Shapes and dtypes of a device's parts of a tree of whole arrays."""

    def shaped(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def of_other(x: Any) -> jax.ShapeDtypeStruct:
        axis = layout.cut_axis(x.shape, n_devices)
        parts = (size // (n_devices if i == axis else 1) for i, size in enumerate(x.shape))
        return shaped(x, tuple(parts))

    def of_expert(x: Any) -> jax.ShapeDtypeStruct:
        return shaped(x, (x.shape[0] // layout.spread, *x.shape[1:]))

    return _map(layout, of_expert, of_other, tree)


def place(layout: Layout, tree: Any, share: Share) -> Any:
    """Each local device's parts of a tree of whole arrays, with a leading device axis.

    Deletes each array of the tree as soon as it is placed: the whole state of a large optimizer
    does not fit one device beside its part. Arrays have the axis name of the steps: with another, a
    step's second call, on its own output, would compile again.
    """
    placed = flax.jax_utils.replicate(jnp.zeros(()), axis_name=AXIS).sharding
    devices = range(share.first_device, share.first_device + share.n_local_devices)

    def done(x: Any, copy: Any) -> Any:
        if isinstance(x, jax.Array):
            jax.block_until_ready(copy)
            x.delete()
        return copy

    def of_each(x: Any, parts: Sequence[np.ndarray]) -> Any:
        return done(x, jax.device_put(np.stack(parts), placed))

    def one(x: Any) -> Any:
        if stacked.has_experts(x):
            return of_experts(x)
        axis = layout.cut_axis(x.shape, share.n_devices)
        if axis is None:
            return done(x, flax.jax_utils.replicate(x, axis_name=AXIS))
        parts = np.split(np.asarray(x), share.n_devices, axis)
        return of_each(x, [parts[device] for device in devices])

    def of_experts(whole: dict[str, Any]) -> dict[str, Any]:
        n = layout.spread
        if n == 1:
            return {name: one(x) for name, x in whole.items()}
        arrays = {name: np.asarray(whole[name]) for name in stacked.FLAT}
        parts = [stacked.part(arrays, device % n, n) for device in devices]
        return {
            name: of_each(x, [part[name] for part in parts]) if name in arrays else one(x)
            for name, x in whole.items()
        }

    return jax.tree.map(one, tree, is_leaf=stacked.has_experts)


def collected(layout: Layout, tree: Any, like: Any, share: Share) -> Any:
    """The whole arrays, as NumPy, of what `place` made; `like` has their shapes.

    All processes of a pod must call it.
    """

    def one(x: Any, whole: Any) -> Any:
        if stacked.has_experts(x):
            return of_experts(x, whole)
        axis = layout.cut_axis(whole.shape, share.n_devices)
        if axis is None:
            return np.asarray(x.addressable_data(0))[0]
        part = np.concatenate(_local(x), axis)
        if share.n_local_devices == share.n_devices:
            return part
        return np.concatenate(list(multihost_utils.process_allgather(part)), axis)

    def of_experts(parts: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
        n = layout.spread
        if n == 1:
            return {name: one(x, whole[name]) for name, x in parts.items()}
        others = {name: one(x, whole[name]) for name, x in parts.items() if name not in names}
        if share.n_local_devices < n:
            total = whole["fc2_bias"].shape[0]
            return {**others, **{name: _gathered(parts[name], n, total) for name in names}}
        local = {name: _local(parts[name]) for name in names}
        at = {(share.first_device + i) % n: i for i in range(share.n_local_devices)}
        each = [{name: local[name][at[place]] for name in names} for place in range(n)]
        return {**others, **stacked.joined_parts(each)}

    names = stacked.FLAT
    return jax.tree.map(one, tree, like, is_leaf=stacked.has_experts)


def _local(x: jax.Array) -> list[np.ndarray]:
    """The parts of the devices of this process, in order."""
    local = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data)[0] for shard in local]


def _gathered(x: jax.Array, n: int, total: int) -> np.ndarray:
    """The rows of all `total` experts, of groups of n devices in several processes.

    Expert by expert: a device has no room for all of its group.
    """
    n_own, (_, rows, *rest) = total // n, x.shape
    slot = rows // n_own
    found = np.empty((n_own, n, slot, *rest), x.dtype)
    for i in range(n_own):
        found[i] = np.asarray(_slice_of_group(x, i * slot, slot, n).addressable_data(0))[0]
    return found.reshape(n * rows, *rest)


@functools.partial(jax.pmap, axis_name=AXIS, in_axes=(0, None), static_broadcasted_argnums=(2, 3))
def _slice_of_group(x: jax.Array, start: jax.Array, size: int, n: int) -> jax.Array:
    """Rows from `start` on of each device of the group: (n, size, ...)."""
    own = lax.dynamic_slice_in_dim(x, start, size)
    return lax.all_gather(own, AXIS, axis_index_groups=spread_experts.groups(n))
