"""Conversion between the weights of layers and a supernet's stacked weights.

Weights of the same shape in all layers get a leading layer axis. The experts of all layers lie one
after the other in `fc1`, `fc1_bias`, `fc2` and `fc2_bias`, since layers may have different numbers
of experts. Routers are padded to the largest number of experts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = dict[str, Any]
LAYERS = "layers"
FLAT = ("fc1", "fc1_bias", "fc2", "fc2_bias")
_ROUTER = ("router", "router_bias")


def rows_of(experts: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """First row of each layer's experts, and the end, in `fc1` and `fc2`, and in `fc2_bias`."""
    rows, bias_rows = (np.cumsum([0, *map(size, experts)]).tolist() for size in (sum, len))
    return rows, bias_rows


def join(layers: Sequence[Tree], experts: Sequence[tuple[int, ...]]) -> Tree:
    """Stacks the params of `Block`s, JAX or NumPy arrays, which have these experts."""
    most = max(len(sizes) for sizes in experts)

    def wide(layer: Tree, name: str) -> Any:
        """A router padded with zeros; all zeros if the layer has none."""
        d = layer["experts_norm"]["scale"].shape[0]
        array = layer["experts"].get(name)
        if array is None:
            return np.zeros((d, most) if name == "router" else (most,), np.float32)
        xp = jnp if isinstance(array, jax.Array) else np
        return xp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, most - array.shape[-1])])

    def xp(arrays: Sequence[Any]):
        return np if all(isinstance(a, np.ndarray) for a in arrays) else jnp

    rest = [{k: v for k, v in layer.items() if k != "experts"} for layer in layers]
    out = jax.tree.map(lambda *arrays: xp(arrays).stack(arrays), *rest)
    out["experts"] = {}
    for name in FLAT:
        arrays = [layer["experts"][name] for layer in layers if name in layer["experts"]]
        out["experts"][name] = xp(arrays).concatenate(arrays)
    if most > 1:
        for name in _ROUTER:
            arrays = [wide(layer, name) for layer in layers]
            out["experts"][name] = xp(arrays).stack(arrays)
    return out


def split(stacked: Tree, experts: Sequence[tuple[int, ...]]) -> dict[str, Tree]:
    """Inverse of `join`: {"layer_0": ..., ...}; a layer of one expert has no router."""
    rows, bias_rows = rows_of(experts)

    def layer(i: int) -> Tree:
        own = {k: v for k, v in stacked.items() if k != "experts"}
        out = jax.tree.map(lambda array: array[i], own)
        there, n = stacked["experts"], len(experts[i])
        own_rows = slice(rows[i], rows[i + 1])
        out["experts"] = {name: there[name][own_rows] for name in FLAT if name != "fc2_bias"}
        out["experts"]["fc2_bias"] = there["fc2_bias"][bias_rows[i] : bias_rows[i + 1]]
        if n > 1:
            out["experts"] |= {name: there[name][i][..., :n] for name in _ROUTER}
        return out

    return {f"layer_{i}": layer(i) for i in range(len(experts))}


def has_experts(tree: Any) -> bool:
    """True for the weights, or moments, of the experts of stacked layers, and their routers."""
    return isinstance(tree, dict) and set(FLAT) <= set(tree)


def part(experts: Tree, nth: int, n: int) -> Tree:
    """Every n-th expert of each layer, from the nth on; routers whole.

    The number of experts of each layer is a multiple of n, and all have slots of the same size.
    """
    total = experts["fc2_bias"].shape[0]

    def one(name: str, array: Any) -> Any:
        if name not in FLAT:
            return array
        rest = array.shape[1:]
        of_expert = array.reshape(total // n, n, array.shape[0] // total, *rest)
        return of_expert[:, nth].reshape(-1, *rest)

    return {name: one(name, array) for name, array in experts.items()}


def joined_parts(parts: Sequence[Tree]) -> Tree:
    """Inverse of `part`, of NumPy arrays."""
    n, own = len(parts), parts[0]["fc2_bias"].shape[0]

    def one(name: str) -> Any:
        if name not in FLAT:
            return parts[0][name]
        rest = parts[0][name].shape[1:]
        of_expert = [np.asarray(tree[name]).reshape(own, -1, *rest) for tree in parts]
        return np.stack(of_expert, axis=1).reshape(n * parts[0][name].shape[0], *rest)

    return {name: one(name) for name in parts[0]}


def per_layer(params: Tree, experts: Sequence[tuple[int, ...]]) -> dict[str, Tree]:
    """The layers of a stack's params, stacked or not."""
    return split(params[LAYERS], experts) if LAYERS in params else params
