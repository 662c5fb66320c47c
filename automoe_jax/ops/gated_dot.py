"""A product with the segments of a memory, at the cost of the active segments and width.

Letters: P segments, ... their axes, D input width, Q output width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.active import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_dot(
    dims: tuple[int, ...], span: Array, dim: Array, x_PD: jax.Array, kernel_DQ: jax.Array
) -> jax.Array:
    """x @ kernel for the front segments, zeros for the others.

    A branch per width and one for inactive segments, chosen at run time.

    Args:
      dims: the widths that x can have, ascending.
      span: [], number of active segments.
      dim: [], active width, one of `dims`; x is zero beyond it.
      x_PD: (P, ..., D).
      kernel_DQ: weights.

    Returns:
      (P, ..., Q). Inactive segments have gradients of zero.
    """
    return jnp.stack([
        _switch(dims, which, _product, x, kernel_DQ)
        for which, x in zip(_branches(dims, span, dim, x_PD), x_PD, strict=True)
    ])  # fmt: skip


def _branches(dims, span, dim, x_PD):
    """Branch of each segment: 0 for inactive, else 1 + the index of the width."""
    which = 1 + jnp.sum(dim > jnp.array(dims))
    return [jnp.where(i < span, which, 0) for i in range(x_PD.shape[0])]


def _switch(dims, which, f, *arrays):
    return lax.switch(which, [functools.partial(f, w) for w in (0, *dims)], *arrays)


def _product(w, x, kernel_DQ):
    if not w:
        return jnp.zeros((*x.shape[:-1], kernel_DQ.shape[1]), x.dtype)
    return x[..., :w] @ kernel_DQ[:w]


def _pull(w, x, kernel_DQ, dy):
    if not w:
        return jnp.zeros_like(x), jnp.zeros_like(kernel_DQ)
    rest = x.shape[-1] - w
    dx = jnp.pad(dy @ kernel_DQ[:w].T, [(0, 0)] * (x.ndim - 1) + [(0, rest)])
    rows = x[..., :w].reshape(-1, w)
    return dx, jnp.pad(rows.T @ dy.reshape(-1, dy.shape[-1]), ((0, rest), (0, 0)))


def _fwd(dims, span, dim, x_PD, kernel_DQ):
    return gated_dot(dims, span, dim, x_PD, kernel_DQ), (span, dim, x_PD, kernel_DQ)


def _bwd(dims, residuals, dy_PQ):
    span, dim, x_PD, kernel_DQ = residuals
    parts = [
        _switch(dims, which, _pull, x, kernel_DQ, dy)
        for which, x, dy in zip(_branches(dims, span, dim, x_PD), x_PD, dy_PQ, strict=True)
    ]
    dx, dkernel = zip(*parts, strict=True)
    return None, None, jnp.stack(dx), sum(dkernel)


gated_dot.defvjp(_fwd, _bwd)
