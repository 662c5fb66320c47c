"""The rows of a layer whose experts are spread over devices (expert parallelism).

Devices form groups of n, one after the other along axis `AXIS`. The i-th device of a group holds
the experts i, i + n, i + 2 n and so on of each layer, so that few active experts are on as many
devices. All devices of a group run the same layer at a time. Each computes its experts' rows of the
whole group: the inputs are gathered, the outputs summed and sent back. No row is dropped, whatever
the routers choose.

Letters as in `grouped_ffn`; G rows of a group.
"""

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.ops.grouping import LayerExperts

AXIS = "data"  # of the devices


def place(n: int) -> jax.Array:
    """The device's number in its group, []."""
    return lax.axis_index(AXIS) % n


def groups(n: int) -> list[list[int]]:
    """The devices of each group of n."""
    return [[*range(first, first + n)] for first in range(0, lax.axis_size(AXIS), n)]


def same_place(n: int) -> list[list[int]]:
    """The devices that hold the same experts."""
    return [list(devices) for devices in zip(*groups(n), strict=True)]


def of_group(experts: LayerExperts, expert_A: jax.Array, *rows_AD: jax.Array) -> list[jax.Array]:
    """Experts and rows of all devices of the group, (G,) and (G, D), for `grouped_ffn`.

    Experts are counted among those that the device has, `experts`; those of others are none.
    """
    n, n_own = experts.spread, experts.sizes_E.shape[0]
    if n == 1:
        return [expert_A, *rows_AD]
    expert_G, *rows_GD = (
        lax.all_gather(x, AXIS, axis_index_groups=groups(n), tiled=True)
        for x in (expert_A, *rows_AD)
    )
    own_G = jnp.where(expert_G % n == place(n), jnp.minimum(expert_G // n, n_own), n_own)
    return [own_G, *rows_GD]


def sent_back(experts: LayerExperts, y_GD: jax.Array) -> jax.Array:
    """The device's own rows, summed over the group: all of a row's terms but one are zeros."""
    n = experts.spread
    if n == 1:
        return y_GD
    return lax.psum_scatter(y_GD, AXIS, axis_index_groups=groups(n), tiled=True)
