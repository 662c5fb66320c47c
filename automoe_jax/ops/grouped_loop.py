"""The grouped FFN as loops over blocks of rows and slices of columns: the CPU's backend.

Trip counts depend on the data, so the cost follows the rows and the sizes of their experts.
Letters as in `grouping`; R rows of a block, C columns of a slice, J slices of the largest size,
L layers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.active import Array
from automoe_jax.ops.grouping import Active, ExpertWeights, Groups

# Rows of a block. On 2 AVX-512 cores products of fewer than 256 rows lose up to a third of their
# speed, and blocks above 512 gain nothing; steps of a third or less keep the padding small, and
# every size is compiled. Batches of no more rows than the largest block are those of small models,
# where compiling takes longer than steps: powers of 2 do for them.
ROWS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Wide enough for the products, small enough that a slice of both matrices stays in the cache.
MOST_COLUMNS, LEAST_COLUMNS = 1024, 256


class Plan(NamedTuple):
    """Blocks of each expert: full ones of the largest size, and one for the rows that are left."""

    full_E: jax.Array  # number of full blocks
    rest_order_E: jax.Array  # experts in the order of the size of their last block
    rest_first: jax.Array  # per block size, where its experts begin in that order
    full_end_E: jax.Array  # running total of full blocks
    kept_start_E: jax.Array  # first row of each expert where the rows of whole blocks are kept


def block_rows(n_rows: int) -> list[int]:
    """The block sizes that are compiled for so many rows."""
    if n_rows < ROWS[0]:
        return [-(-n_rows // 8) * 8]
    if n_rows > ROWS[-1]:
        return list(ROWS)
    powers = [rows for rows in ROWS if rows & (rows - 1) == 0 and rows < n_rows]
    return [*powers, -(-n_rows // ROWS[0]) * ROWS[0]]


def most_padding(rows: list[int]) -> int:
    """Most rows by which an expert's last block is larger than what is left for it."""
    return max(b - a for a, b in zip([0, *rows], rows, strict=False))


def slice_columns(sizes: tuple[int, ...]) -> tuple[int, bool]:
    """Columns of a slice, and whether no slice reaches into another expert's rows."""
    common = math.gcd(*sizes)
    divisors = [c for c in range(1, min(common, MOST_COLUMNS) + 1) if common % c == 0]
    if divisors and (divisors[-1] >= LEAST_COLUMNS or set(sizes) <= {0, divisors[-1]}):
        return divisors[-1], True
    return min(MOST_COLUMNS, max(sizes)), False


def kept_shape(n_rows: int, n_experts: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (J, rows, C) of the hidden layer that `forward` keeps for `backward`."""
    columns, _ = slice_columns(sizes)
    rows = n_rows + n_experts * most_padding(block_rows(n_rows))
    return -(-max(sizes) // columns), rows, columns


def _plan(groups: Groups, sizes_E: jax.Array, rows: list[int]) -> Plan:
    count_E = jnp.where(sizes_E > 0, groups.count_E, 0)  # identity experts compute nothing
    full_E = jnp.maximum((count_E - 1) // rows[-1], 0)
    rest_E = count_E - full_E * rows[-1]
    size_E = jnp.where(rest_E > 0, jnp.searchsorted(jnp.array(rows), rest_E), len(rows))
    order_E = jnp.argsort(size_E, stable=True)
    first = jnp.searchsorted(size_E[order_E], jnp.arange(len(rows) + 1))
    last_E = jnp.append(jnp.array(rows), 0)[size_E]
    whole_E = full_E * rows[-1] + last_E
    return Plan(full_E, order_E, first, jnp.cumsum(full_E), jnp.cumsum(whole_E) - whole_E)


def _for_each_block(
    plan: Plan, n_rows: int, rows: list[int], block: Callable[..., Any], carry: Any
) -> Any:
    """Runs `block(n_rows, expert, nth_row, first, carry)` for every block.

    `nth_row` is the block's first row among those of its expert; `first` is true for the block of
    an expert that comes first. Block sizes are told apart by loops that may have no round, not by
    a `lax.switch`: XLA copies what a branch changes, here the gradients of all weights.
    """
    for i, n in enumerate(rows):

        def rest(t, carry, n=n):
            e = plan.rest_order_E[t]
            return block(n, e, plan.full_E[e] * rows[-1], True, carry)

        carry = lax.fori_loop(plan.rest_first[i], plan.rest_first[i + 1], rest, carry)

    def full(t, carry):
        e = jnp.searchsorted(plan.full_end_E, t, side="right")
        nth = t - (plan.full_end_E[e] - plan.full_E[e])
        return block(rows[-1], e, nth * rows[-1], False, carry)

    if n_rows > rows[-1]:
        carry = lax.fori_loop(0, plan.full_end_E[-1], full, carry)
    return carry


class _Slices:
    """Slices of one expert's columns, cut to the width of the rows."""

    def __init__(self, weights: ExpertWeights, active: Active, sizes: tuple[int, ...], width: int):
        self.columns, self.aligned = slice_columns(sizes)
        self._weights, self._active, self._width = weights, active, width

    def count(self, expert):
        return (self._active.sizes_E[expert] + self.columns - 1) // self.columns

    def at(self, expert, j):
        """First row of slice j; moved back where it would reach past the end."""
        low = self._active.offsets_E[expert] + j * self.columns
        return jnp.minimum(low, self._weights.fc1_FD.shape[0] - self.columns)

    def own(self, expert, j):
        """(C,): which columns of slice j are the expert's active ones."""
        low = self._active.offsets_E[expert] + j * self.columns
        column_C = self.at(expert, j) + jnp.arange(self.columns)
        return (column_C >= low) & (
            column_C < self._active.offsets_E[expert] + self._active.sizes_E[expert]
        )

    def matrix(self, array_FD, at):
        return lax.dynamic_slice(array_FD, (at, 0), (self.columns, self._width))

    def hidden(self, expert, j, x_RD):
        """relu(fc1(x)) of slice j, fp32, zero beyond the active columns."""
        at = self.at(expert, j)
        fc1_CD = self.matrix(self._weights.fc1_FD, at)
        bias_C = lax.dynamic_slice(self._weights.fc1_bias_F, (at,), (self.columns,))
        return jnp.where(self.own(expert, j), jax.nn.relu(_dot(x_RD, fc1_CD.T) + bias_C), 0)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def forward(
    x_AD: jax.Array,
    groups: Groups,
    weights: ExpertWeights,
    active: Active,
    sizes: tuple[int, ...],
    kept: jax.Array | None = None,
    layer: Array | int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """FFN of sorted rows; rows of identity experts and of none give zeros.

    Args:
      x_AD: sorted rows, cut to the active width.
      groups: the sorting.
      weights: experts; more columns than x are not read.
      active: the layer's experts.
      sizes: every FFN size that an expert may have, the largest as its rows in F.
      kept: (L, *kept_shape) buffer for the hidden layer; None where there is no backward pass.
      layer: [], where in `kept`.

    Returns:
      y_AD and the buffer.
    """
    n, d = x_AD.shape
    rows = block_rows(n)
    x_pad = jnp.pad(x_AD, ((0, rows[-1]), (0, 0)))
    slices = _Slices(weights, active, sizes, d)

    plan = _plan(groups, active.sizes_E, rows)

    def block(n_rows, expert, nth_row, first, carry):
        start, kept_at = groups.start_E[expert] + nth_row, plan.kept_start_E[expert] + nth_row
        y_pad, kept = carry
        x_RD = lax.dynamic_slice(x_pad, (start, 0), (n_rows, d))

        def one(j, carry):
            y_RD, kept = carry
            h_RC = slices.hidden(expert, j, x_RD).astype(x_RD.dtype)
            if kept is not None:
                kept = lax.dynamic_update_slice(kept, h_RC[None, None], (layer, j, kept_at, 0))
            fc2_CD = slices.matrix(weights.fc2_FD, slices.at(expert, j))
            return y_RD + _dot(h_RC, fc2_CD), kept

        bias_D = weights.fc2_bias_ED[active.bias_row + expert, :d].astype(jnp.float32)
        y_RD = jnp.broadcast_to(bias_D, (n_rows, d))
        y_RD, kept = lax.fori_loop(0, slices.count(expert), one, (y_RD, kept))
        return _write(y_pad, y_RD.astype(y_pad.dtype), start, groups, expert), kept

    y_pad, kept = _for_each_block(plan, n, rows, block, (jnp.zeros_like(x_pad), kept))
    return y_pad[:n], kept


def backward(
    x_AD: jax.Array,
    groups: Groups,
    weights: ExpertWeights,
    active: Active,
    sizes: tuple[int, ...],
    dy_AD: jax.Array,
    dw: ExpertWeights,
    kept: jax.Array,
    layer: Array | int = 0,
) -> tuple[jax.Array, ExpertWeights]:
    """Gradients of `forward`.

    Args:
      dy_AD: cotangent of the sorted output.
      dw: gradients of the weights, fp32, zero so far at this layer's place; others stay.
      kept: the buffer of `forward`.
      (others as there)

    Returns:
      dx_AD, zero where `forward` gave zeros, and dw with this layer's gradients.
    """
    n, d = x_AD.shape
    rows = block_rows(n)
    x_pad, dy_pad = (jnp.pad(a, ((0, rows[-1]), (0, 0))) for a in (x_AD, dy_AD))
    slices = _Slices(weights, active, sizes, d)

    plan = _plan(groups, active.sizes_E, rows)

    def block(n_rows, expert, nth_row, first, carry):
        start, kept_at = groups.start_E[expert] + nth_row, plan.kept_start_E[expert] + nth_row
        dx_pad, dw = carry
        x_RD = lax.dynamic_slice(x_pad, (start, 0), (n_rows, d))
        dy_RD = lax.dynamic_slice(dy_pad, (start, 0), (n_rows, d))
        dy_RD = jnp.where(_own_rows(n_rows, start, groups, expert), dy_RD, 0)
        add = not (first and slices.aligned)

        def one(j, carry):
            dx_RD, dw = carry
            at = slices.at(expert, j)
            fc1_CD, fc2_CD = (slices.matrix(w, at) for w in (weights.fc1_FD, weights.fc2_FD))
            h_RC = lax.dynamic_slice(kept, (layer, j, kept_at, 0), (1, 1, n_rows, slices.columns))[
                0, 0
            ]
            dh_RC = jnp.where(h_RC > 0, _dot(dy_RD, fc2_CD.T), 0)
            dh_in = dh_RC.astype(x_RD.dtype)
            dw = dw._replace(
                fc1_FD=_put(dw.fc1_FD, _dot(dh_in.T, x_RD), (at, 0), add),
                fc1_bias_F=_put(dw.fc1_bias_F, jnp.sum(dh_RC, axis=0), (at,), add),
                fc2_FD=_put(dw.fc2_FD, _dot(h_RC.T, dy_RD), (at, 0), add),
            )
            return dx_RD + _dot(dh_in, fc1_CD), dw

        db_1D = jnp.sum(dy_RD, axis=0, keepdims=True, dtype=jnp.float32)
        at_bias = (active.bias_row + expert, 0)
        dw = dw._replace(fc2_bias_ED=_put(dw.fc2_bias_ED, db_1D, at_bias, not first))
        dx_RD = jnp.zeros((n_rows, d), jnp.float32)
        dx_RD, dw = lax.fori_loop(0, slices.count(expert), one, (dx_RD, dw))
        return _write(dx_pad, dx_RD.astype(dx_pad.dtype), start, groups, expert), dw

    dx_pad, dw = _for_each_block(plan, n, rows, block, (jnp.zeros_like(x_pad), dw))
    return dx_pad[:n], dw


def _own_rows(n_rows: int, start, groups: Groups, expert):
    end = groups.start_E[expert] + groups.count_E[expert]
    return (start + jnp.arange(n_rows) < end)[:, None]


def _write(array, block_RD, start, groups: Groups, expert):
    """The block's own rows into the array; those past the end of the group stay as they are."""
    old_RD = lax.dynamic_slice(array, (start, 0), block_RD.shape)
    own = _own_rows(block_RD.shape[0], start, groups, expert)
    return lax.dynamic_update_slice(array, jnp.where(own, block_RD, old_RD), (start, 0))


def _put(array, update, at, add: bool):
    if add:
        update = update + lax.dynamic_slice(array, at, update.shape)
    return lax.dynamic_update_slice(array, update, at)
