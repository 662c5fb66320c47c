"""A mixture of experts started from a trained model with other experts.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): every expert starts as a copy of a
trained one.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from automoe_jax.architecture.subnet import LayerSpec, Subnet
from automoe_jax.system.errors import UserError

Params = dict[str, Any]


def upcycled(params: Params, trained: Subnet, subnet: Subnet, fresh: Params, gate: str) -> Params:
    """Weights of `subnet` from those of a trained one that differs in its experts alone.

    Expert i is a copy of the trained layer's expert i, counted around: its front columns where it
    is smaller; where it is larger, the rest is that of `fresh`, new weights of `subnet`, with zeros
    behind it. A router is kept where the number of experts is the same, else it is fresh. With
    `gate` "probability", the experts of a layer with another number are scaled so that its output
    is as before where the router has no preference.

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
            own = _experts(*experts, *layers, gate)
            out[side][name] = {**params[side][name], "experts": own}
    return out


def _experts(params: Params, fresh: Params, theirs: LayerSpec, ours: LayerSpec, gate: str):
    n, n_before = len(ours.experts), len(theirs.experts)
    scale = n / n_before if gate == "probability" else 1.0
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
