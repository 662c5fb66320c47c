"""Counts the parameters and FLOPs of a subnet, as the published tables do.

Parameters exclude the embedding table and the output layer, which shares it. FLOPs are two per
multiply-add of one forward pass without the output layer. As HAT's counter does, they include one
multiply-add per LayerNorm element and per scaled query: all 17 published rows, Transformer-Base
and Transformer-Big come out to the printed digit. Experts count under uniform routing.
"""

import dataclasses

from automoe_jax.architecture.evolved import cell_layout
from automoe_jax.architecture.subnet import DecoderLayer, LayerSpec, Subnet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters and FLOPs; `active_*` counts the parameters that one token uses."""

    params: int
    active_params: float
    active_params_min: int
    active_params_max: int
    flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost(Counts):
    """One layer; `params_at_max_experts` gives it as many experts as a layer of the supernet."""

    name: str
    params_at_max_experts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complexity(Counts):
    """A subnet: sums over `layers`."""

    sparsity: float
    sparsity_supernet: float
    sentence_length: int
    layers: tuple[LayerCost, ...]


def count(
    subnet: Subnet,
    sentence_length: int = 30,
    max_experts: int | None = None,
    max_ffn_dims: tuple[int, int] | None = None,
) -> Complexity:
    """Parameters, active parameters, sparsity and FLOPs.

    Args:
      sentence_length: tokens of source and of target (30 for WMT, 23 for IWSLT).
      max_experts: experts of each layer of the supernet; by default, the most of any layer of the
        subnet. `sparsity_supernet` counts every layer with this many experts and gives those that
        the subnet lacks the largest FFN size (as the paper does: 41 % for WMT'19 in Table 4).
      max_ffn_dims: the largest FFN size of encoder and decoder; by default, the subnet's.
    """
    stacks = [stack for _, stack in subnet.stacks]
    if max_experts is None:
        max_experts = max(len(layer.experts) for stack in stacks for layer in stack.layers)
    if max_ffn_dims is None:
        encoder, decoder = (max(max(x.experts) for x in stack.layers) for stack in stacks)
        max_ffn_dims = encoder, decoder
    layers = tuple(
        _layer(f"{side}.{i}", layer, subnet, sentence_length, (max_experts, max_ffn_dim))
        for (side, stack), max_ffn_dim in zip(subnet.stacks, max_ffn_dims, strict=True)
        for i, layer in enumerate(stack.layers)
    )

    def total(field: str):
        return sum(getattr(layer, field) for layer in layers)

    sums = {field.name: total(field.name) for field in dataclasses.fields(Counts)}
    active = sums["active_params"]
    return Complexity(
        **sums,
        sparsity=1 - active / sums["params"],
        sparsity_supernet=1 - active / total("params_at_max_experts"),
        sentence_length=sentence_length,
        layers=layers,
    )


def _attention(n_queries: int, n_keys: int, d_q: int, d_kv: int, qkv_dim: int) -> tuple[int, int]:
    """(parameters, multiply-adds), LayerNorm and query scaling included."""
    params = (
        (d_q + 1) * qkv_dim  # query
        + 2 * (d_kv + 1) * qkv_dim  # key, value
        + (qkv_dim + 1) * d_q  # out
        + 2 * d_q  # LayerNorm
    )
    macs = (
        2 * n_queries * d_q * qkv_dim  # query, out
        + 2 * n_keys * d_kv * qkv_dim  # key, value
        + 2 * n_queries * n_keys * qkv_dim  # scores, weighted sum
        + n_queries * (d_q + qkv_dim)  # LayerNorm, query scaling
    )
    return params, macs


def _layer(
    name: str, layer: LayerSpec, subnet: Subnet, n: int, supernet: tuple[int, int]
) -> LayerCost:
    """Costs of a layer; `supernet` is the experts of each of its layers and their largest size."""
    q, stack = subnet.qkv_dim, subnet.decoder if isinstance(layer, DecoderLayer) else subnet.encoder
    d = stack.embed_dim
    if subnet.cell == "evolved":
        params, macs = _evolved_cell(layer, d, subnet.encoder.embed_dim, q, n)
        if name.endswith(f".{len(stack.layers) - 1}"):  # the LayerNorm after a stack
            params, macs = params + 2 * d, macs + n * d
        kinds = (x.name for x in dataclasses.fields(LayerCost) if "params" in x.name)
        return LayerCost(name=name, flops=2 * macs, **dict.fromkeys(kinds, params))
    params, macs = _attention(n, n, d, d, q)
    if isinstance(layer, DecoderLayer):
        cross = _attention(n, n * layer.cross_span, d, subnet.encoder.embed_dim, q)
        params, macs = params + cross[0], macs + cross[1]

    n_experts = len(layer.experts)
    router = (d + 1) * n_experts if n_experts > 1 else 0
    router_macs = n * d * n_experts if n_experts > 1 else 0
    sizes = sorted(_expert(d, f) for f in layer.experts)
    expert_macs = n * 2 * d * sum(layer.experts) / n_experts
    dense, k = params + 2 * d, layer.top_k  # the FFN's LayerNorm included
    max_experts, max_ffn_dim = supernet
    router_at_max = (d + 1) * max_experts if max_experts > 1 else 0
    further = (max_experts - n_experts) * _expert(d, max_ffn_dim)
    return LayerCost(
        name=name,
        params=dense + router + sum(sizes),
        active_params=dense + router + k * (sum(sizes) / n_experts),
        active_params_min=dense + router + sum(sizes[:k]),
        active_params_max=dense + router + sum(sizes[n_experts - k :]),
        flops=2 * (macs + router_macs + k * expert_macs + n * d),
        params_at_max_experts=dense + router_at_max + sum(sizes) + further,
    )


def _evolved_cell(layer: LayerSpec, d: int, d_e: int, q: int, n: int) -> tuple[int, int]:
    """(parameters, multiply-adds) of an evolved cell, as in `_attention`."""
    maps, depthwise, norms = cell_layout(layer, d, d_e, q)
    own = sum(width * channels for width, channels in depthwise.values())
    params = sum((k + 1) * out for k, out in maps.values()) + own + 2 * sum(norms.values())
    macs = n * (sum(k * out for k, out in maps.values()) + own + sum(norms.values()))
    n_attentions = sum(name.endswith("_out") for name in maps)
    # Scores, weighted sum, query scaling.
    return params, macs + n_attentions * (2 * n * n * q + n * q)


def _expert(d: int, ffn_dim: int) -> int:
    """fc1, its bias, fc2, its bias; an identity expert has no weights."""
    return 2 * d * ffn_dim + ffn_dim + d if ffn_dim else 0
