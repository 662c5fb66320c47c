"""`ActiveSubnet`: a subnet as small integer arrays, an argument of the compiled supernet."""

from typing import NamedTuple

import jax
import numpy as np

from automoe_jax.architecture.subnet import Decoder, Encoder, Subnet

# NumPy outside a jitted function, traced inside.
Array = np.ndarray | jax.Array


class ActiveStack(NamedTuple):
    """The active sizes of one stack. L layers of the supernet, E experts.

    `heads_L` is the self-attention's; `cross_*` are zero-length for the encoder. Entries beyond
    the active layers and experts are never read.
    """

    depth: Array  # []
    embed_dim: Array  # []
    heads_L: Array
    cross_heads_L: Array
    cross_span_L: Array
    n_experts_L: Array
    taken_LE: Array  # which of the supernet's experts a layer has
    sizes_LE: Array
    top_k_L: Array


class ActiveSubnet(NamedTuple):
    """A subnet as a pytree of int32 and bool arrays, of the same shapes for all of a space."""

    encoder: ActiveStack
    decoder: ActiveStack


def to_active(subnet: Subnet, hull: Subnet, rng: np.random.Generator | None = None) -> ActiveSubnet:
    """The arrays of a subnet that fits into `hull`, the space's, which gives the shapes.

    A layer has the first experts of the supernet's; with `rng`, any of them, drawn at random.
    """
    encoder = _active_stack(subnet.encoder, hull.encoder, rng)
    return ActiveSubnet(encoder, _active_stack(subnet.decoder, hull.decoder, rng))


def _active_stack(
    stack: Encoder | Decoder, hull: Encoder | Decoder, rng: np.random.Generator | None
) -> ActiveStack:
    shape = (len(hull.layers), max(len(layer.experts) for layer in hull.layers))
    sizes_LE, taken_LE = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, (layer, bound) in enumerate(zip(stack.layers, hull.layers, strict=False)):
        n = len(layer.experts)
        taken = range(n) if rng is None else np.sort(rng.permutation(len(bound.experts))[:n])
        sizes_LE[i, taken], taken_LE[i, taken] = layer.experts, True
    taken_LE[len(stack.layers) :, 0] = True  # a router without any would give NaN

    def column(values: list[int]) -> np.ndarray:
        return np.array(values + [1] * (shape[0] - len(values)), np.int32)

    def cross(name: str) -> np.ndarray:
        if isinstance(hull, Encoder):
            return np.zeros((0,), np.int32)
        return column([getattr(layer, name) for layer in stack.layers])

    return ActiveStack(
        depth=np.asarray(len(stack.layers), np.int32),
        embed_dim=np.asarray(stack.embed_dim, np.int32),
        heads_L=column([getattr(layer, layer.HEADS[0]) for layer in stack.layers]),
        cross_heads_L=cross("cross_heads"),
        cross_span_L=cross("cross_span"),
        n_experts_L=column([len(layer.experts) for layer in stack.layers]),
        taken_LE=taken_LE,
        sizes_LE=sizes_LE,
        top_k_L=column([layer.top_k for layer in stack.layers]),
    )


def layer_row(stack: ActiveStack, i: Array | int) -> ActiveStack:
    """The sizes of layer `i`: arrays with a layer axis lose it."""
    return jax.tree.map(lambda x: x[i] if x.ndim and x.shape[0] else x, stack)
