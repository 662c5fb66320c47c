"""Elastic building blocks: widths, dropout, LayerNorm, initialisers. Letters: D embedding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from automoe_jax.architecture.active import Array
from automoe_jax.model.formulas import LAYER_NORM_EPS


class Width(NamedTuple):
    """The active front columns of an activation; None stands for all of them."""

    dim: Array  # [], int
    mask_D: jax.Array  # bool


def width(dim: Array, full_dim: int) -> Width:
    """The first `dim` of `full_dim` columns."""
    return Width(dim, jnp.arange(full_dim) < dim)


def cut(x: jax.Array, active_width: Width | None) -> jax.Array:
    """Zeros beyond the active width (last axis)."""
    return x if active_width is None else jnp.where(active_width.mask_D, x, 0)


# On 2 cores, supernets of widths 96 and 128 with 320 tokens a batch (10,240 values) and of 128 and
# 192 with 1,536 (98,304) train as fast or faster without the narrower program, and compile in two
# thirds of the time.
LEAST_SPARED = 1 << 17


def compiled_widths(dims: tuple[int, ...], n_rows: int) -> tuple[int, ...]:
    """Of elastic widths, ascending, those that get programs; others run at the next wider one.

    A program of its own spares each of `n_rows` the columns up to the next wider one. It takes time
    to compile and a little in every step, so it must spare `LEAST_SPARED` values.
    """
    kept = dims[-1:]
    for dim in reversed(dims[:-1]):
        if n_rows * (kept[0] - dim) >= LEAST_SPARED:
            kept = (dim, *kept)
    return kept


def random_bits(key: jax.Array | None, shapes: list[tuple[int, ...]]) -> list[jax.Array | None]:
    """Bits (uint16) for `dropout`, one array per shape; None for each without a key.

    The bits are a hash (the finaliser of MurmurHash3) of a counter, salted with the key. JAX's
    generator is stronger than dropout needs and takes ten times as long on a CPU (5 % of a training
    step).
    """
    if key is None:
        return [None] * len(shapes)
    starts = np.cumsum([0, *(-(-math.prod(shape) // 2) for shape in shapes)])
    salt = jax.random.bits(key, (2,), jnp.uint32)

    def one(start: int, shape: tuple[int, ...]) -> jax.Array:
        size = math.prod(shape)
        x = jax.lax.iota(jnp.uint32, -(-size // 2)) + jnp.uint32(start)
        x = x * jnp.uint32(0x9E3779B9) + salt[0]
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13) ^ salt[1]) * jnp.uint32(0xC2B2AE35)
        x = x ^ (x >> 16)
        halves = (x & 0xFFFF).astype(jnp.uint16), (x >> 16).astype(jnp.uint16)
        return jnp.concatenate(halves)[:size].reshape(shape)

    return [one(start, shape) for start, shape in zip(starts, shapes, strict=False)]


def keep_mask(bits: jax.Array, rate: Array | float) -> jax.Array:
    """True with probability 1 - rate, which may be traced; exact to 1 in 65,536."""
    return bits.astype(jnp.float32) >= rate * 2.0**16


def dropout(x: jax.Array, rate: Array | float, bits: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without bits."""
    if bits is None:
        return x
    return jnp.where(keep_mask(bits, rate), x / (1.0 - rate), 0).astype(x.dtype)


class AddNorm(nn.Module):
    """LayerNorm(x + dropout(y)) over the active width; eps 1e-5; computed in fp32.

    The backward pass stores x, y and the random bits and recomputes the rest, which is element-wise
    and cheaper to compute than to store.
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        y: jax.Array,
        active_width: Width | None = None,
        rate: Array | float = 0.0,
        bits: jax.Array | None = None,
    ) -> jax.Array:
        """x and y are zero beyond `active_width`; `rate` and `bits` are of the dropout on y."""
        d = x.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (d,))
        bias_D = self.param("bias", nn.initializers.zeros, (d,))

        def norm(x, y, scale_D, bias_D):
            dtype = x.dtype
            x = x.astype(jnp.float32) + dropout(y.astype(jnp.float32), rate, bits)
            n = d if active_width is None else active_width.dim
            mean = jnp.sum(x, -1, keepdims=True) / n
            centred = cut(x - mean, active_width)
            variance = jnp.sum(centred * centred, -1, keepdims=True) / n
            inverse = jax.lax.rsqrt(variance + LAYER_NORM_EPS)
            return cut(centred * inverse * scale_D + bias_D, active_width).astype(dtype)

        return jax.checkpoint(norm, prevent_cse=False)(x, y, scale_D, bias_D)


def uniform(bound: float):
    """Initialiser: uniform in +-bound."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def xavier(fan_in: int, fan_out: int):
    """Initialiser: Xavier-uniform with explicit fans, for weights stored fused or split."""
    return uniform(math.sqrt(6.0 / (fan_in + fan_out)))
