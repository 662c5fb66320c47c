"""Which FFN columns and experts of a trained model matter, and the model with these in front.

A supernet's smaller subnets take the front columns and the first experts: when it starts from a
trained model, these should be the best ones (Minitron, Muralidharan et al. 2024, arXiv 2407.14679).
Heads need no order, as a subnet with fewer of them splits the same width into larger ones.
Letters: F columns of all experts of a layer, one after the other, as in its weights.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automoe_jax.architecture.subnet import LayerSpec, Subnet

Params = dict[str, Any]
Importance = dict[str, dict[str, Any]]  # by side and layer, as in the weights: (F,)
_COLUMNS = ("fc1", "fc1_bias", "fc2")


def of_gradient(params: Params, gradient: Params) -> Importance:
    """The importance of the columns by one gradient of the loss.

    The square of the sum of gradient times weight over a column's weights: the first-order change
    of the loss without it (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).
    """

    def column_F(weights: Params, gradients: Params) -> jax.Array:
        products = [weights[name] * gradients[name] for name in _COLUMNS]
        return jnp.sum(jnp.stack([p.reshape(len(p), -1).sum(axis=1) for p in products]), 0) ** 2

    return {
        side: {
            name: column_F(layer["experts"], gradient[side][name]["experts"])
            for name, layer in params[side].items()
            if "fc1" in layer["experts"]  # else identity experts alone
        }
        for side in ("encoder", "decoder")
    }


def best_first(params: Params, subnet: Subnet, importance: Importance) -> tuple[Params, Subnet]:
    """The same function with the most important experts first, and of each expert the columns.

    Returns it with its architecture, whose experts have the new order.
    """
    out, stacks = dict(params), {}
    for side, stack in subnet.stacks:
        out[side], layers = dict(params[side]), []
        for i, layer in enumerate(stack.layers):
            name = f"layer_{i}"
            experts = params[side][name]["experts"]
            if name in importance[side]:
                found = np.asarray(importance[side][name])
                experts, layer = _layer_best_first(experts, layer, found)  # noqa: PLW2901
            out[side][name] = {**params[side][name], "experts": experts}
            layers.append(layer)
        stacks[side] = dataclasses.replace(stack, layers=tuple(layers))
    return out, dataclasses.replace(subnet, **stacks)


def _layer_best_first(
    experts: Params, layer: LayerSpec, importance_F: np.ndarray
) -> tuple[Params, LayerSpec]:
    starts = np.cumsum([0, *layer.experts])
    columns = [np.arange(*span) for span in itertools.pairwise(starts)]
    order_E = np.argsort([-importance_F[own].sum() for own in columns], kind="stable")
    sorted_columns = [own[np.argsort(-importance_F[own], kind="stable")] for own in columns]
    order_F = np.concatenate([sorted_columns[e] for e in order_E])
    out = {name: jnp.asarray(experts[name])[order_F] for name in _COLUMNS}
    out["fc2_bias"] = jnp.asarray(experts["fc2_bias"])[order_E]
    for name in ("router", "router_bias"):
        if name in experts:
            out[name] = jnp.asarray(experts[name])[..., order_E]
    return out, dataclasses.replace(layer, experts=tuple(layer.experts[e] for e in order_E))
