"""The grouped FFN as ragged products: the backends of GPUs and TPUs.

A ragged product multiplies each group of rows by its own matrix. Experts are sorted from the
largest to the smallest, so the rows that use a slice of the FFN's columns come first and the cost
follows the experts' sizes. Letters as in `grouped_loop`; K and N are those of a product.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.ops.grouped_loop import slice_columns
from automoe_jax.ops.grouping import ExpertWeights, Groups, LayerExperts, add_slice

# (lhs_AK, rhs_EKN, count_E) -> (A, N), fp32; rows past the last group give zeros.
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
BLOCK_ROWS = 128
# Of a TPU's kernel: few rows of a tile are of another group, and tiles of results fill a tenth of
# the memory of a core.
_TILE_ROWS, _TILE_COLUMNS = 256, 768


def has_tokamax() -> bool:
    """True if the library with the GPU kernel is installed."""
    return importlib.util.find_spec("tokamax") is not None


def native(lhs_AK: jax.Array, rhs_EKN: jax.Array, count_E: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot`: a kernel on TPUs, a dense product over all experts elsewhere.

    On TPUs, too, where rows are not a multiple of eight: they are made one.
    """
    n, count_E = lhs_AK.shape[0], count_E.astype(jnp.int32)
    lhs_AK = _whole_tiles(lhs_AK, 8)
    return lax.ragged_dot(lhs_AK, rhs_EKN, count_E, preferred_element_type=jnp.float32)[:n]


def _whole_tiles(rows_AK: jax.Array, size: int) -> jax.Array:
    """With zeros at the end, past the last group, up to a multiple of `size` rows."""
    return jnp.pad(rows_AK, ((0, -rows_AK.shape[0] % size), (0, 0)))


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


def contract_native(a_AK: jax.Array, b_AN: jax.Array, count_E: jax.Array) -> jax.Array:
    """As `native`, but on TPUs by the kernel of JAX's library.

    XLA computes this product for every expert over the rows of all of them.
    """
    return lax.platform_dependent(
        a_AK, b_AN, count_E, tpu=contract_megablox, default=_contract_general
    )


def contract_megablox(
    a_AK: jax.Array, b_AN: jax.Array, count_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The kernel of JAX's library; `interpret` runs it on any platform, slowly."""
    tgmm = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm").tgmm
    (n, k), columns = a_AK.shape, b_AN.shape[1]
    tiles = min(_TILE_ROWS, -(-n // 16) * 16), min(_TILE_COLUMNS, k), min(_TILE_COLUMNS, columns)
    a_AK, b_AN = (_whole_tiles(x, tiles[0]) for x in (a_AK, b_AN))
    counts = count_E.astype(jnp.int32)
    return tgmm(a_AK.T, b_AN, counts, jnp.float32, tiles, interpret=interpret)


# Each group's rows of one matrix times those of another.
_CONTRACTION = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def _contract_general(a_AK: jax.Array, b_AN: jax.Array, count_E: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(
        a_AK, b_AN, count_E.astype(jnp.int32), _CONTRACTION, preferred_element_type=jnp.float32
    )


def contract_tokamax(a_AK: jax.Array, b_AN: jax.Array, count_E: jax.Array) -> jax.Array:
    """As `tokamax`, whose kernels take operands of one dtype.

    Not by the gradient of its product, which has one operand in fp32 and tries one kernel alone.
    """
    dot = importlib.import_module("tokamax").ragged_dot_general
    dw_EKN = dot(
        a_AK, b_AN.astype(a_AK.dtype), count_E.astype(jnp.int32), _CONTRACTION,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jnp.where(count_E[:, None, None] > 0, dw_EKN, 0)


def contract_blocked(a_AK: jax.Array, b_AN: jax.Array, count_E: jax.Array) -> jax.Array:
    """As `blocked`: the gradient of its product by its matrices."""
    like = jnp.zeros((count_E.shape[0], a_AK.shape[1], b_AN.shape[1]), a_AK.dtype)
    _, pull = jax.vjp(lambda rhs_EKN: blocked(a_AK, rhs_EKN, count_E), like)
    return pull(b_AN.astype(jnp.float32))[0].astype(jnp.float32)


class Kernel(NamedTuple):
    """Ragged products, and how the columns of experts are given to them."""

    product: Product
    # (a_AK, b_AN, count_E) -> (E, K, N), fp32: the sum over each group's rows of their products.
    contract: Product
    # Whether experts are computed slice by slice, each for the experts that are so large, or all of
    # them at the largest size. A TPU waits for memory, not for products: compiled for v5e, the step
    # of the paper's space moves a seventh less in one piece, and compiles faster.
    sliced: bool


KERNELS = {
    "ragged_dot": Kernel(native, contract_native, sliced=False),
    "tokamax": Kernel(tokamax, contract_tokamax, sliced=True),
    "blocked": Kernel(blocked, contract_blocked, sliced=True),
}


def largest_first(sizes_E: jax.Array) -> jax.Array:
    """Rank of each expert by size, the largest first."""
    return jnp.argsort(jnp.argsort(-sizes_E, stable=True))


class Rows:
    """The rows of a layer, sorted by their experts' rank, and which columns are theirs."""

    def __init__(self, groups: Groups, sizes_E: jax.Array, rank_E: jax.Array):
        n_experts = sizes_E.shape[0]
        self._sizes_E, self._count_E = sizes_E, groups.count_E
        self._ranked_E = jnp.argsort(rank_E)
        expert_A = jnp.minimum(groups.expert_A, n_experts - 1)
        self._size_A = jnp.where(groups.expert_A < n_experts, sizes_E[expert_A], 0)
        computes_A = self._size_A > 0
        own_AE = rank_E[expert_A][:, None] == jnp.arange(n_experts)
        # A product with it spreads rows of experts over their tokens, and sums them again: a
        # gather of them would be written to memory.
        self._own_AE = (own_AE & computes_A[:, None]).astype(jnp.float32)

    def counts(self, low: int) -> jax.Array:
        """Rows of each expert, by rank, that is larger than `low`."""
        return jnp.where(self._sizes_E > low, self._count_E, 0)[self._ranked_E]

    def own(self, low: int, columns: int) -> jax.Array:
        """(A, C): true for the active columns of each row's expert in a slice."""
        return low + jnp.arange(columns) < self._size_A[:, None]

    def spread(self, of_experts: jax.Array) -> jax.Array:
        """(A, ...) of (E, ...) by rank; zeros for rows that no expert computes."""
        return jnp.dot(self._own_AE, of_experts, precision=lax.Precision.HIGHEST)

    def sums(self, of_rows: jax.Array) -> jax.Array:
        """(E, ...) by rank, of (A, ...)."""
        rows = of_rows.astype(jnp.float32)
        return jnp.dot(self._own_AE.T, rows, precision=lax.Precision.HIGHEST)


def _hidden(kernel: Kernel, x_AD, weights: ExpertWeights, rows: Rows, low: int) -> jax.Array:
    """relu(fc1(x)) of a slice, of the dtype of x; zero beyond the active columns."""
    h_AC = kernel.product(x_AD, weights.fc1_FD.transpose(0, 2, 1), rows.counts(low))
    h_AC = jax.nn.relu(h_AC + rows.spread(weights.fc1_bias_F))
    return jnp.where(rows.own(low, h_AC.shape[1]), h_AC, 0).astype(x_AD.dtype)


class _Slices:
    """Where the slices of each expert's columns lie among the weights; experts by rank.

    An expert's rows lie one after the other: a slice of them is read and written as one piece.
    """

    def __init__(self, experts: LayerExperts, kernel: Kernel):
        self._experts = experts
        self.rank_E = largest_first(experts.sizes_E)
        self._ranked_E = jnp.argsort(self.rank_E)
        slot = max(experts.ffn_dims)
        columns = slice_columns(experts.ffn_dims) if kernel.sliced else slot
        self.ranges = [(low, min(columns, slot - low)) for low in range(0, slot, columns)]

    def _at(self, low: int) -> list[tuple[Any, Any]]:
        """First row and bias row of each expert in a slice."""
        experts = self._experts
        ranked = [self._ranked_E[i] for i in range(len(experts.sizes_E))]
        return [(experts.offsets_E[e] + low, experts.bias_row + e) for e in ranked]

    def read(self, width: int) -> list[ExpertWeights]:
        """The weights of each slice: (E, C, D) and (E, C), the last bias (E, D)."""
        return [self._read(low, columns, width) for low, columns in self.ranges]

    def _read(self, low: int, columns: int, width: int) -> ExpertWeights:
        weights, at = self._experts.weights, self._at(low)

        def rows(array: jax.Array) -> jax.Array:
            shape = (columns, width)[: array.ndim]
            zeros = (0,) * (array.ndim - 1)
            return jnp.stack([lax.dynamic_slice(array, (row, *zeros), shape) for row, _ in at])

        bias = [lax.dynamic_slice(weights.fc2_bias_ED, (row, 0), (1, width))[0] for _, row in at]
        return ExpertWeights(
            rows(weights.fc1_FD), rows(weights.fc1_bias_F), rows(weights.fc2_FD), jnp.stack(bias)
        )

    def add(self, dw: ExpertWeights, nth: int, part: ExpertWeights) -> ExpertWeights:
        """`dw` with the gradients of a slice."""
        low, columns = self.ranges[nth]
        for i, (row, bias_row) in enumerate(self._at(low)):
            # Zero beyond the expert's size, where a neighbour's rows may be.
            size = self._experts.sizes_E[self._ranked_E[i]]
            own_C = low + jnp.arange(columns) < size
            one = jax.tree.map(lambda x, i=i: x[i], part)
            dw = ExpertWeights(
                add_slice(dw.fc1_FD, jnp.where(own_C[:, None], one.fc1_FD, 0), (row, 0)),
                add_slice(dw.fc1_bias_F, jnp.where(own_C, one.fc1_bias_F, 0), (row,)),
                add_slice(dw.fc2_FD, jnp.where(own_C[:, None], one.fc2_FD, 0), (row, 0)),
                add_slice(dw.fc2_bias_ED, one.fc2_bias_ED[None], (bias_row, 0)),
            )
        return dw


def forward(kernel: Kernel, x_AD, groups: Groups, experts: LayerExperts) -> jax.Array:
    """As `grouped_loop.forward`, but stores nothing: `backward` recomputes the hidden layer.

    Every expert has at least `max(experts.ffn_dims)` rows from its first one on.
    """
    slices = _Slices(experts, kernel)
    rows = Rows(groups, experts.sizes_E, slices.rank_E)
    y_AD = jnp.zeros(x_AD.shape, jnp.float32)
    for (low, _), weights in zip(slices.ranges, slices.read(x_AD.shape[1]), strict=True):
        if not low:
            y_AD += rows.spread(weights.fc2_bias_ED)
        h_AC = _hidden(kernel, x_AD, weights, rows, low)
        y_AD += kernel.product(h_AC, weights.fc2_FD, rows.counts(low))
    return y_AD.astype(x_AD.dtype)


def backward(
    kernel: Kernel, x_AD, groups: Groups, experts: LayerExperts, dy_AD, dw: ExpertWeights
) -> tuple[jax.Array, ExpertWeights]:
    """As `grouped_loop.backward`; rows of weights as in `forward`."""
    slices = _Slices(experts, kernel)
    rows = Rows(groups, experts.sizes_E, slices.rank_E)
    dx_AD = jnp.zeros(x_AD.shape, jnp.float32)
    d_bias_ED = rows.sums(dy_AD)
    for nth, weights in enumerate(slices.read(x_AD.shape[1])):
        low, _ = slices.ranges[nth]
        count_E = rows.counts(low)
        h_AC = _hidden(kernel, x_AD, weights, rows, low)
        dh_AC = kernel.product(dy_AD, weights.fc2_FD.transpose(0, 2, 1), count_E)
        dh_AC = jnp.where(h_AC > 0, dh_AC, 0)
        dh_in = dh_AC.astype(x_AD.dtype)
        dx_AD += kernel.product(dh_in, weights.fc1_FD, count_E)
        part = ExpertWeights(
            kernel.contract(dh_in, x_AD, count_E),
            rows.sums(dh_AC),
            kernel.contract(h_AC, dy_AD, count_E),
            d_bias_ED if not nth else jnp.zeros_like(d_bias_ED),
        )
        dw = slices.add(dw, nth, part)
    return dx_AD.astype(x_AD.dtype), dw
