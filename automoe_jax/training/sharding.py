"""The optimizer's state spread over the devices: each keeps and updates a part (ZeRO stage 1).

Rajbhandari et al. 2020 (arXiv 1910.02054). An array is cut along its first axis that the number of
devices divides; a small one, or one without such an axis, stays whole on each device. Moments,
weights and gradients have the same shapes, so they are cut alike. Checkpoints hold whole arrays.
"""

import math
from typing import Any

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from automoe_jax.data.batches import Share

AXIS = "data"  # of the devices
LEAST = 1 << 14  # values of an array that is cut; fewer are cheaper to keep than to send


def cut_axis(shape: tuple[int, ...], n_devices: int) -> int | None:
    """The axis along which an array is cut; None for one that stays whole."""
    if n_devices == 1 or math.prod(shape) < LEAST:
        return None
    return next((i for i, size in enumerate(shape) if size % n_devices == 0), None)


# --- in a step, under axis `AXIS` --------------------------------------------------------------


def summed(tree: Any) -> Any:
    """The device's parts of the sum of trees over all devices."""
    n = lax.axis_size(AXIS)

    def one(x: jax.Array) -> jax.Array:
        axis = cut_axis(x.shape, n)
        if axis is None:
            return lax.psum(x, AXIS)
        return lax.psum_scatter(x, AXIS, scatter_dimension=axis, tiled=True)

    return jax.tree.map(one, tree)


def own(tree: Any) -> Any:
    """The device's parts of a tree that all devices have."""
    n, nth = lax.axis_size(AXIS), lax.axis_index(AXIS)

    def one(x: jax.Array) -> jax.Array:
        axis = cut_axis(x.shape, n)
        if axis is None:
            return x
        size = x.shape[axis] // n
        return lax.dynamic_slice_in_dim(x, nth * size, size, axis)

    return jax.tree.map(one, tree)


def whole(parts: Any, like: Any) -> Any:
    """A tree with the shapes of `like`, from the parts of all devices."""
    n = lax.axis_size(AXIS)

    def one(part: jax.Array, x: jax.Array) -> jax.Array:
        axis = cut_axis(x.shape, n)
        return part if axis is None else lax.all_gather(part, AXIS, axis=axis, tiled=True)

    return jax.tree.map(one, parts, like)


def sum_of_squares(parts: Any, like: Any) -> jax.Array:
    """Of all values of a tree, [], from the parts of all devices; `like` has its whole shapes."""
    n = lax.axis_size(AXIS)
    sums = {True: jnp.float32(0), False: jnp.float32(0)}
    for part, x in zip(jax.tree.leaves(parts), jax.tree.leaves(like), strict=True):
        sums[cut_axis(x.shape, n) is None] += jnp.sum(jnp.square(part))
    return sums[True] + lax.psum(sums[False], AXIS)


# --- outside of it -----------------------------------------------------------------------------


def part_shape(shape: tuple[int, ...], n_devices: int) -> tuple[int, ...]:
    """The shape of a device's part of an array."""
    axis = cut_axis(shape, n_devices)
    return tuple(size // (n_devices if i == axis else 1) for i, size in enumerate(shape))


def place(tree: Any, share: Share) -> Any:
    """Each local device's parts of a tree of whole arrays, with a leading device axis.

    Deletes each array of the tree as soon as it is cut: the whole state of a large optimizer does
    not fit one device beside its part.
    """
    placed = flax.jax_utils.replicate(jnp.zeros(()), axis_name=AXIS).sharding
    first, last = share.first_device, share.first_device + share.n_local_devices

    def one(x: Any) -> jax.Array:
        axis = cut_axis(x.shape, share.n_devices)
        if axis is None:
            copy = flax.jax_utils.replicate(x, axis_name=AXIS)
        else:
            parts = np.split(np.asarray(x), share.n_devices, axis)[first:last]
            copy = jax.device_put(np.stack(parts), placed)
        if isinstance(x, jax.Array):
            jax.block_until_ready(copy)
            x.delete()
        return copy

    return jax.tree.map(one, tree)


def collected(tree: Any, like: Any, share: Share) -> Any:
    """The whole arrays, as NumPy, of what `place` made; `like` has their shapes.

    All processes of a pod must call it.
    """

    def one(x: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
        axis = cut_axis(shape, share.n_devices)
        local = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        parts = [np.asarray(shard.data)[0] for shard in local]
        if axis is None:
            return parts[0]
        part = np.concatenate(parts, axis)
        if share.n_local_devices == share.n_devices:
            return part
        everyone = multihost_utils.process_allgather(part)
        return np.concatenate(list(everyone), axis)

    return jax.tree.map(lambda x, y: one(x, y.shape), tree, like)
