"""The grouped expert FFN: each row through its own expert, at the cost of that expert's size.

Letters: N rows, D embedding, F FFN columns of all experts together, E experts, R rows of a block,
C columns of a slice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.choice import Array

BLOCK_ROWS = 128
SLICE_COLUMNS = 1024


class ExpertWeights(NamedTuple):
    """Experts side by side along F: expert e owns `sizes_E[e]` rows from `offsets_E[e]` on.

    Shapes: fc1_FD, fc1_bias_F, fc2_FD, fc2_bias_ED. The layout serves the supernet (every expert
    at the largest size, its front rows active) and a stand-alone subnet (exact sizes) alike.
    """

    fc1_FD: jax.Array
    fc1_bias_F: jax.Array
    fc2_FD: jax.Array
    fc2_bias_ED: jax.Array


def grouped_ffn(
    x_ND: jax.Array,
    expert_N: jax.Array,
    weights: ExpertWeights,
    offsets_E: Array,
    sizes_E: Array,
    columns: int = SLICE_COLUMNS,
) -> jax.Array:
    """fc2(relu(fc1(x))) of each row's expert; a row of an expert of size 0 is returned as it is.

    Rows are sorted by expert and worked off in blocks of rows and slices of columns, with trip
    counts that depend on the data: the cost follows the rows and the sizes of their experts. No
    row is dropped.

    Args:
      x_ND: the rows.
      expert_N: int, the expert of each row; a row with E or more goes to none and gives zeros.
      weights: the experts.
      offsets_E: int, first row of each expert in `weights`.
      sizes_E: int, active FFN size of each expert; may be traced.
      columns: most FFN columns worked on at a time; no more than the largest expert has is best.

    Returns:
      y_ND. Differentiable in `x_ND` and `weights`; entries of weights that no row used get a
      gradient of exactly zero.
    """
    block = min(BLOCK_ROWS, _round_up(x_ND.shape[0], 8))
    columns = min(columns, SLICE_COLUMNS, weights.fc1_FD.shape[0])
    weights, offsets_E, sizes_E = jax.tree.map(jnp.asarray, (weights, offsets_E, sizes_E))
    return _grouped_ffn(block, columns, x_ND, expert_N, weights, offsets_E, sizes_E)


def dense_reference(
    x_ND: jax.Array,
    expert_N: jax.Array,
    weights: ExpertWeights,
    offsets_E: Array,
    sizes_E: Array,
) -> jax.Array:
    """The same function, every row through every expert and masked: slow, plain, for tests."""
    column_F = jnp.arange(weights.fc1_FD.shape[0])
    y_ND = jnp.zeros_like(x_ND)
    for e in range(sizes_E.shape[0]):
        own_F = (column_F >= offsets_E[e]) & (column_F < offsets_E[e] + sizes_E[e])
        h_NF = jax.nn.relu(x_ND @ weights.fc1_FD.T + weights.fc1_bias_F) * own_F
        ffn_ND = h_NF @ weights.fc2_FD + weights.fc2_bias_ED[e]
        y_e_ND = jnp.where(sizes_E[e] > 0, ffn_ND, x_ND)
        y_ND = jnp.where((expert_N == e)[:, None], y_e_ND, y_ND)
    return y_ND


class _Groups(NamedTuple):
    """Rows sorted by expert, cut into blocks of one expert each."""

    order_N: jax.Array  # sorted position -> row
    expert_N: jax.Array  # of the sorted rows
    end_E: jax.Array  # one past the last sorted row of each expert
    n_blocks: jax.Array  # [], of experts of size above 0
    block_expert_B: jax.Array
    block_start_B: jax.Array  # first sorted row of each block


def _group(expert_N: jax.Array, sizes_E: Array, block: int) -> _Groups:
    n, n_experts = expert_N.shape[0], sizes_E.shape[0]
    expert_N = jnp.minimum(expert_N, n_experts)
    order_N = jnp.argsort(expert_N, stable=True)
    count_E = jnp.bincount(expert_N, length=n_experts + 1)[:n_experts]
    end_E = jnp.cumsum(count_E)
    # Identity experts have rows but nothing to compute.
    blocks_E = jnp.where(sizes_E > 0, (count_E + block - 1) // block, 0)
    first_E = jnp.cumsum(blocks_E) - blocks_E
    most = -(-n // block) + n_experts
    index_B = jnp.arange(most)
    block_expert_B = jnp.minimum(
        jnp.searchsorted(jnp.cumsum(blocks_E), index_B, side="right"), n_experts - 1
    )
    start_E = end_E - count_E
    block_start_B = start_E[block_expert_B] + (index_B - first_E[block_expert_B]) * block
    return _Groups(
        order_N, expert_N[order_N], end_E, jnp.sum(blocks_E), block_expert_B, block_start_B
    )


def _slice(j, expert, offsets_E, sizes_E, columns: int, total: int):
    """(first row of slice j of an expert in the weights, which of its columns are its own)."""
    low = offsets_E[expert] + j * columns
    start = jnp.minimum(low, total - columns)
    column_C = start + jnp.arange(columns)
    own_C = (column_C >= low) & (column_C < offsets_E[expert] + sizes_E[expert])
    return start, own_C


def _n_slices(expert, sizes_E, columns: int):
    return (sizes_E[expert] + columns - 1) // columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_ffn(block, columns, x_ND, expert_N, weights, offsets_E, sizes_E):
    return _forward(block, columns, x_ND, expert_N, weights, offsets_E, sizes_E)[0]


def _forward(block, columns, x_ND, expert_N, weights, offsets_E, sizes_E):
    n, d = x_ND.shape
    total = weights.fc1_FD.shape[0]
    groups = _group(expert_N, sizes_E, block)
    # The last block may reach past the end: pad instead of letting the slice be moved.
    x_sorted = jnp.pad(x_ND[groups.order_N], ((0, block), (0, 0)))

    def one_block(b, y_sorted):
        expert, start = groups.block_expert_B[b], groups.block_start_B[b]
        x_RD = lax.dynamic_slice(x_sorted, (start, 0), (block, d))

        def one_slice(j, y_RD):
            at, own_C = _slice(j, expert, offsets_E, sizes_E, columns, total)
            fc1_CD = lax.dynamic_slice(weights.fc1_FD, (at, 0), (columns, d))
            bias_C = lax.dynamic_slice(weights.fc1_bias_F, (at,), (columns,))
            fc2_CD = lax.dynamic_slice(weights.fc2_FD, (at, 0), (columns, d))
            h_RC = jnp.where(own_C, jax.nn.relu(x_RD @ fc1_CD.T + bias_C), 0)
            return y_RD + h_RC @ fc2_CD

        y_RD = jnp.broadcast_to(weights.fc2_bias_ED[expert], (block, d))
        y_RD = lax.fori_loop(0, _n_slices(expert, sizes_E, columns), one_slice, y_RD)
        # Rows past the end of the group belong to the next one, which adds its own result.
        mine_R = start + jnp.arange(block) < groups.end_E[expert]
        old_RD = lax.dynamic_slice(y_sorted, (start, 0), (block, d))
        new_RD = jnp.where(mine_R[:, None], y_RD, old_RD)
        return lax.dynamic_update_slice(y_sorted, new_RD, (start, 0))

    y_sorted = jnp.zeros((n + block, d), x_ND.dtype)
    y_sorted = lax.fori_loop(0, groups.n_blocks, one_block, y_sorted)[:n]
    y_sorted = jnp.where(_identity(groups, sizes_E)[:, None], x_sorted[:n], y_sorted)
    y_ND = jnp.zeros_like(x_ND).at[groups.order_N].set(y_sorted, unique_indices=True)
    return y_ND, (x_sorted, groups, weights, offsets_E, sizes_E)


def _identity(groups: _Groups, sizes_E: Array) -> jax.Array:
    """Which sorted rows go to an expert of size 0."""
    n_experts = sizes_E.shape[0]
    zero_N = sizes_E[jnp.minimum(groups.expert_N, n_experts - 1)] == 0
    return zero_N & (groups.expert_N < n_experts)


def _backward(block, columns, residuals, dy_ND):
    x_sorted, groups, weights, offsets_E, sizes_E = residuals
    n, d = dy_ND.shape
    total = weights.fc1_FD.shape[0]
    dy_sorted = jnp.pad(dy_ND[groups.order_N], ((0, block), (0, 0)))

    def one_block(b, carry):
        dx_sorted, dw = carry
        expert, start = groups.block_expert_B[b], groups.block_start_B[b]
        mine_R = start + jnp.arange(block) < groups.end_E[expert]
        x_RD = lax.dynamic_slice(x_sorted, (start, 0), (block, d))
        dy_RD = lax.dynamic_slice(dy_sorted, (start, 0), (block, d)) * mine_R[:, None]

        def one_slice(j, carry):
            dx_RD, dw = carry
            at, own_C = _slice(j, expert, offsets_E, sizes_E, columns, total)
            fc1_CD = lax.dynamic_slice(weights.fc1_FD, (at, 0), (columns, d))
            bias_C = lax.dynamic_slice(weights.fc1_bias_F, (at,), (columns,))
            fc2_CD = lax.dynamic_slice(weights.fc2_FD, (at, 0), (columns, d))
            # Computed again rather than kept: an (N, F) array per layer would be the largest
            # thing in memory.
            h_RC = jnp.where(own_C, jax.nn.relu(x_RD @ fc1_CD.T + bias_C), 0)
            dh_RC = jnp.where(h_RC > 0, dy_RD @ fc2_CD.T, 0)
            dw = ExpertWeights(
                _add_at(dw.fc1_FD, dh_RC.T @ x_RD, (at, 0)),
                _add_at(dw.fc1_bias_F, jnp.sum(dh_RC, axis=0), (at,)),
                _add_at(dw.fc2_FD, h_RC.T @ dy_RD, (at, 0)),
                dw.fc2_bias_ED,
            )
            return dx_RD + dh_RC @ fc1_CD, dw

        dw = dw._replace(
            fc2_bias_ED=_add_at(dw.fc2_bias_ED, jnp.sum(dy_RD, 0, keepdims=True), (expert, 0))
        )
        n_slices = _n_slices(expert, sizes_E, columns)
        dx_RD, dw = lax.fori_loop(0, n_slices, one_slice, (jnp.zeros_like(x_RD), dw))
        return _add_at(dx_sorted, dx_RD, (start, 0)), dw

    carry = jnp.zeros_like(dy_sorted), jax.tree.map(jnp.zeros_like, weights)
    dx_sorted, dw = lax.fori_loop(0, groups.n_blocks, one_block, carry)
    dx_sorted = jnp.where(_identity(groups, sizes_E)[:, None], dy_sorted[:n], dx_sorted[:n])
    dx_ND = jnp.zeros_like(dy_ND).at[groups.order_N].set(dx_sorted, unique_indices=True)
    return dx_ND, None, dw, None, None


def _add_at(array, update, at):
    old = lax.dynamic_slice(array, at, update.shape)
    return lax.dynamic_update_slice(array, old + update, at)


_grouped_ffn.defvjp(_forward, _backward)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
