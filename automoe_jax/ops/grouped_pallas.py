"""The grouped FFN of TPUs: kernels that read and write the experts of a layer where they lie.

The experts of all layers are one array. A kernel is told where in it a layer's experts are, so that
nothing is cut out of it, transposed or added to it: a TPU waits for its memory, not for products.
Every expert is computed at the size of its slot, with zeros beyond its own size.

Rows are sorted by the rank of their expert, as in `grouped_ragged`, whose letters these are; G
experts of all layers, P rows with those that fill the last tile, V visits of a tile of rows by an
expert, M rows and C columns of a tile.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from automoe_jax.ops.grouped_ragged import Rows, largest_first
from automoe_jax.ops.grouping import ExpertWeights, Groups, LayerExperts, add_slice
from automoe_jax.system.platforms import platform

_LANES = 128  # of a vector: tiles of columns are whole ones, or all columns
_MOST_ROWS = 256  # of a tile: few of them are of another expert
_MOST_COLUMNS = 1024  # of a tile of gradients
_MOST_BYTES = 14 << 20  # of a kernel's tiles; a core gives it 16 MiB unless asked for more
_ACROSS = (((1,), (1,)), ((), ()))  # rows by rows
_ALONG = (((1,), (0,)), ((), ()))  # rows by columns
_DOWN = (((0,), (0,)), ((), ()))  # columns by columns
# In fp32: (sums_MC, rank, column_MC, sizes, tile of what is beside it) -> (M, C).
_Finish = Callable[..., jax.Array]


class _Told(NamedTuple):
    """What kernels know before they start; arrays, or in a kernel references to them."""

    start_E: Any  # first row of each expert by rank, and the end: one more
    expert_V: Any  # rank
    tile_V: Any
    index_E: Any  # of each rank's expert among all
    size_E: Any  # by rank

    def own(self, visit: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """True for the rows of a tile that are of the visiting expert."""
        rank = self.expert_V[visit]
        row = self.tile_V[visit] * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
        return (row >= self.start_E[rank]) & (row < self.start_E[rank + 1])


class _Visits(NamedTuple):
    """Which tiles of rows experts visit, in the order of a kernel's grid."""

    told: _Told
    count: jax.Array
    n_experts: int
    tile_rows: int

    def run(
        self,
        kernel: Callable[..., None],
        tiles: tuple[int, ...],
        inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
        output: tuple[jax.ShapeDtypeStruct, pl.BlockSpec],
        flops: int,
        n_bytes: int,
        scratch: Sequence[Any] = (),
        overwritten: int | None = None,
    ) -> jax.Array:
        """Runs `kernel(told, *inputs, output, *scratch)` for each tile of columns and visit.

        Functions of block specs take the tile's indices, the visit and what is told. `flops` and
        `n_bytes` are what it computes and moves. The output takes the buffer of the input of number
        `overwritten`, and what the kernel does not write stays as it was.
        """
        n_told = len(self.told)

        def with_told(*refs: Any):
            kernel(_Told(*refs[:n_told]), *refs[n_told:])

        def placed(spec: pl.BlockSpec) -> pl.BlockSpec:
            where = spec.index_map
            if where is None:
                return spec
            return pl.BlockSpec(
                spec.block_shape, lambda *at: where(*at[:-n_told], _Told(*at[-n_told:]))
            )

        shape, spec = output
        arrays, specs = zip(*inputs, strict=True)
        order: Any = ("parallel", *["arbitrary"] * len(tiles))
        call = pl.pallas_call(
            with_told,
            out_shape=shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=n_told, grid=(*tiles, self.count),
                in_specs=[placed(x) for x in specs], out_specs=placed(spec),
                scratch_shapes=scratch,
            ),
            input_output_aliases={} if overwritten is None else {n_told + overwritten: 0},
            compiler_params=pltpu.CompilerParams(dimension_semantics=order),
            cost_estimate=pl.CostEstimate(
                flops=flops, bytes_accessed=n_bytes, transcendentals=0
            ),
            interpret=platform() != "tpu",  # slow, for tests
        )  # fmt: skip
        return call(*self.told, *arrays)


class _Beside(NamedTuple):
    """What a product is finished with: (G, 1, N) of experts, else (P, N) of rows."""

    array: jax.Array
    of_experts: bool


def _product(
    visits: _Visits,
    lhs_PK: jax.Array,
    weights_GFD: jax.Array,
    n: int,
    along: bool,
    finish: _Finish | None = None,
    beside: _Beside | None = None,
) -> jax.Array:
    """Rows times their expert's matrix, `along` its columns F, else D: (P, N), N = n.

    Rows that no expert visits are not written. `finish` is applied to sums, see `_Finish`.
    """
    (n_rows, k), m, size = lhs_PK.shape, visits.tile_rows, lhs_PK.dtype.itemsize
    columns = _column_tile(n, m, k, size, size + size * bool(beside))

    def kernel(told: _Told, lhs, matrix, *rest):
        *more, out = rest
        visit = pl.program_id(1)
        y_MC = lax.dot_general(
            lhs[...], matrix[...], _ALONG if along else _ACROSS, preferred_element_type=jnp.float32
        )
        if finish is not None:
            column_MC = pl.program_id(0) * columns + lax.broadcasted_iota(jnp.int32, y_MC.shape, 1)
            y_MC = finish(y_MC, told.expert_V[visit], column_MC, told.size_E, *more)
        kept = out[...].astype(jnp.float32)  # of the experts that visited it before
        out[...] = jnp.where(told.own(visit, y_MC.shape), y_MC, kept).astype(out.dtype)

    def matrix(c, v, told):
        at = told.index_E[told.expert_V[v]]
        return (at, 0, c) if along else (at, c, 0)

    def of_rows(c, v, told):
        return told.tile_V[v], c

    inputs = [
        (lhs_PK, pl.BlockSpec((m, k), lambda c, v, told: (told.tile_V[v], 0))),
        (weights_GFD, pl.BlockSpec((None, k, columns) if along else (None, columns, k), matrix)),
    ]
    n_bytes = size * (n_rows * (k * (n // columns) + n) + visits.n_experts * k * n)
    if beside is not None:
        spec = pl.BlockSpec((m, columns), of_rows)
        if beside.of_experts:
            spec = pl.BlockSpec(
                (None, 1, columns), lambda c, v, told: (told.index_E[told.expert_V[v]], 0, c)
            )
        inputs.append((beside.array, spec))
        rows = visits.n_experts if beside.of_experts else n_rows
        n_bytes += beside.array.dtype.itemsize * rows * n
    output = jax.ShapeDtypeStruct((n_rows, n), lhs_PK.dtype), pl.BlockSpec((m, columns), of_rows)
    return visits.run(kernel, (n // columns,), inputs, output, 2 * n_rows * k * n, n_bytes)


def _gradient(
    visits: _Visits, lhs_PF: jax.Array, rhs_PD: jax.Array, into_GFD: jax.Array
) -> jax.Array:
    """`into_GFD`, fp32, with lhs^T rhs of the rows of each visiting expert written to its place."""
    (n_rows, slot), (_, width), m = lhs_PF.shape, rhs_PD.shape, visits.tile_rows
    tile_f, tile_d = _divisor(slot, _MOST_COLUMNS), _divisor(width, _MOST_COLUMNS)

    def kernel(told: _Told, lhs, rhs, into, out, sum_FD):
        del into  # `out` has its buffer
        visit, last = pl.program_id(2), pl.num_programs(2) - 1
        rank = told.expert_V[visit]

        @pl.when((visit == 0) | (told.expert_V[jnp.maximum(visit - 1, 0)] != rank))
        def _():
            sum_FD[...] = jnp.zeros_like(sum_FD)

        def own(block):
            rows = block[...].astype(jnp.float32)
            return jnp.where(told.own(visit, rows.shape), rows, 0).astype(block.dtype)

        sum_FD[...] += lax.dot_general(
            own(lhs), own(rhs), _DOWN, preferred_element_type=jnp.float32
        )

        @pl.when((visit == last) | (told.expert_V[jnp.minimum(visit + 1, last)] != rank))
        def _():
            out[...] = sum_FD[...]

    def matrix(f, d, v, told):
        return told.index_E[told.expert_V[v]], f, d

    inputs = [
        (lhs_PF, pl.BlockSpec((m, tile_f), lambda f, d, v, told: (told.tile_V[v], f))),
        (rhs_PD, pl.BlockSpec((m, tile_d), lambda f, d, v, told: (told.tile_V[v], d))),
        (into_GFD, pl.BlockSpec(memory_space=pl.ANY)),
    ]
    output = (
        jax.ShapeDtypeStruct(into_GFD.shape, jnp.float32),
        pl.BlockSpec((None, tile_f, tile_d), matrix),
    )
    tiles = slot // tile_f, width // tile_d
    n_bytes = n_rows * lhs_PF.dtype.itemsize * (slot * tiles[1] + width * tiles[0])
    n_bytes += 4 * visits.n_experts * slot * width
    scratch = [pltpu.VMEM((tile_f, tile_d), jnp.float32)]
    flops = 2 * n_rows * slot * width
    return visits.run(kernel, tiles, inputs, output, flops, n_bytes, scratch, overwritten=2)


def _row_tile(n_rows: int, slot: int, itemsize: int) -> int:
    """Rows of a tile: as many as leave room for the hidden layer's."""
    most = min(_MOST_ROWS, max(_MOST_BYTES // (8 * slot * itemsize) // 16 * 16, 16))
    return min(most, -(-n_rows // 16) * 16)


def _divisor(n: int, most: int) -> int:
    """The largest part of n columns of at most so many that whole vectors fill; or all of them."""
    parts = [c for c in range(_LANES, min(n, most) + 1, _LANES) if n % c == 0]
    return max(parts, default=n)


def _column_tile(n: int, rows: int, k: int, itemsize: int, beside: int) -> int:
    """Columns of a tile of the product of (rows, k) by (k, n), of `itemsize` bytes each.

    `beside` are the bytes of the result and of what it is computed with. All but the sum are there
    twice: one is computed while the next is fetched.
    """
    fixed, each = 2 * rows * k * itemsize, 2 * k * itemsize + rows * (2 * beside + 8)
    return _divisor(n, max((_MOST_BYTES - fixed) // each, _LANES))


class _Layer:
    """The products of a layer's experts. Rows of (P, ...) that no expert has are undefined."""

    def __init__(self, x_AD: jax.Array, groups: Groups, experts: LayerExperts, *, of_all: bool):
        """`of_all`: experts without rows visit a tile, too, as `gradient` needs it."""
        weights, self._slot = experts.weights, max(experts.ffn_dims)
        self._n_rows, self._given = x_AD.shape
        # Whole vectors of a row, or all of it.
        self._most = weights.fc1_FD.shape[1]
        self._width = self._most if self._given % _LANES else self._given
        tile = _row_tile(self._n_rows, self._slot, x_AD.dtype.itemsize)
        self._padded = -(-self._n_rows // tile) * tile
        rank_E = largest_first(experts.sizes_E)
        self._rows = Rows(groups, experts.sizes_E, rank_E)
        self._visits = self._planned(experts, jnp.argsort(rank_E), tile, of_all)
        self._fc1_GFD, self._fc2_GFD = map(self.of_experts, (weights.fc1_FD, weights.fc2_FD))
        self._fc1_bias = _Beside(weights.fc1_bias_F.reshape(-1, 1, self._slot), of_experts=True)
        self._fc2_bias = _Beside(weights.fc2_bias_ED[:, None], of_experts=True)

    def _planned(
        self, experts: LayerExperts, ranked_E: jax.Array, tile: int, of_all: bool
    ) -> _Visits:
        """Which tiles of so many rows the experts visit: those with rows, or all of the layer."""
        count_E = self._rows.counts(0).astype(jnp.int32)
        n_experts = count_E.shape[0]
        # Experts that are not the layer's have the last ranks.
        n_own: Any = n_experts if experts.n_own is None else experts.n_own
        (start_E, expert_V, tile_V), count = make_group_metadata(
            group_sizes=count_E, m=self._padded, tm=tile, start_group=jnp.int32(0),
            num_nonzero_groups=n_own, visit_empty_groups=of_all,
        )  # fmt: skip
        index_E = (experts.bias_row + ranked_E).astype(jnp.int32)
        size_E = experts.sizes_E[ranked_E].astype(jnp.int32)
        told = _Told(start_E, expert_V, tile_V, index_E, size_E)
        return _Visits(told, count, n_experts, tile)

    def of_experts(self, array_FD: jax.Array) -> jax.Array:
        """(G, F, D) of the rows of all experts."""
        return array_FD.reshape(-1, self._slot, self._most)

    def padded(self, rows_AD: jax.Array) -> jax.Array:
        """(P, D) with zeros at the ends, to whole tiles and vectors."""
        more = self._padded - self._n_rows, self._width - self._given
        return jnp.pad(rows_AD, [(0, n) for n in more])

    def cut(self, rows_PD: jax.Array) -> jax.Array:
        """(A, D) without what `padded` adds; zeros for rows of no expert."""
        return self._of_own(rows_PD)[: self._n_rows, : self._given]

    def _of_own(self, rows_PN: jax.Array) -> jax.Array:
        own_P = jnp.arange(self._padded) < self._visits.told.start_E[-1]
        return jnp.where(own_P[:, None], rows_PN, 0)

    def hidden(self, x_PD: jax.Array) -> jax.Array:
        """relu(fc1(x)), (P, F), zero beyond the size of the row's expert."""

        def finish(y_MC, rank, column_MC, sizes, bias_1C):
            y_MC = jnp.maximum(y_MC + bias_1C[...], 0)
            return jnp.where(column_MC < sizes[rank], y_MC, 0)

        return self._up(x_PD, self._fc1_GFD, finish, self._fc1_bias)

    def d_hidden(self, dy_PD: jax.Array, h_PF: jax.Array) -> jax.Array:
        """The gradient of fc1's output, (P, F), from that of fc2's and `hidden`."""

        def finish(y_MC, rank, column_MC, sizes, h_MC):
            del rank, column_MC, sizes
            return jnp.where(h_MC[...].astype(jnp.float32) > 0, y_MC, 0)

        return self._up(dy_PD, self._fc2_GFD, finish, _Beside(h_PF, of_experts=False))

    def fc2(self, h_PF: jax.Array) -> jax.Array:
        """(P, D)."""

        def finish(y_MC, rank, column_MC, sizes, bias_1C):
            del rank, column_MC, sizes
            return y_MC + bias_1C[...]

        return self._down(h_PF, self._fc2_GFD, finish, self._fc2_bias)

    def d_input(self, dh_PF: jax.Array) -> jax.Array:
        """The gradient of x, (P, D), from that of fc1's output."""
        return self._down(dh_PF, self._fc1_GFD)

    def _up(self, rows_PD: jax.Array, weights_GFD: jax.Array, *finish: Any) -> jax.Array:
        return _product(self._visits, rows_PD, weights_GFD, self._slot, False, *finish)

    def _down(self, rows_PF: jax.Array, weights_GFD: jax.Array, *finish: Any) -> jax.Array:
        return _product(self._visits, rows_PF, weights_GFD, self._width, True, *finish)

    def gradient(self, lhs_PF: jax.Array, rhs_PD: jax.Array, into_FD: jax.Array) -> jax.Array:
        """`into_FD` with lhs^T rhs of each of the layer's experts, written over all its rows."""
        rhs_PD = jnp.pad(rhs_PD, ((0, 0), (0, self._most - self._width)))
        into_GFD = self.of_experts(into_FD)
        written = _gradient(self._visits, lhs_PF, rhs_PD, into_GFD)
        return written.reshape(into_FD.shape)

    def with_biases(self, dw: ExpertWeights, dh_PF: jax.Array, dy_AD: jax.Array) -> ExpertWeights:
        """`dw` with the gradients of both biases."""
        d1_EF = self._rows.sums(self._of_own(dh_PF)[: self._n_rows])
        d2_ED = self._rows.sums(dy_AD)
        fc1_bias_F, fc2_bias_ED = dw.fc1_bias_F, dw.fc2_bias_ED
        for rank in range(len(d1_EF)):
            at = self._visits.told.index_E[rank]
            fc1_bias_F = add_slice(fc1_bias_F, d1_EF[rank], (at * self._slot,))
            fc2_bias_ED = add_slice(fc2_bias_ED, d2_ED[rank][None], (at, 0))
        return dw._replace(fc1_bias_F=fc1_bias_F, fc2_bias_ED=fc2_bias_ED)


def forward(x_AD: jax.Array, groups: Groups, experts: LayerExperts) -> jax.Array:
    """As `grouped_ragged.forward`, of experts with slots of one size."""
    layer = _Layer(x_AD, groups, experts, of_all=False)
    return layer.cut(layer.fc2(layer.hidden(layer.padded(x_AD))))


def backward(
    x_AD: jax.Array, groups: Groups, experts: LayerExperts, dy_AD: jax.Array, dw: ExpertWeights
) -> tuple[jax.Array, ExpertWeights]:
    """As `grouped_ragged.backward`, of experts with slots of one size.

    The matrices of `dw` may be undefined at this layer's experts: all of it is written there.
    """
    layer = _Layer(x_AD, groups, experts, of_all=True)
    x_PD, dy_PD = layer.padded(x_AD), layer.padded(dy_AD)
    h_PF = layer.hidden(x_PD)
    dh_PF = layer.d_hidden(dy_PD, h_PF)
    dw = layer.with_biases(dw, dh_PF, dy_AD)
    fc1_FD = layer.gradient(dh_PF, x_PD, dw.fc1_FD)
    fc2_FD = layer.gradient(h_PF, dy_PD, dw.fc2_FD)
    return layer.cut(layer.d_input(dh_PF)), dw._replace(fc1_FD=fc1_FD, fc2_FD=fc2_FD)
