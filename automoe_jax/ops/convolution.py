"""Convolutions over time, those of the Evolved Transformer. Letters: B batch, T time, C channels.

Beyond the ends of a sequence stands 0. A causal convolution sees the positions up to each one,
another one those around it.
"""

import functools
import operator

import jax
import jax.numpy as jnp


def shifted(x_BTC: jax.Array, width: int, *, causal: bool = False) -> list[jax.Array]:
    """For each of the `width` positions that a convolution sees: x there, (B, T, C)."""
    before = width - 1 if causal else (width - 1) // 2
    padded = jnp.pad(x_BTC, ((0, 0), (before, width - 1 - before), (0, 0)))
    return [padded[:, i : i + x_BTC.shape[1]] for i in range(width)]


def depthwise(x_BTC: jax.Array, kernel_WC: jax.Array, *, causal: bool = False) -> jax.Array:
    """Each channel's own convolution, (B, T, C): a sum of shifted products, which XLA fuses."""
    near = shifted(x_BTC, kernel_WC.shape[0], causal=causal)
    products = [x * kernel_C for x, kernel_C in zip(near, kernel_WC, strict=True)]
    return functools.reduce(operator.add, products)


def add_front(wide: jax.Array, narrow: jax.Array) -> jax.Array:
    """`narrow` added to the front columns of `wide`."""
    beyond = wide.shape[-1] - narrow.shape[-1]
    return wide + jnp.pad(narrow, [(0, 0)] * (narrow.ndim - 1) + [(0, beyond)])
