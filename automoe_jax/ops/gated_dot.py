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
    """x @ kernel for the `span` front segments, zeros for the others: (P, ..., Q).

    A branch per width and one for inactive segments, chosen at run time. x, (P, ..., D), is zero
    beyond its active width `dim`; `dims` are ascending, and each width runs at the next of them.
    `span` and `dim` are []. Inactive segments have gradients of zero.
    """
    return jnp.stack(_each_segment(_product, dims, span, dim, x_PD, kernel_DQ))


def _each_segment(f, dims, span, dim, x_PD, kernel_DQ, *dy_PQ):
    """`f(width, x, kernel, dy)` of each segment; the width of inactive ones is 0."""
    nth = 1 + jnp.sum(dim > jnp.array(dims))
    which = [jnp.where(i < span, nth, 0) for i in range(x_PD.shape[0])]

    def one(branch, x, *dy):
        return lax.switch(branch, [functools.partial(f, w) for w in (0, *dims)], x, kernel_DQ, *dy)

    return [one(*segment) for segment in zip(which, x_PD, *dy_PQ, strict=True)]


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
    parts = _each_segment(_pull, dims, span, dim, x_PD, kernel_DQ, dy_PQ)
    dx, dkernel = zip(*parts, strict=True)
    return None, None, jnp.stack(dx), sum(dkernel)


gated_dot.defvjp(_fwd, _bwd)
