"""The grouped FFN as ragged products: the backends of GPUs and TPUs.

A ragged product multiplies groups of rows by a matrix each. Experts are laid out from the largest
to the smallest, so that the rows that use a slice of the FFN's columns are the front rows: cost
follows the sizes as it follows the rows. Letters as in `grouped_loop`, K and N those of a product.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.ops.grouped_loop import slice_columns
from automoe_jax.ops.grouping import Active, ExpertWeights, Groups

# (lhs_AK, rhs_EKN, count_E) -> (A, N), fp32; rows past the last group give zeros.
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
BLOCK_ROWS = 128


def has_tokamax() -> bool:
    """Whether the library with the GPU kernel is installed."""
    return importlib.util.find_spec("tokamax") is not None


def native(lhs_AK: jax.Array, rhs_EKN: jax.Array, count_E: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot`: a kernel on TPUs, a dense product over all experts elsewhere."""
    return lax.ragged_dot(
        lhs_AK, rhs_EKN, count_E.astype(jnp.int32), preferred_element_type=jnp.float32
    )


def tokamax(lhs_AK: jax.Array, rhs_EKN: jax.Array, count_E: jax.Array) -> jax.Array:
    """The kernel of the tokamax library."""
    library = importlib.import_module("tokamax")

    y_AN = library.ragged_dot(
        lhs_AK, rhs_EKN, count_E.astype(jnp.int32), preferred_element_type=jnp.float32
    )
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
    y_BRN = jnp.einsum(
        "BRK,BKN->BRN", lhs_BRK, rhs_EKN[expert_B], preferred_element_type=jnp.float32
    )
    y_AN = jnp.zeros((n, rhs_EKN.shape[2]), jnp.float32)
    return y_AN.at[row_BR].set(y_BRN, mode="drop", unique_indices=False)


def largest_first(sizes_E: jax.Array) -> jax.Array:
    """Rank of each expert in the order that these backends need."""
    return jnp.argsort(jnp.argsort(-sizes_E, stable=True))


def _slot(array: jax.Array, active: Active, low: int, columns: int) -> jax.Array:
    """Rows `low` to `low + columns` of each expert: (E, C, ...), cut where the array ends."""
    at_EC = (active.offsets_E[:, None] + low) + jnp.arange(columns)
    return array[jnp.minimum(at_EC, array.shape[0] - 1)]


def _ffn(
    product: Product,
    x_AD: jax.Array,
    slices: list[ExpertWeights],
    groups: Groups,
    sizes_E: jax.Array,
    ranked_E: jax.Array,
) -> jax.Array:
    """Sum over slices; each slice's weights are (E, C, D) and (E, C), the last bias (E, D)."""
    n = x_AD.shape[0]
    n_experts = sizes_E.shape[0]
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


def _slices(
    weights: ExpertWeights, active: Active, sizes: tuple[int, ...], width: int
) -> list[ExpertWeights]:
    columns, _ = slice_columns(sizes)
    n_experts = active.sizes_E.shape[0]
    row_E = active.bias_row + jnp.arange(n_experts)
    bias_ED = weights.fc2_bias_ED[jnp.minimum(row_E, weights.fc2_bias_ED.shape[0] - 1)]
    return [
        ExpertWeights(
            _slot(weights.fc1_FD, active, low, columns)[..., :width],
            _slot(weights.fc1_bias_F, active, low, columns),
            _slot(weights.fc2_FD, active, low, columns)[..., :width],
            bias_ED[:, :width],
        )
        for low in range(0, max(sizes), columns)
    ]


def forward(
    product: Product,
    x_AD: jax.Array,
    groups: Groups,
    weights: ExpertWeights,
    active: Active,
    sizes: tuple[int, ...],
) -> jax.Array:
    """As `grouped_loop.forward`, without a buffer: `backward` computes the hidden layer again."""
    slices = _slices(weights, active, sizes, x_AD.shape[1])
    ranked_E = jnp.argsort(largest_first(active.sizes_E))
    return _ffn(product, x_AD, slices, groups, active.sizes_E, ranked_E)


def backward(
    product: Product,
    x_AD: jax.Array,
    groups: Groups,
    weights: ExpertWeights,
    active: Active,
    sizes: tuple[int, ...],
    dy_AD: jax.Array,
    dw: ExpertWeights,
) -> tuple[jax.Array, ExpertWeights]:
    """As `grouped_loop.backward`."""
    ranked_E = jnp.argsort(largest_first(active.sizes_E))

    def ffn(x_AD: jax.Array, slices: list[ExpertWeights]) -> jax.Array:
        return _ffn(product, x_AD, slices, groups, active.sizes_E, ranked_E)

    slices = _slices(weights, active, sizes, x_AD.shape[1])
    _, pull = jax.vjp(ffn, x_AD, slices)
    dx_AD, d_slices = pull(dy_AD)
    columns, _ = slice_columns(sizes)
    d = x_AD.shape[1]
    for i, part in enumerate(d_slices):
        at_EC = (active.offsets_E[:, None] + i * columns) + jnp.arange(columns)
        own_EC = i * columns + jnp.arange(columns) < active.sizes_E[:, None]
        at_EC = jnp.where(own_EC, at_EC, weights.fc1_FD.shape[0])
        bias_E = active.bias_row + jnp.arange(active.sizes_E.shape[0])

        def add(array: Any, at: Any, update: jax.Array, *width: slice) -> jax.Array:
            return array.at[(at, *width)].add(update.astype(array.dtype), mode="drop")

        dw = ExpertWeights(
            add(dw.fc1_FD, at_EC, part.fc1_FD, slice(d)),
            add(dw.fc1_bias_F, at_EC, part.fc1_bias_F),
            add(dw.fc2_FD, at_EC, part.fc2_FD, slice(d)),
            add(dw.fc2_bias_ED, bias_E, part.fc2_bias_ED, slice(d)),
        )
    return dx_AD, dw


def check_installed(backend: str, allowed: tuple[str, ...]):
    """Raises `ValueError` where the backend's library is missing."""
    if backend == "tokamax" and not has_tokamax():
        others = ", ".join(b for b in allowed if b != "tokamax")
        raise ValueError(f"backend tokamax needs the tokamax package; install it or use {others}")
