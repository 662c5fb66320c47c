"""The grouped FFN as ragged products: the backends of GPUs and TPUs.

A ragged product multiplies each group of rows by its own matrix. Experts are sorted from the
largest to the smallest, so the rows that use a slice of the FFN's columns come first and the cost
follows the experts' sizes. Letters as in `grouped_loop`; K and N are those of a product.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.ops.grouped_loop import slice_columns
from automoe_jax.ops.grouping import ExpertWeights, Groups, LayerExperts

# (lhs_AK, rhs_EKN, count_E) -> (A, N), fp32; rows past the last group give zeros.
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
BLOCK_ROWS = 128


def has_tokamax() -> bool:
    """True if the library with the GPU kernel is installed."""
    return importlib.util.find_spec("tokamax") is not None


def native(lhs_AK: jax.Array, rhs_EKN: jax.Array, count_E: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot`: a kernel on TPUs, a dense product over all experts elsewhere."""
    count_E = count_E.astype(jnp.int32)
    return lax.ragged_dot(lhs_AK, rhs_EKN, count_E, preferred_element_type=jnp.float32)


def tokamax(lhs_AK: jax.Array, rhs_EKN: jax.Array, count_E: jax.Array) -> jax.Array:
    """The kernel of the tokamax library."""
    dot = importlib.import_module("tokamax").ragged_dot
    y_AN = dot(lhs_AK, rhs_EKN, count_E.astype(jnp.int32), preferred_element_type=jnp.float32)
    own_A = jnp.arange(lhs_AK.shape[0]) < jnp.sum(count_E)
    return jnp.where(own_A[:, None], y_AN, 0)


def blocked(lhs_AK: jax.Array, rhs_EKN: jax.Array, count_E: jax.Array) -> jax.Array:
    """Groups padded to blocks of rows, one batched product over all blocks.

    Reads an expert's matrix once per block: for a GPU without a grouped kernel.
    """
    n, n_experts = lhs_AK.shape[0], rhs_EKN.shape[0]
    block = min(BLOCK_ROWS, -(-n // 8) * 8)
    blocks_E = (count_E + block - 1) // block
    end_E = jnp.cumsum(blocks_E)
    index_B = jnp.arange(-(-n // block) + n_experts)
    expert_B = jnp.minimum(jnp.searchsorted(end_E, index_B, side="right"), n_experts - 1)
    nth_B = index_B - (end_E - blocks_E)[expert_B]
    start_E = jnp.cumsum(count_E) - count_E
    row_BR = (start_E[expert_B] + nth_B * block)[:, None] + jnp.arange(block)
    own_BR = (row_BR < (start_E + count_E)[expert_B][:, None]) & (index_B < end_E[-1])[:, None]
    # Rows past the end are dropped when written and zeros when read.
    row_BR = jnp.where(own_BR, row_BR, n)
    lhs_BRK = lhs_AK.at[row_BR].get(mode="fill", fill_value=0)
    rhs_BKN = rhs_EKN[expert_B]
    y_BRN = jnp.einsum("BRK,BKN->BRN", lhs_BRK, rhs_BKN, preferred_element_type=jnp.float32)
    y_AN = jnp.zeros((n, rhs_EKN.shape[2]), jnp.float32)
    return y_AN.at[row_BR].set(y_BRN, mode="drop", unique_indices=False)


PRODUCTS: dict[str, Product] = {"ragged_dot": native, "tokamax": tokamax, "blocked": blocked}


def largest_first(sizes_E: jax.Array) -> jax.Array:
    """Rank of each expert by size, the largest first."""
    return jnp.argsort(jnp.argsort(-sizes_E, stable=True))


def _rows(experts: LayerExperts, low: int, columns: int) -> jax.Array:
    """Rows `low` to `low + columns` of each expert's slot: (E, C)."""
    return (experts.offsets_E[:, None] + low) + jnp.arange(columns)


def _ffn(product: Product, x_AD, slices: list[ExpertWeights], groups: Groups, sizes_E) -> jax.Array:
    """Sum over slices; each slice's weights are (E, C, D) and (E, C), the last bias (E, D)."""
    n, n_experts = x_AD.shape[0], sizes_E.shape[0]
    ranked_E = jnp.argsort(largest_first(sizes_E))
    computes_A = jnp.append(sizes_E > 0, False)[groups.expert_A]
    expert_A = jnp.minimum(groups.expert_A, n_experts - 1)
    y_AD = jnp.where(computes_A[:, None], slices[0].fc2_bias_ED[expert_A], 0).astype(jnp.float32)
    low = 0
    for weights in slices:
        columns = weights.fc1_bias_F.shape[1]
        count_E = jnp.where(sizes_E > low, groups.count_E, 0)[ranked_E]
        own_AC = low + jnp.arange(columns) < sizes_E[expert_A][:, None]
        h_AC = product(x_AD, weights.fc1_FD[ranked_E].transpose(0, 2, 1), count_E)
        h_AC = jax.nn.relu(h_AC + weights.fc1_bias_F[expert_A])
        own_AC &= (jnp.arange(n) < jnp.sum(count_E))[:, None]
        h_AC = jnp.where(own_AC, h_AC, 0).astype(x_AD.dtype)
        y_AD += product(h_AC, weights.fc2_FD[ranked_E], count_E)
        low += columns
    return y_AD.astype(x_AD.dtype)


def _slices(experts: LayerExperts, width: int) -> list[ExpertWeights]:
    """The weights of each slice of columns, as `_ffn` takes them."""
    weights, columns = experts.weights, slice_columns(experts.ffn_dims)

    def take(array: jax.Array, at: jax.Array) -> jax.Array:
        return array[jnp.minimum(at, array.shape[0] - 1)]

    row_E = experts.bias_row + jnp.arange(experts.sizes_E.shape[0])
    bias_ED = take(weights.fc2_bias_ED, row_E)[:, :width]
    slices = []
    for low in range(0, max(experts.ffn_dims), columns):
        at_EC = _rows(experts, low, columns)
        fc1_ECD = take(weights.fc1_FD, at_EC)[..., :width]
        fc1_bias_EC = take(weights.fc1_bias_F, at_EC)
        fc2_ECD = take(weights.fc2_FD, at_EC)[..., :width]
        slices.append(ExpertWeights(fc1_ECD, fc1_bias_EC, fc2_ECD, bias_ED))
    return slices


def forward(product: Product, x_AD: jax.Array, groups: Groups, experts: LayerExperts) -> jax.Array:
    """As `grouped_loop.forward`, but stores nothing: `backward` recomputes the hidden layer."""
    return _ffn(product, x_AD, _slices(experts, x_AD.shape[1]), groups, experts.sizes_E)


def backward(
    product: Product, x_AD, groups: Groups, experts: LayerExperts, dy_AD, dw: ExpertWeights
) -> tuple[jax.Array, ExpertWeights]:
    """As `grouped_loop.backward`."""
    d, rest = x_AD.shape[1], (groups, experts.sizes_E)
    _, pull = jax.vjp(lambda x, slices: _ffn(product, x, slices, *rest), x_AD, _slices(experts, d))
    dx_AD, d_slices = pull(dy_AD)
    columns = slice_columns(experts.ffn_dims)
    bias_E = experts.bias_row + jnp.arange(experts.sizes_E.shape[0])
    for i, part in enumerate(d_slices):
        own_EC = i * columns + jnp.arange(columns) < experts.sizes_E[:, None]
        n_rows = experts.weights.fc1_FD.shape[0]
        at_EC = jnp.where(own_EC, _rows(experts, i * columns, columns), n_rows)

        def add(array: Any, at: Any, update: jax.Array, *width: slice) -> jax.Array:
            return array.at[(at, *width)].add(update.astype(array.dtype), mode="drop")

        dw = ExpertWeights(
            add(dw.fc1_FD, at_EC, part.fc1_FD, slice(d)),
            add(dw.fc1_bias_F, at_EC, part.fc1_bias_F),
            add(dw.fc2_FD, at_EC, part.fc2_FD, slice(d)),
            add(dw.fc2_bias_ED, bias_E, part.fc2_bias_ED, slice(d)),
        )
    return dx_AD, dw
