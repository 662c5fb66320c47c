"""Draws, mutates and crosses over subnets, stack by stack.

The order of random draws is part of the behaviour: it decides what a seed gives, and a change of it
changes the history of every search.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from automoe_jax.architecture.stack_space import Choices, StackSpace
from automoe_jax.architecture.subnet import STACKS, DecoderLayer, LayerSpec, Subnet

Rng = np.random.Generator
Attention = dict[str, Choices]  # `StackSpace.attention`


def sample(
    spaces: Sequence[StackSpace],
    qkv_dim: int,
    cell: str,
    rng: Rng,
    experts_bias: float = 0.0,
    depth_bias: float = 0.0,
) -> Subnet:
    """A subnet with every dimension drawn uniformly.

    But a layer has n experts with a probability proportional to n to the power of `experts_bias`,
    and a stack n layers with one proportional to n to the power of `depth_bias`.
    """
    layers: list[tuple[LayerSpec, ...]] = []
    for space in spaces:
        depth = _draw_biased(rng, space.depths, depth_bias)
        attention = space.attention(len(layers[0]) if layers else depth)
        layers.append(
            tuple(_sample_layer(space, rng, i, attention, experts_bias) for i in range(depth))
        )
    embed_dims = [_draw(rng, space.embed_dims) for space in spaces]
    return _subnet(spaces, embed_dims, layers, qkv_dim, cell)


def mutate(spaces: Sequence[StackSpace], parent: Subnet, rng: Rng, p: float) -> Subnet:
    """A copy with each dimension drawn anew with probability `p` (Algorithm 1), added ones too."""
    stacks = [stack for _, stack in parent.stacks]
    embed_dims, depths, layers = [], [], []
    for space, stack in zip(spaces, stacks, strict=True):
        embed_dims.append(_maybe(rng, p, stack.embed_dim, space.embed_dims))
        depths.append(_maybe(rng, p, len(stack.layers), space.depths))
    for space, stack, depth in zip(spaces, stacks, depths, strict=True):
        kept, attention = stack.layers[:depth], space.attention(depths[0])
        layers.append((
            *(_mutate_layer(space, layer, rng, p, i, attention) for i, layer in enumerate(kept)),
            *(_sample_layer(space, rng, i, attention) for i in range(len(kept), depth)),
        ))  # fmt: skip
    return _subnet(spaces, embed_dims, layers, parent.qkv_dim, parent.cell)


def crossover(spaces: Sequence[StackSpace], a: Subnet, b: Subnet, rng: Rng) -> Subnet:
    """A child that takes each dimension from one of its parents by a fair coin.

    The experts of a layer go together; a layer that only one parent has comes from that one.
    """
    pairs = [(x, y) for (_, x), (_, y) in zip(a.stacks, b.stacks, strict=True)]
    depths = [len(_coin(rng, x.layers, y.layers)) for x, y in pairs]
    layers = []
    for space, (x, y), depth in zip(spaces, pairs, depths, strict=True):
        longer, attention = max((x.layers, y.layers), key=len), space.attention(depths[0])
        xs, ys = ((*stack.layers, *longer[len(stack.layers) :])[:depth] for stack in (x, y))
        layers.append([
            _cross_layer(space, *pair, rng, attention) for pair in zip(xs, ys, strict=True)
        ])  # fmt: skip
    embed_dims = [_coin(rng, x.embed_dim, y.embed_dim) for x, y in pairs]
    return _subnet(spaces, embed_dims, layers, a.qkv_dim, a.cell)


def _subnet(spaces: Sequence[StackSpace], embed_dims, layers, qkv_dim: int, cell: str) -> Subnet:
    parts = zip(spaces, embed_dims, layers, strict=True)
    stacks: dict[str, Any] = {x.side: STACKS[x.side](dim, tuple(own)) for x, dim, own in parts}
    return Subnet(qkv_dim=qkv_dim, cell=cell, **stacks)


def _sample_layer(
    space: StackSpace, rng: Rng, i: int, attention: Attention, experts_bias: float = 0.0
) -> LayerSpec:
    experts = _sample_experts(space, rng, _draw_biased(rng, space.expert_counts(i), experts_bias))
    top_k = _draw(rng, space.top_ks(len(experts)))
    drawn = {name: _draw(rng, choices) for name, choices in attention.items()}
    return STACKS[space.side].layer_type(**drawn, experts=experts, top_k=top_k)


def _sample_experts(space: StackSpace, rng: Rng, n: int) -> tuple[int, ...]:
    """The FFN sizes of `n` experts."""
    if space.expert_sizes == "fractional":
        return tuple(_draw(rng, space.expert_dims) for _ in range(n))
    sizes = (_draw(rng, space.ffn_dims),) * n
    return (0, *sizes[1:]) if space.identity_experts and n > 1 and rng.random() < 0.5 else sizes


def _mutate_layer(
    space: StackSpace, layer: LayerSpec, rng: Rng, p: float, i: int, attention: Attention
) -> LayerSpec:
    mutated = {
        name: _allowed(rng, _maybe(rng, p, getattr(layer, name), choices), choices)
        for name, choices in attention.items()
    }
    n = _maybe(rng, p, len(layer.experts), space.expert_counts(i))
    fresh = _sample_experts(space, rng, n)
    if space.expert_sizes == "standard":
        experts = layer.experts if n == len(layer.experts) else fresh
        experts = _sample_experts(space, rng, n) if rng.random() < p else experts
    else:
        kept = (*layer.experts, *fresh[len(layer.experts) :])[:n]
        experts = tuple(_maybe(rng, p, size, space.expert_dims) for size in kept)
    choices = space.top_ks(n)
    top_k = _allowed(rng, _maybe(rng, p, layer.top_k, choices), choices)
    return type(layer)(**mutated, experts=experts, top_k=top_k)


def _cross_layer(
    space: StackSpace, x: LayerSpec, y: LayerSpec, rng: Rng, attention: Attention
) -> LayerSpec:
    taken = {}
    if isinstance(x, DecoderLayer) and isinstance(y, DecoderLayer):
        span = _coin(rng, x.cross_span, y.cross_span)
        taken["cross_span"] = _allowed(rng, span, attention["cross_span"])
    moe = _coin(rng, x, y)
    taken |= {name: _coin(rng, getattr(x, name), getattr(y, name)) for name in space.heads}
    return type(x)(**taken, experts=moe.experts, top_k=moe.top_k)


def _draw(rng: Rng, choices: Choices) -> int:
    return int(choices[int(rng.integers(len(choices)))])


def _draw_biased(rng: Rng, choices: Choices, bias: float) -> int:
    """n with a probability proportional to n to the power of `bias`."""
    if not bias:
        return _draw(rng, choices)
    weights = (np.array(choices) / max(choices)) ** bias
    return int(rng.choice(choices, p=weights / weights.sum()))


def _maybe(rng: Rng, p: float, value: int, choices: Choices) -> int:
    """A new draw with probability `p`, else the value."""
    return _draw(rng, choices) if rng.random() < p else value


def _allowed(rng: Rng, value: int, choices: Choices) -> int:
    """The value, or a new draw where other mutated dimensions rule it out."""
    return value if value in choices else _draw(rng, choices)


def _coin(rng: Rng, x, y):
    return x if rng.random() < 0.5 else y
