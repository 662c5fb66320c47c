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

from automoe_jax.ops.grouping import ExpertWeights, Groups, LayerExperts, add_slice

# Rows of a block: an expert's rows are split into blocks of the largest size, the rest into blocks
# of the next smaller one and so on; the last is padded. Large blocks are the faster products, small
# ones pad less: of full-size updates on 2 AVX-512 cores (96, 384) takes 3 to 10 % longer.
ROWS = (32, 64, 128, 256, 512)
# Columns of a slice: wide enough for the products, narrow enough that both matrices fit the cache.
MOST_COLUMNS, LEAST_COLUMNS = 1024, 256


class BlockPlan(NamedTuple):
    """The blocks of one size."""

    end_E: jax.Array  # running total of blocks
    first_row_E: jax.Array  # of each expert's first block of this size, among the expert's rows


def block_rows(n_rows: int) -> list[int]:
    """The block sizes that are compiled for `n_rows`, ascending."""
    smallest = min(ROWS[0], -(-n_rows // 8) * 8)
    return [smallest, *(rows for rows in ROWS[1:] if rows <= n_rows)]


def slice_columns(ffn_dims: tuple[int, ...]) -> int:
    """Columns of a slice, where possible such that none reaches into another expert's rows."""
    common = math.gcd(*ffn_dims)
    divisors = [c for c in range(1, min(common, MOST_COLUMNS) + 1) if common % c == 0]
    if divisors and (divisors[-1] >= LEAST_COLUMNS or set(ffn_dims) <= {0, divisors[-1]}):
        return divisors[-1]
    return min(MOST_COLUMNS, max(ffn_dims))


def hidden_shape(n_rows: int, n_experts: int, ffn_dims: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (J, rows, C) of the hidden activations that `forward` stores for `backward`."""
    columns = slice_columns(ffn_dims)
    rows = n_rows + n_experts * block_rows(n_rows)[0]
    return -(-max(ffn_dims) // columns), rows, columns


def _plan(groups: Groups, sizes_E: jax.Array, rows: list[int]) -> tuple[list[BlockPlan], jax.Array]:
    """The blocks of each size, and the first row of each expert among all blocks' rows."""
    count_E = jnp.where(sizes_E > 0, groups.count_E, 0)  # identity experts compute nothing
    padded_E = -(-count_E // rows[0]) * rows[0]
    plans, done_E = [], jnp.zeros_like(padded_E)
    for n in reversed(rows):
        blocks_E = (padded_E - done_E) // n
        plans.append(BlockPlan(jnp.cumsum(blocks_E), done_E))
        done_E += blocks_E * n
    return plans[::-1], jnp.cumsum(padded_E) - padded_E


def _for_each_block(
    plans: list[BlockPlan], rows: list[int], block: Callable[..., Any], carry: Any
) -> Any:
    """Runs `block(n_rows, expert, nth_row, carry)` for every block.

    `nth_row` is the block's first row among those of its expert. Each block size has its own loop,
    perhaps of no round, rather than a branch of `lax.switch`: XLA copies what a branch changes,
    here the gradients of all weights.
    """
    for n, plan in zip(rows, plans, strict=True):

        def one(t, carry, n=n, plan=plan):
            e = jnp.searchsorted(plan.end_E, t, side="right")
            before = jnp.where(e > 0, plan.end_E[e - 1], 0)
            return block(n, e, plan.first_row_E[e] + (t - before) * n, carry)

        carry = lax.fori_loop(0, plan.end_E[-1], one, carry)
    return carry


class _Slices:
    """Slices of an expert's columns, cut to the width of the rows."""

    def __init__(self, experts: LayerExperts, width: int):
        self.columns = slice_columns(experts.ffn_dims)
        self._experts, self._width = experts, width

    def count(self, expert):
        return (self._experts.sizes_E[expert] + self.columns - 1) // self.columns

    def at(self, expert, j):
        """First row of slice j; moved back where the slice would reach past the end."""
        low = self._experts.offsets_E[expert] + j * self.columns
        return jnp.minimum(low, self._experts.weights.fc1_FD.shape[0] - self.columns)

    def own(self, expert, j):
        """(C,): true for the expert's active columns in slice j."""
        start = self._experts.offsets_E[expert]
        column_C = self.at(expert, j) + jnp.arange(self.columns)
        end = start + self._experts.sizes_E[expert]
        return (column_C >= start + j * self.columns) & (column_C < end)

    def matrices(self, expert, j):
        """(C, D) slices of fc1 and fc2."""
        at, shape = (self.at(expert, j), 0), (self.columns, self._width)
        weights = self._experts.weights
        return tuple(lax.dynamic_slice(w, at, shape) for w in (weights.fc1_FD, weights.fc2_FD))

    def hidden(self, expert, j, x_RD, fc1_CD):
        """relu(fc1(x)) of slice j, fp32, zero beyond the active columns."""
        at = (self.at(expert, j),)
        bias_C = lax.dynamic_slice(self._experts.weights.fc1_bias_F, at, (self.columns,))
        return jnp.where(self.own(expert, j), jax.nn.relu(_dot(x_RD, fc1_CD.T) + bias_C), 0)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def forward(x_AD, groups: Groups, experts: LayerExperts, hidden, layer) -> tuple[jax.Array, Any]:
    """As `grouped_ffn.forward`, of sorted rows; rows of identity experts and of none give zeros."""
    n, d = x_AD.shape
    rows = block_rows(n)
    x_pad = jnp.pad(x_AD, ((0, rows[0]), (0, 0)))
    slices = _Slices(experts, d)
    plans, stored_E = _plan(groups, experts.sizes_E, rows)

    def block(n_rows, expert, nth_row, carry):
        start, stored_at = groups.start_E[expert] + nth_row, stored_E[expert] + nth_row
        y_pad, hidden = carry
        x_RD = lax.dynamic_slice(x_pad, (start, 0), (n_rows, d))

        def one(j, carry):
            y_RD, hidden = carry
            fc1_CD, fc2_CD = slices.matrices(expert, j)
            h_RC = slices.hidden(expert, j, x_RD, fc1_CD).astype(x_RD.dtype)
            if hidden is not None:
                at = (layer, j, stored_at, 0)
                hidden = lax.dynamic_update_slice(hidden, h_RC[None, None], at)
            return y_RD + _dot(h_RC, fc2_CD), hidden

        bias_ED = experts.weights.fc2_bias_ED
        bias_D = bias_ED[experts.bias_row + expert, :d].astype(jnp.float32)
        y_RD = jnp.broadcast_to(bias_D, (n_rows, d))
        y_RD, hidden = lax.fori_loop(0, slices.count(expert), one, (y_RD, hidden))
        return _write(y_pad, y_RD.astype(y_pad.dtype), start, groups, expert), hidden

    y_pad, hidden = _for_each_block(plans, rows, block, (jnp.zeros_like(x_pad), hidden))
    return y_pad[:n], hidden


def backward(
    x_AD, groups: Groups, experts: LayerExperts, hidden, dy_AD, dw: ExpertWeights, layer
) -> tuple[jax.Array, ExpertWeights]:
    """As `grouped_ffn.backward`, of sorted rows; dx is zero where `forward` gives zeros."""
    n, d = x_AD.shape
    rows = block_rows(n)
    x_pad, dy_pad = (jnp.pad(a, ((0, rows[0]), (0, 0))) for a in (x_AD, dy_AD))
    slices = _Slices(experts, d)
    plans, stored_E = _plan(groups, experts.sizes_E, rows)

    def block(n_rows, expert, nth_row, carry):
        start, stored_at = groups.start_E[expert] + nth_row, stored_E[expert] + nth_row
        dx_pad, dw = carry
        x_RD, dy_RD = (lax.dynamic_slice(a, (start, 0), (n_rows, d)) for a in (x_pad, dy_pad))
        dy_RD = jnp.where(_own_rows(n_rows, start, groups, expert), dy_RD, 0)

        def one(j, carry):
            at, shape = (layer, j, stored_at, 0), (1, 1, n_rows, slices.columns)
            h_RC = lax.dynamic_slice(hidden, at, shape)[0, 0]
            return _slice_bwd(slices, expert, j, x_RD, h_RC, dy_RD, carry)

        db_1D = jnp.sum(dy_RD, axis=0, keepdims=True, dtype=jnp.float32)
        at_bias = (experts.bias_row + expert, 0)
        dw = dw._replace(fc2_bias_ED=add_slice(dw.fc2_bias_ED, db_1D, at_bias))
        dx_RD = jnp.zeros((n_rows, d), jnp.float32)
        dx_RD, dw = lax.fori_loop(0, slices.count(expert), one, (dx_RD, dw))
        return _write(dx_pad, dx_RD.astype(dx_pad.dtype), start, groups, expert), dw

    dx_pad, dw = _for_each_block(plans, rows, block, (jnp.zeros_like(x_pad), dw))
    return dx_pad[:n], dw


def _slice_bwd(slices: _Slices, expert, j, x_RD, h_RC, dy_RD, carry):
    """(dx_RD, dw) with the gradients of slice j."""
    dx_RD, dw = carry
    at = slices.at(expert, j)
    fc1_CD, fc2_CD = slices.matrices(expert, j)
    dh_RC = jnp.where(h_RC > 0, _dot(dy_RD, fc2_CD.T), 0)
    dh_in = dh_RC.astype(x_RD.dtype)
    dw = dw._replace(
        fc1_FD=add_slice(dw.fc1_FD, _dot(dh_in.T, x_RD), (at, 0)),
        fc1_bias_F=add_slice(dw.fc1_bias_F, jnp.sum(dh_RC, axis=0), (at,)),
        fc2_FD=add_slice(dw.fc2_FD, _dot(h_RC.T, dy_RD), (at, 0)),
    )
    return dx_RD + _dot(dh_in, fc1_CD), dw


def _own_rows(n_rows: int, start, groups: Groups, expert):
    """(R, 1): true for the rows of a block that belong to the expert."""
    end = groups.start_E[expert] + groups.count_E[expert]
    return (start + jnp.arange(n_rows) < end)[:, None]


def _write(array, block_RD, start, groups: Groups, expert):
    """Writes the block's own rows; those past the end of the group stay as they are."""
    old_RD = lax.dynamic_slice(array, (start, 0), block_RD.shape)
    own = _own_rows(block_RD.shape[0], start, groups, expert)
    return lax.dynamic_update_slice(array, jnp.where(own, block_RD, old_RD), (start, 0))
