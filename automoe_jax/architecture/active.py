"""`ActiveSubnet`: a subnet as small integer arrays, an argument of the compiled supernet."""

from typing import NamedTuple

import jax
import numpy as np

from automoe_jax.architecture.subnet import Subnet

# NumPy outside a jitted function, traced inside.
Array = np.ndarray | jax.Array


class ActiveStack(NamedTuple):
    """Choices of the layers of one stack. L layers of the supernet, E experts.

    `heads_L` is the self-attention's; `cross_*` are zero-length for the encoder. Entries beyond
    the active layers and experts are never read.
    """

    depth: Array  # []
    embed_dim: Array  # []
    heads_L: Array
    cross_heads_L: Array
    cross_span_L: Array
    n_experts_L: Array
    sizes_LE: Array
    top_k_L: Array


class ActiveSubnet(NamedTuple):
    """A subnet in a form of fixed shapes; a pytree of int32 arrays."""

    encoder: ActiveStack
    decoder: ActiveStack


def to_active(subnet: Subnet, hull: Subnet) -> ActiveSubnet:
    """The arrays of a subnet.

    Args:
      subnet: an architecture that fits into `hull`.
      hull: `SearchSpace.hull()`; gives the shapes.
    """
    return ActiveSubnet(
        _stack(subnet.encoder, hull.encoder, "heads"),
        _stack(subnet.decoder, hull.decoder, "self_heads"),
    )


def _stack(stack, hull, heads_field: str) -> ActiveStack:
    n_layers = len(hull.layers)
    n_experts = max(len(layer.experts) for layer in hull.layers)

    def column(read, fill=1) -> np.ndarray:
        values = [read(layer) for layer in stack.layers]
        return np.array(values + [fill] * (n_layers - len(values)), np.int32)

    cross = hasattr(hull.layers[0], "cross_span")
    empty = np.zeros((0,), np.int32)
    sizes_LE = np.zeros((n_layers, n_experts), np.int32)
    for i, layer in enumerate(stack.layers):
        sizes_LE[i, : len(layer.experts)] = layer.experts
    return ActiveStack(
        depth=np.asarray(len(stack.layers), np.int32),
        embed_dim=np.asarray(stack.embed_dim, np.int32),
        heads_L=column(lambda x: getattr(x, heads_field)),
        cross_heads_L=column(lambda x: x.cross_heads) if cross else empty,
        cross_span_L=column(lambda x: x.cross_span) if cross else empty,
        n_experts_L=column(lambda x: len(x.experts)),
        sizes_LE=sizes_LE,
        top_k_L=column(lambda x: x.top_k),
    )


def layer_row(choice: ActiveStack, i: Array | int) -> ActiveStack:
    """The choice of layer `i`: what has a layer axis loses it."""
    fields = {
        name: value[i] if name.endswith(("_L", "_LE")) and value.shape[0] else value
        for name, value in choice._asdict().items()
    }
    return ActiveStack(**fields)
