"""Weights of the Evolved Transformer, laid out for translating: to and from its params."""

from collections.abc import Callable
from typing import Any

import numpy as np

from automoe_jax.architecture.evolved import CellLayout, cell_layout
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.decoding.layout import ATTENTION
from automoe_jax.model.extract import Params

Weights = dict[str, np.ndarray]
Path = tuple[str, ...]


# The modules whose maps are joined, where a map is not a module of its name.
_JOINED: dict[str, tuple[Path, ...]] = {
    f"{prefix}{name}": tuple((f"{prefix}{module}", part) for part in parts)
    for prefix in ("", "first_")
    for name, (module, parts) in ATTENTION.items()
} | {"gated": (("gated",), ("gates",))}


def _modules(name: str, cell: Params) -> tuple[Path, ...]:
    if name in _JOINED:
        return _JOINED[name]
    return ((name, "map"),) if "map" in cell.get(name, {}) else ((name,),)


def prepare(params: Params, subnet: Subnet) -> Weights:
    """The dense weights of both stacks, of the params of `EvolvedTransformer`."""
    weights: Weights = {}
    for prefix, cell, layout in _cells(params, subnet):
        for name in layout.maps:
            for leaf in ("kernel", "bias"):
                parts = [np.asarray(_at(cell, path)[leaf]) for path in _modules(name, cell)]
                weights[f"{prefix}{name}.{leaf}"] = np.concatenate(parts, axis=-1)
        for name in layout.depthwise:
            weights[f"{prefix}{name}.depthwise"] = cell[name]["depthwise"]
        for name in layout.norms:
            weights |= {f"{prefix}{name}.{leaf}": w for leaf, w in cell[name].items()}
    for side, _ in subnet.stacks:
        weights |= {f"{side}.norm.{leaf}": w for leaf, w in params[side]["norm"].items()}
    return weights


def params_of(
    linear: Callable[[str, int], tuple[np.ndarray, np.ndarray]], weights: Weights, subnet: Subnet
) -> Params:
    """Inverts `prepare`; `linear` gives a map's fp32 matrix and bias by its name and inputs."""
    params: Params = {side: {} for side, _ in subnet.stacks}
    for side, stack in subnet.stacks:
        params[side] |= {f"layer_{i}": {} for i in range(len(stack.layers))}
        params[side]["norm"] = _norm(weights, f"{side}.norm")
    for prefix, cell, layout in _cells(params, subnet):
        for name, shape in layout.depthwise.items():
            cell[name] = {"depthwise": weights[f"{prefix}{name}.depthwise"], "map": {}}
            assert cell[name]["depthwise"].shape == shape
        if prefix.startswith("encoder"):
            cell["narrow"] = {"map": {}}
        for name, (inputs, _) in layout.maps.items():
            paths = _modules(name, cell)
            maps = [np.split(w, len(paths), axis=-1) for w in linear(prefix + name, inputs)]
            for path, kernel, bias in zip(paths, *maps, strict=True):
                module = cell
                for part in path:
                    module = module.setdefault(part, {})
                module |= {"kernel": kernel, "bias": bias}
        cell |= {name: _norm(weights, prefix + name) for name in layout.norms}
    return params


def _norm(weights: Weights, name: str) -> Params:
    return {leaf: weights[f"{name}.{leaf}"] for leaf in ("scale", "bias")}


def _at(cell: Params, path: Path) -> Any:
    for part in path:
        cell = cell[part]
    return cell


def _cells(params: Params, subnet: Subnet) -> list[tuple[str, Params, CellLayout]]:
    """Prefix, params and layout of each cell."""
    return [
        (
            f"{side}.{i}.",
            params[side][f"layer_{i}"],
            cell_layout(layer, stack.embed_dim, subnet.encoder.embed_dim, subnet.qkv_dim),
        )
        for side, stack in subnet.stacks
        for i, layer in enumerate(stack.layers)
    ]
