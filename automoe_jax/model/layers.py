"""Elastic building blocks: widths, LayerNorm, dropout, sinusoidal positions, embedding.

Letters: B batch, T or S time, D embedding, V vocabulary.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from automoe_jax.architecture.active import Array
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.model.formulas import LAYER_NORM_EPS, frequencies


class Width(NamedTuple):
    """The active front columns of an activation; `None` in its place means all of them."""

    dim: Array  # [], int
    mask_D: jax.Array  # bool


def width(dim: Array, full_dim: int) -> Width:
    return Width(dim, jnp.arange(full_dim) < dim)


def cut(x: jax.Array, active: Width | None) -> jax.Array:
    """Zeros beyond the active width (last axis)."""
    return x if active is None else jnp.where(active.mask_D, x, 0)


def random_bits(key: jax.Array | None, shapes: list[tuple[int, ...]]) -> list[jax.Array | None]:
    """Bits (uint16) for `dropout`, one array per shape; None for each without a key.

    A hash of a counter (the finaliser of MurmurHash3) that the key starts: dropout needs fair and
    unrelated bits, not the strength of JAX's generator, which takes ten times as long on a CPU
    (5 % of a training step).
    """
    if key is None:
        return [None] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    starts = np.cumsum([0, *(-(-size // 2) for size in sizes)])
    salt = jax.random.bits(key, (2,), jnp.uint32)

    def one(start: int, size: int) -> jax.Array:
        x = jax.lax.iota(jnp.uint32, -(-size // 2)) + jnp.uint32(start)
        x = x * jnp.uint32(0x9E3779B9) + salt[0]
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13) ^ salt[1]) * jnp.uint32(0xC2B2AE35)
        x = x ^ (x >> 16)
        halves = (x & 0xFFFF).astype(jnp.uint16), (x >> 16).astype(jnp.uint16)
        return jnp.concatenate(halves)[:size]

    return [
        one(start, size).reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


def keep_mask(bits: jax.Array, rate: Array | float) -> jax.Array:
    """True with probability 1 - rate, which may be traced; exact to 1 in 65,536."""
    return bits.astype(jnp.float32) >= rate * 2.0**16


def dropout(x: jax.Array, rate: Array | float, bits: jax.Array | None) -> jax.Array:
    """Inverted dropout; without bits the identity."""
    return x if bits is None else jnp.where(keep_mask(bits, rate), x / (1.0 - rate), 0)


class AddNorm(nn.Module):
    """LayerNorm of x plus a sublayer's output with dropout, over the active width; eps 1e-5.

    The backward pass gets x, y and the random bits and computes the rest again: element-wise work
    is cheaper than storing it.
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        y: jax.Array,
        active: Width | None = None,
        rate: Array | float = 0.0,
        bits: jax.Array | None = None,
    ) -> jax.Array:
        """x and y are cut to `active`; see `dropout` for `rate` and `bits`, which concern y."""
        d = x.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (d,))
        bias_D = self.param("bias", nn.initializers.zeros, (d,))

        def norm(x, y, scale_D, bias_D):
            x = x + dropout(y, rate, bits)
            n = d if active is None else active.dim
            mean = jnp.sum(x, -1, keepdims=True) / n
            centred = cut(x - mean, active)
            variance = jnp.sum(centred * centred, -1, keepdims=True) / n
            inverse = jax.lax.rsqrt(variance + LAYER_NORM_EPS)
            return cut(centred * inverse * scale_D + bias_D, active)

        return jax.checkpoint(norm, prevent_cse=False)(x, y, scale_D, bias_D)


class Embedding(nn.Module):
    """A table (V, D) of words, to read or to score them: N(0, D^-0.5) at first.

    Attributes:
      vocab_size: V, the pad column included.
      dim: D.
      zero_pad: whether the pad row starts as zeros, as where words are read.
    """

    vocab_size: int
    dim: int
    zero_pad: bool = True

    def setup(self):
        def init(key, shape):
            table = jax.random.normal(key, shape) * shape[1] ** -0.5
            return table.at[PAD_ID].set(0) if self.zero_pad else table

        self.table_VD = self.param("table", init, (self.vocab_size, self.dim))

    def __call__(self, ids_BT: jax.Array, dim: int, active: Width | None) -> jax.Array:
        """Rows of the table at width `dim`, times the square root of the active width."""
        n = float(dim) if active is None else active.dim.astype(jnp.float32)
        return cut(self.table_VD[ids_BT, :dim], active) * jnp.sqrt(n)

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Scores of all words: no bias, no scale."""
        return h_BTD @ self.table_VD[:, : h_BTD.shape[-1]].T


def position_table(n_positions: int, dim: int) -> np.ndarray:
    """Sinusoidal rows (n_positions + 2, dim): row 1 is for pads and zero, row 2 the first token.

    Made at the supernet's width; a narrower subnet takes the front columns, so that its shares of
    sines and cosines are those that it had in the supernet.
    """
    angle = np.arange(n_positions + 2, dtype=np.float32)[:, None] * frequencies(dim)
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    table = np.pad(table, ((0, 0), (0, dim % 2)))
    table[PAD_ID] = 0
    return table.astype(np.float32)


def positions(ids_BT: jax.Array) -> jax.Array:
    """Row of `position_table` for each token: real tokens counted from 2, pads at 1."""
    real_BT = (ids_BT != PAD_ID).astype(jnp.int32)
    return jnp.cumsum(real_BT, axis=1) * real_BT + PAD_ID


def uniform(bound: float):
    """Initialiser: uniform in +-bound."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def xavier(fan_in: int, fan_out: int):
    """Xavier-uniform with stated fans, for weights that are stored fused or split."""
    return uniform(math.sqrt(6.0 / (fan_in + fan_out)))
