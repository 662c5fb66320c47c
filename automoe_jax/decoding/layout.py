"""Describes the arrays of `weights.safetensors`: names, shapes and dtypes.

Packing produces them (`decoding.weights`), the size limit of a search sums their bytes, and loading
checks a file against them. A linear map (K, N) is stored in P panels of `PANEL` columns:
`NAME.kernel` is (P, K, PANEL) in fp32 or (P, ceil(K / 4), PANEL, 4) in int8; an int8 kernel has
`NAME.scale` and `NAME.total`, the sums of its columns, for whole panels; `NAME.bias` is (N,).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from automoe_jax.architecture.evolved import cell_layout
from automoe_jax.architecture.subnet import DecoderLayer, LayerSpec, Subnet

# Columns of a panel; PANEL in native/kernels.c.
PANEL = 32
# A lexicon's target words of each source word, -1 for none, and the words that are always allowed.
LISTED, COMMON = "shortlist.words", "shortlist.common"

# Linear maps of attention: module, and which of its matrices are joined into one.
ATTENTION = {
    "qkv": ("self_attention", ("query", "key", "value")),
    "self_out": ("self_attention", ("out",)),
    "cross_q": ("cross_attention", ("query",)),
    "cross_kv": ("cross_attention", ("key", "value")),
    "cross_out": ("cross_attention", ("out",)),
}

FLOAT, INT8, INT32 = np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.int32)


class Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Describes the arrays of an export; fields as in `SearchSpace` and `ExportConfig`."""

    subnet: Subnet
    vocab_sizes: tuple[int, int]
    share_embeddings: str
    quantize: str = "none"
    shortlist: int = 0
    n_common: int = 0  # words that are always allowed; counted from the text

    def arrays(self) -> Arrays:
        """Every array of the export, by name."""
        parts = self._parts()
        return {prefix + name: a for prefix, arrays, _ in parts for name, a in arrays.items()}

    def nbytes(self) -> int:
        """Bytes of `weights.safetensors` without its header."""
        return sum(nbytes for *_, nbytes in self._parts())

    def mismatch(self, weights: Mapping[str, np.ndarray]) -> str:
        """The first array that is not as described, in words; "" where all are."""
        expected = self.arrays()
        if missing := expected.keys() - weights.keys():
            return f"{min(missing)} is missing"
        if unknown := weights.keys() - expected.keys():
            return f"{min(unknown)} is not an array of this subnet"
        for name, array in expected.items():
            found = Array(weights[name].shape, weights[name].dtype)
            if found != array:
                return f"{name} is {found.dtype} {found.shape}, not {array.dtype} {array.shape}"
        return ""

    def _parts(self) -> Iterator[tuple[str, Arrays, int]]:
        """(prefix, arrays, bytes) of the tables and of each layer."""
        subnet, int8 = self.subnet, self.quantize == "int8"
        yield "", *_sized(self._tables(int8=int8))
        for side, stack in (("encoder", subnet.encoder), ("decoder", subnet.decoder)):
            dims = (stack.embed_dim, subnet.encoder.embed_dim, subnet.qkv_dim)
            for i, layer in enumerate(stack.layers):
                of = _evolved_cell if subnet.cell == "evolved" else _layer
                yield f"{side}.{i}.", *of(layer, *dims, int8=int8)
            if subnet.cell == "evolved":
                yield f"{side}.", *_sized(_norms({"norm": stack.embed_dim}))

    def _tables(self, *, int8: bool) -> Arrays:
        """Embeddings, output layer and shortlist."""
        source, target = self.vocab_sizes
        e, d = self.subnet.encoder.embed_dim, self.subnet.decoder.embed_dim
        if self.share_embeddings == "all":
            tables = {"embedding": (source, max(e, d))} | ({"output": (target, d)} if d < e else {})
        else:
            tables = {"source_embedding": (source, e), "target_embedding": (target, d)}
            if self.share_embeddings == "none":
                tables["output"] = (target, d)
        arrays = {name: Array(shape, FLOAT) for name, shape in tables.items()}
        if self.shortlist:
            arrays[LISTED] = Array((source, self.shortlist), INT32)
            arrays[COMMON] = Array((self.n_common,), INT32)
        elif int8:
            arrays.pop("output", None)
            arrays |= _linear("output", d, target, int8=True, bias=False)
        else:
            arrays[output_name(arrays)] = _linear("", d, target, int8=False)[".kernel"]
        return arrays


def output_name(names: Iterable[str]) -> str:
    """Name of the fp32 table that is the output layer."""
    return next(n for n in ("output", "target_embedding", "embedding") if n in names)


def _linear(name: str, inputs: int, outputs: int, *, int8: bool, bias: bool = True) -> Arrays:
    panels = -(-outputs // PANEL)
    arrays = {f"{name}.kernel": Array((panels, inputs, PANEL), FLOAT)}
    if int8:
        arrays[f"{name}.kernel"] = Array((panels, -(-inputs // 4), PANEL, 4), INT8)
        arrays[f"{name}.scale"] = Array((panels * PANEL,), FLOAT)
        arrays[f"{name}.total"] = Array((panels * PANEL,), INT32)
    if bias:
        arrays[f"{name}.bias"] = Array((outputs,), FLOAT)
    return arrays


def _norms(dims: Mapping[str, int]) -> Arrays:
    return {
        f"{name}.{leaf}": Array((dim,), FLOAT)
        for name, dim in dims.items()
        for leaf in ("scale", "bias")
    }


def _sized(arrays: Arrays) -> tuple[Arrays, int]:
    return arrays, sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays.values())


# A search counts the bytes of thousands of subnets; many of their layers are equal.
@functools.lru_cache(1 << 14)
def _layer(
    layer: LayerSpec, dim: int, encoder_dim: int, qkv_dim: int, *, int8: bool
) -> tuple[Arrays, int]:
    linears = {"qkv": (dim, 3 * qkv_dim), "self_out": (qkv_dim, dim)}
    norms = {"self_attention_norm": dim, "experts_norm": dim}
    if isinstance(layer, DecoderLayer):
        cross = {"cross_q": (dim, qkv_dim), "cross_kv": (encoder_dim, 2 * qkv_dim)}
        linears |= cross | {"cross_out": (qkv_dim, dim)}
        norms["cross_attention_norm"] = dim
    for e, size in enumerate(layer.experts):
        if size:
            linears[f"expert_{e}.fc1"] = (dim, size)
            linears[f"expert_{e}.fc2"] = (size, dim)
    arrays: Arrays = {}
    for name, (inputs, outputs) in linears.items():
        arrays |= _linear(name, inputs, outputs, int8=int8)
    arrays |= _norms(norms)
    if (n := len(layer.experts)) > 1:
        arrays |= {"router.kernel": Array((dim, n), FLOAT), "router.bias": Array((n,), FLOAT)}
    return _sized(arrays)


def _evolved_cell(
    layer: LayerSpec, dim: int, encoder_dim: int, qkv_dim: int, *, int8: bool
) -> tuple[Arrays, int]:
    maps, depthwise, norms = cell_layout(layer, dim, encoder_dim, qkv_dim)
    arrays = _norms(norms)
    for name, (inputs, outputs) in maps.items():
        arrays |= _linear(name, inputs, outputs, int8=int8)
    arrays |= {f"{name}.depthwise": Array(shape, FLOAT) for name, shape in depthwise.items()}
    return _sized(arrays)
