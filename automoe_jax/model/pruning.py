"""The experts that a subnet keeps of a layer that has more, by how many tokens each is used for.

Letters: E experts of the larger layer, N of the subnet's, F columns of one expert, D embedding.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.model.extract import extract

Params = dict[str, Any]
_COLUMNS = ("fc1", "fc1_bias", "fc2")


def with_all_experts(subnet: Subnet, hull: Subnet) -> Subnet:
    """The subnet with all experts, at their full sizes, of the supernet that `hull` bounds."""
    stacks = {}
    for (side, stack), (_, bounds) in zip(subnet.stacks, hull.stacks, strict=True):
        layers = [
            dataclasses.replace(layer, experts=bound.experts)
            for layer, bound in zip(stack.layers, bounds.layers, strict=False)
        ]
        stacks[side] = dataclasses.replace(stack, layers=tuple(layers))
    return dataclasses.replace(subnet, **stacks)


def pruned(
    params: Params, full: Subnet, subnet: Subnet, loads: list[np.ndarray], *, merge: bool
) -> Params:
    """Weights of `subnet` from those of the same with all experts, each of one size in a layer.

    `loads` are the shares of tokens (E,) that a text sends to each expert, layer by layer, encoder
    first. A layer keeps its most used experts, the larger the more used, with their rows of the
    router. With `merge`, each of the others is merged into the kept expert whose row of the router
    has the most alike direction: their weights are averaged by use (M-SMoE, Li et al. 2023, arXiv
    2310.01334, without its permutation of columns).
    """
    out, hulls, load = dict(params), {}, iter(loads)
    for (side, ours), (_, theirs) in zip(subnet.stacks, full.stacks, strict=True):
        out[side], bounds = dict(params[side]), []
        for i, (layer, bound) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
            n, load_E = len(layer.experts), np.asarray(next(load), np.float64)
            if len(bound.experts) > 1:
                given = params[side][f"layer_{i}"]
                kept_N = _kept(load_E, layer.experts)
                experts = _mixed(given["experts"], kept_N, load_E, merge=merge)
                out[side][f"layer_{i}"] = {**given, "experts": experts}
            bounds.append(dataclasses.replace(bound, experts=bound.experts[:n]))
        hulls[side] = dataclasses.replace(theirs, layers=tuple(bounds))
    return extract(out, subnet, dataclasses.replace(full, **hulls))


def _kept(load_E: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Which expert each of the subnet's experts is, by their sizes."""
    most_used = np.argsort(-load_E, kind="stable")[: len(sizes)]
    kept_N = np.empty(len(sizes), np.int64)
    kept_N[np.argsort(-np.array(sizes), kind="stable")] = most_used
    return kept_N


def _mixed(experts: Params, kept_N: np.ndarray, load_E: np.ndarray, *, merge: bool) -> Params:
    """The kept experts of a layer, merged with the others or alone."""
    mixing_NE = np.zeros((len(kept_N), len(load_E)))
    mixing_NE[np.arange(len(kept_N)), kept_N] = 1.0
    if merge:
        mixing_NE[_nearest(np.asarray(experts["router"]), kept_N), np.arange(len(load_E))] = 1.0
        used_NE = mixing_NE * load_E
        total_N = used_NE.sum(axis=1, keepdims=True)
        alone_NE = np.eye(len(load_E))[kept_N]  # where none of a group is used
        mixing_NE = np.where(total_N > 0, used_NE / np.where(total_N > 0, total_N, 1), alone_NE)
    out = {
        name: _mix(experts[name], mixing_NE, len(load_E)) for name in _COLUMNS if name in experts
    }
    if "fc2_bias" in experts:
        out["fc2_bias"] = jnp.asarray(mixing_NE, jnp.float32) @ experts["fc2_bias"]
    return out | {name: experts[name][..., kept_N] for name in ("router", "router_bias")}


def _mix(columns: Any, mixing_NE: np.ndarray, n: int) -> Any:
    """Columns of mixed experts, one after the other, from those of all."""
    by_expert = jnp.reshape(columns, (n, -1))
    mixed = jnp.asarray(mixing_NE, jnp.float32) @ by_expert
    return mixed.reshape(-1, *columns.shape[1:])


def _nearest(router_DE: np.ndarray, kept_N: np.ndarray) -> np.ndarray:
    """Which kept expert (E,) each expert of a layer joins."""
    direction_DE = router_DE / np.maximum(np.linalg.norm(router_DE, axis=0), 1e-12)
    nearest_E = (direction_DE[:, kept_N].T @ direction_DE).argmax(axis=0)
    nearest_E[kept_N] = np.arange(len(kept_N))
    return nearest_E
