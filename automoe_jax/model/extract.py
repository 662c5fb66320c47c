"""`inherited`: the weights of a stand-alone subnet from those of its supernet."""

from typing import Any

import jax
import jax.numpy as jnp

from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import EncoderLayer, LayerSpec, Subnet
from automoe_jax.model.scales import Scales
from automoe_jax.model.sharing import sharing_of
from automoe_jax.model.stacked import LAYERS, per_layer

Params = dict[str, Any]


def extract(params: Params, subnet: Subnet, hull: Subnet) -> Params:
    """Takes the front rows, front columns and front experts that a subnet uses.

    `params` are weights of the supernet, or of any model with the architecture `hull`, which the
    subnet fits into. Returns those of `Transformer(arch=subnet)` with the supernet's base widths.
    """
    d_e, d_d = subnet.encoder.embed_dim, subnet.decoder.embed_dim
    widths = {"embedding": max(d_e, d_d), "source_embedding": d_e}
    widths |= {"target_embedding": d_d, "output": d_d}
    out: Params = {
        name: {"table": params[name]["table"][:, :width]}
        for name, width in widths.items()
        if name in params
    }
    for side in ("encoder", "decoder"):
        bounds = getattr(hull, side).layers
        layers = per_layer(params[side], [bound.experts for bound in bounds])
        out[side] = {
            f"layer_{i}": _layer(layers[f"layer_{i}"], layer, bounds[i], d_e, d_d)
            for i, layer in enumerate(getattr(subnet, side).layers)
        }
    return out


def inherited(params: Params, subnet: Subnet, space: SearchSpace) -> Params:
    """The weights that a subnet has in the supernet of a space, as those of `extract`."""
    hull = space.hull()
    if space.sharing != "front":
        active, stacks = to_active(subnet, hull), {}
        for side in ("encoder", "decoder"):
            sharing, layers = sharing_of(space, side), params[side][LAYERS]
            stacks[side] = {LAYERS: sharing.experts(layers, getattr(active, side).n_experts_L)}
        params = {**params, **stacks}
    return extract(params, subnet, hull)


def with_scales(params: Params, scales: Scales) -> Params:
    """The weights with the outputs of all FFNs and attentions scaled, of a supernet or a subnet.

    With the scales of the search space, these are the weights of the same model without scales.
    """

    def scaled(path: Any, array: Any) -> Any:
        *_, module, name = ("", *(entry.key for entry in path))
        if name in ("fc2", "fc2_bias"):
            return array * scales.ffn
        return array * scales.attention if module == "out" else array

    return params if scales == Scales() else jax.tree_util.tree_map_with_path(scaled, params)


def _layer(params: Params, layer: LayerSpec, bound: LayerSpec, d_e: int, d_d: int) -> Params:
    d = d_e if isinstance(layer, EncoderLayer) else d_d
    out: Params = {"experts": _experts(params["experts"], layer.experts, bound.experts, d)}
    for name, part in params.items():
        if name.endswith("_norm"):
            out[name] = {key: value[:d] for key, value in part.items()}
        elif name.endswith("_attention"):
            out[name] = _attention(part, d, d_e if name == "cross_attention" else d)
    return out


def _attention(params: Params, d_q: int, d_kv: int) -> Params:
    rows = {"query": d_q, "key": d_kv, "value": d_kv}
    out: Params = {
        name: {"kernel": params[name]["kernel"][:n], "bias": params[name]["bias"]}
        for name, n in rows.items()
    }
    out["out"] = {"kernel": params["out"]["kernel"][:, :d_q], "bias": params["out"]["bias"][:d_q]}
    return out


def _experts(params: Params, sizes: tuple[int, ...], bound: tuple[int, ...], d: int) -> Params:
    n = len(sizes)
    starts = [sum(bound[:e]) for e in range(n)]

    def rows(array):
        return jnp.concatenate([array[s : s + f] for s, f in zip(starts, sizes, strict=True)])

    out: Params = {}
    if sum(sizes):  # a layer of identity experts alone has no weights
        out["fc1"] = rows(params["fc1"][:, :d])
        out["fc1_bias"] = rows(params["fc1_bias"])
        out["fc2"] = rows(params["fc2"][:, :d])
        out["fc2_bias"] = params["fc2_bias"][:n, :d]
    if n > 1:
        out["router"] = params["router"][:d, :n]
        out["router_bias"] = params["router_bias"][:n]
    return out
