"""The grouped FFN of a layer whose experts are spread over devices (expert parallelism).

Devices form groups of n, one after the other along axis `AXIS`. The i-th device of a group holds
the experts i, i + n, i + 2 n and so on of each layer, so that few active experts are on as many
devices. All devices of a group run the same layer at a time. Each computes its experts' rows of the
whole group: the inputs are gathered, the outputs summed and sent back. No row is dropped, whatever
the routers choose.

Letters as in `grouped_ffn`; G rows of a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.active import Array
from automoe_jax.ops import grouped_ffn
from automoe_jax.ops.grouping import ExpertWeights, LayerExperts

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


def forward(
    backend: str,
    x_AD: jax.Array,
    expert_A: jax.Array,
    experts: LayerExperts,
    hidden: jax.Array | None,
    layer: Array | int,
) -> tuple[jax.Array, jax.Array | None]:
    """`grouped_ffn.forward` where `experts` are a device's own, and `expert_A` counts all of them.

    `hidden` has the shape for the rows of all devices of the group.
    """
    n = experts.spread
    if n == 1:
        return grouped_ffn.forward(backend, x_AD, expert_A, experts, hidden, layer)
    rows = _gathered(x_AD, n), _own(expert_A, experts)
    y_GD, hidden = grouped_ffn.forward(backend, *rows, experts, hidden, layer)
    return _sent_back(y_GD, n), hidden


def backward(
    backend: str,
    x_AD: jax.Array,
    expert_A: jax.Array,
    experts: LayerExperts,
    hidden: Any,
    dy_AD: jax.Array,
    dw: ExpertWeights,
    layer: Array | int,
) -> tuple[jax.Array, ExpertWeights]:
    """As `grouped_ffn.backward`; `dw` are of the device's experts, over the group's rows."""
    n = experts.spread
    if n == 1:
        return grouped_ffn.backward(backend, x_AD, expert_A, experts, hidden, dy_AD, dw, layer)
    rows = _gathered(x_AD, n), _own(expert_A, experts)
    dy_GD = _gathered(dy_AD, n)
    dx_GD, dw = grouped_ffn.backward(backend, *rows, experts, hidden, dy_GD, dw, layer)
    return _sent_back(dx_GD, n), dw


def _gathered(rows: jax.Array, n: int) -> jax.Array:
    """The rows of all devices of the group."""
    return lax.all_gather(rows, AXIS, axis_index_groups=groups(n), tiled=True)


def _sent_back(y_GD: jax.Array, n: int) -> jax.Array:
    """The device's own rows, summed over the group: all of a row's terms but one are zeros."""
    return lax.psum_scatter(y_GD, AXIS, axis_index_groups=groups(n), tiled=True)


def _own(expert_A: jax.Array, experts: LayerExperts) -> jax.Array:
    """Of the group's rows, the expert among the device's own; their number for those of others."""
    n, n_own = experts.spread, experts.sizes_E.shape[0]
    expert_G = _gathered(expert_A, n)
    return jnp.where(expert_G % n == place(n), jnp.minimum(expert_G // n, n_own), n_own)
