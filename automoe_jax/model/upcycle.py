"""A mixture of experts, or a supernet, started from a trained model with other experts.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): every expert starts as a copy of a
trained one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import LayerSpec, Subnet
from automoe_jax.model.sharing import sharing_of
from automoe_jax.model.stacked import LAYERS, join, split
from automoe_jax.system.errors import UserError

Params = dict[str, Any]


def upcycled(params: Params, trained: Subnet, subnet: Subnet, fresh: Params, gate: str) -> Params:
    """Weights of `subnet` from those of a trained one that differs in its experts alone.

    Expert i is a copy of the trained layer's expert i, counted around: its front columns where it
    is smaller; where it is larger, the rest is that of `fresh`, new weights of `subnet`, with zeros
    behind it. A router is kept where the number of experts is the same, else it is fresh. Where
    the number of experts, or of experts per token, changes, their outputs are scaled: under the
    space's `gate`, a router without preference leaves the output of the layer as it was.

    Raises `UserError` if something else differs.
    """
    out = {name: part for name, part in params.items() if name not in ("encoder", "decoder")}
    for (side, ours), (_, theirs) in zip(subnet.stacks, trained.stacks, strict=True):
        plain = [
            tuple(dataclasses.replace(layer, experts=(1,), top_k=1) for layer in stack.layers)
            for stack in (ours, theirs)
        ]
        if plain[0] != plain[1] or ours.embed_dim != theirs.embed_dim:
            raise UserError(
                f"the {side} of the subnet differs from that of the trained one in more than its "
                "experts; give a subnet that has its width, depth, heads and spans"
            )
        out[side] = {}
        for i, layers in enumerate(zip(theirs.layers, ours.layers, strict=True)):
            name = f"layer_{i}"
            experts = params[side][name]["experts"], fresh[side][name]["experts"]
            own = _experts(*experts, *layers, _outputs(layers[0], gate) / _outputs(layers[1], gate))
            out[side][name] = {**params[side][name], "experts": own}
    return out


def supernet_started(params: Params, trained: Subnet, fresh: Params, space: SearchSpace) -> Params:
    """Weights of a space's supernet in which the subnet `trained` has its trained ones, `params`.

    What it does not have is that of `fresh`, a new supernet; stored experts beyond its own are
    copies of them, as `upcycled` makes them. Its function is kept where its layers have one expert.
    A layer of several keeps it with `space.sharing` "front", if the space has no more; else it gets
    a new router. With "means" and "common" all stored experts start from its first, with "own" they
    are copies in the order in which they are stored.
    """
    out = {
        name: jax.tree.map(_in_front, part, params[name])
        for name, part in fresh.items()
        if name not in ("encoder", "decoder")
    }
    for (side, ours), (_, theirs) in zip(space.hull().stacks, trained.stacks, strict=True):
        sharing = sharing_of(space, side)
        layers = list(ours.layers)
        if sharing.kind != "front":
            stored = (max(ours.layers[0].experts),) * sharing.stored
            layers = [dataclasses.replace(layer, experts=stored) for layer in layers]
        sizes = [layer.experts for layer in layers]
        own = split(fresh[side][LAYERS], sizes)
        for i, (layer, bound) in enumerate(zip(theirs.layers, layers, strict=False)):
            name = f"layer_{i}"
            given, there = dict(params[side][name]), own[name]
            experts = _widened(given.pop("experts"), ours.embed_dim)
            copied = _experts(experts, there["experts"], layer, bound, scale=1.0)
            rest = {part: jax.tree.map(_in_front, there[part], given[part]) for part in given}
            own[name] = {**rest, "experts": copied}
        stacked = join([own[f"layer_{i}"] for i in range(len(layers))], sizes)
        out[side] = {LAYERS: sharing.started(stacked, len(layers))}
    return out


def _in_front(array: jax.Array, own: jax.Array) -> jax.Array:
    """The array with a smaller one in its front corner."""
    return jnp.asarray(array).at[tuple(slice(n) for n in own.shape)].set(own)


def _widened(experts: Params, dim: int) -> Params:
    """Experts and router with zeros up to an embedding width."""

    def wide(name: str, array: jax.Array) -> jax.Array:
        if name in ("fc1_bias", "router_bias"):
            return array
        axis = 0 if name == "router" else 1
        missing = [(0, 0)] * array.ndim
        missing[axis] = (0, dim - array.shape[axis])
        return jnp.pad(array, missing)

    return {name: wide(name, array) for name, array in experts.items()}


def _outputs(layer: LayerSpec, gate: str) -> float:
    """The output of a layer of copies of one FFN under a router without preference, in FFNs."""
    if gate == "normalised":
        return 1.0
    return layer.top_k / (len(layer.experts) if gate == "probability" else 1)


def _experts(params: Params, fresh: Params, theirs: LayerSpec, ours: LayerSpec, scale: float):
    n, n_before = len(ours.experts), len(theirs.experts)
    starts = [sum(theirs.experts[:e]) for e in range(n_before)]
    parts: dict[str, list[Any]] = {"fc1": [], "fc1_bias": [], "fc2": [], "fc2_bias": []}
    begin = 0
    for e, size in enumerate(ours.experts if any(ours.experts) else ()):
        source = e % n_before
        kept = min(size, theirs.experts[source])
        rest = slice(begin + kept, begin + size)
        begin += size
        if not size:
            parts["fc2_bias"].append(fresh["fc2_bias"][e : e + 1])
            continue
        rows = slice(starts[source], starts[source] + kept)
        for name in ("fc1", "fc1_bias"):
            front = params[name][rows] if kept else fresh[name][:0]
            parts[name].append(jnp.concatenate([front, fresh[name][rest]]))
        front = scale * params["fc2"][rows] if kept else fresh["fc2"][:0]
        parts["fc2"].append(jnp.concatenate([front, jnp.zeros_like(fresh["fc2"][rest])]))
        bias = params["fc2_bias"][source] if kept else jnp.zeros_like(fresh["fc2_bias"][e])
        parts["fc2_bias"].append(scale * bias[None])
    out = {name: jnp.concatenate(own) for name, own in parts.items() if own}
    if n > 1:
        router = params if n == n_before else fresh
        out |= {name: router[name] for name in ("router", "router_bias")}
    return out
