"""The grouped expert FFN: each row through its own expert, at the cost of that expert's size.

One function with a backend per platform: loops with data-dependent trip counts on CPUs, ragged
products on GPUs, kernels of its own on TPUs. Letters: A rows, D embedding, F FFN columns of all
experts, E experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from automoe_jax.architecture.active import Array
from automoe_jax.ops import grouped_loop, grouped_pallas, grouped_ragged
from automoe_jax.ops.grouping import ExpertWeights, Groups, LayerExperts, group, put_back
from automoe_jax.system.platforms import platform

PALLAS = "pallas"
# The name of a loop in a compiled program: over the experts of inactive layers.
REST = "rest_of_the_experts"
BACKENDS = ("loop", PALLAS, *grouped_ragged.KERNELS)


def default_backend() -> str:
    """The fastest backend on the platform that programs are traced for."""
    if platform() == "tpu":
        return PALLAS
    if platform() == "gpu":
        return "tokamax" if grouped_ragged.has_tokamax() else "blocked"
    return "loop"


def grouped_ffn(
    x_AD: jax.Array,
    expert_A: jax.Array,
    weights: ExpertWeights,
    sizes_E: Array,
    slots: tuple[int, ...],
    backend: str | None = None,
) -> jax.Array:
    """fc2(relu(fc1(x))) of each row's expert; an expert of size 0 returns its input.

    The cost follows the rows and the sizes of their experts. No row is dropped. Products have the
    dtype of x and weights and accumulate in fp32. Differentiable in `x_AD` and `weights`; entries
    of weights that no row used get a gradient of exactly zero.

    Args:
      expert_A: int, the expert of each row; E or more means none and gives zeros.
      sizes_E: int, active FFN size of each expert, at most its slot; may be traced.
      slots: rows of each expert in `weights`.
      backend: one of `BACKENDS`; None for the platform's.

    Raises `ValueError` if the backend is unknown or not installed, or the slots do not fit.
    """
    backend = backend or default_backend()
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "tokamax" and not grouped_ragged.has_tokamax():
        others = ", ".join(b for b in BACKENDS if b != "tokamax")
        raise ValueError(f"backend tokamax needs the tokamax package; install it or use {others}")
    n_rows, n_experts = weights.fc1_FD.shape[0], sizes_E.shape[0]
    if (sum(slots), len(slots)) != (n_rows, n_experts):
        raise ValueError(f"slots are {slots}; weights have {n_rows} rows of {n_experts} experts")
    weights = jax.tree.map(jnp.asarray, weights)
    x_AD, expert_A, sizes_E = (jnp.asarray(a) for a in (x_AD, expert_A, sizes_E))
    return _grouped_ffn(backend, slots, x_AD, expert_A, weights, sizes_E)


def dense_reference(
    x_AD: jax.Array, expert_A: jax.Array, weights: ExpertWeights, sizes_E: Array, slots
) -> jax.Array:
    """The same function, with every row through every expert and masks: slow, for comparison."""
    column_F = np.arange(sum(slots)) - np.repeat(np.cumsum([0, *slots[:-1]]), slots)
    expert_F = np.repeat(np.arange(len(slots)), slots)
    own_AF = (expert_A[:, None] == expert_F) & (column_F < jnp.asarray(sizes_E)[expert_F])
    h_AF = jax.nn.relu(x_AD @ weights.fc1_FD.T + weights.fc1_bias_F) * own_AF
    one_AE = expert_A[:, None] == np.arange(len(slots))
    y_AD = h_AF @ weights.fc2_FD + one_AE.astype(x_AD.dtype) @ weights.fc2_bias_ED
    return jnp.where(identity(expert_A, sizes_E)[:, None], x_AD, y_AD)


def identity(expert_A: jax.Array, sizes_E: Array) -> jax.Array:
    """True for the rows of an expert of size 0."""
    return jnp.append(jnp.asarray(sizes_E) == 0, False)[jnp.minimum(expert_A, sizes_E.shape[0])]


def hidden_shape(
    n_rows: int, n_experts: int, ffn_dims: tuple[int, ...], backend: str
) -> tuple[int, ...]:
    """Shape of a layer's hidden activations that `forward` stores for `backward`; (0,) if none."""
    return grouped_loop.hidden_shape(n_rows, n_experts, ffn_dims) if backend == "loop" else (0,)


def _of_slots(backend: str, experts: LayerExperts) -> str:
    """The backend, or that for experts of other slots than it takes."""
    return "ragged_dot" if backend == PALLAS and not experts.uniform else backend


def _group(backend: str, expert_A: jax.Array, experts: LayerExperts) -> Groups:
    """Rows sorted in the backend's order."""
    rank_E = None if backend == "loop" else grouped_ragged.largest_first(experts.sizes_E)
    return group(expert_A, experts.sizes_E.shape[0], rank_E)


def forward(
    backend: str,
    x_AD: jax.Array,
    expert_A: jax.Array,
    experts: LayerExperts,
    hidden: jax.Array | None,
    layer: Array | int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """The operator on a part of larger weights, for callers with their own backward pass.

    `x_AD` is cut to its width. `hidden`, (L, *hidden_shape), is written at `layer`, which may be
    traced; None stores nothing. Returns y_AD and `hidden`.
    """
    backend = _of_slots(backend, experts)
    groups = _group(backend, expert_A, experts)
    x_sorted = x_AD[groups.order_A]
    if backend == "loop":
        y_AD, hidden = grouped_loop.forward(x_sorted, groups, experts, hidden, layer)
    elif backend == PALLAS:
        y_AD = grouped_pallas.forward(x_sorted, groups, experts)
    else:
        kernel = grouped_ragged.KERNELS[backend]
        y_AD = grouped_ragged.forward(kernel, x_sorted, groups, experts)
    y_AD = put_back(y_AD, groups)
    return jnp.where(identity(expert_A, experts.sizes_E)[:, None], x_AD, y_AD), hidden


def backward(
    backend: str,
    x_AD: jax.Array,
    expert_A: jax.Array,
    experts: LayerExperts,
    hidden: Any,
    dy_AD: jax.Array,
    dw: ExpertWeights,
    layer: Array | int = 0,
) -> tuple[jax.Array, ExpertWeights]:
    """Gradients of `forward` for the cotangent `dy_AD`.

    `dw` are gradients of all weights, fp32, as `no_gradients` has them at this layer's rows.
    Returns dx_AD, and dw with this layer's gradients.
    """
    backend = _of_slots(backend, experts)
    groups = _group(backend, expert_A, experts)
    x_sorted, dy_sorted = x_AD[groups.order_A], dy_AD[groups.order_A]
    if backend == "loop":
        dx_AD, dw = grouped_loop.backward(x_sorted, groups, experts, hidden, dy_sorted, dw, layer)
    elif backend == PALLAS:
        dx_AD, dw = grouped_pallas.backward(x_sorted, groups, experts, dy_sorted, dw)
    else:
        kernel = grouped_ragged.KERNELS[backend]
        dx_AD, dw = grouped_ragged.backward(kernel, x_sorted, groups, experts, dy_sorted, dw)
    dx_AD = put_back(dx_AD, groups)
    return jnp.where(identity(expert_A, experts.sizes_E)[:, None], dy_AD, dx_AD), dw


def no_gradients(backend: str, weights: ExpertWeights) -> ExpertWeights:
    """What `backward` adds the gradients of layers to, for weights with slots of one size.

    Zeros, but the matrices of `PALLAS`, which writes a layer as a whole, are undefined.
    """
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    if backend != PALLAS:
        return zeros
    fc1_FD, fc2_FD = (lax.empty(w.shape, jnp.float32) for w in (weights.fc1_FD, weights.fc2_FD))
    return zeros._replace(fc1_FD=fc1_FD, fc2_FD=fc2_FD)


def all_gradients(backend: str, dw: ExpertWeights, n_experts: jax.Array) -> ExpertWeights:
    """The gradients after the last layer; those of experts from `n_experts` on are zero."""
    if backend != PALLAS:
        return dw
    total, width = dw.fc2_bias_ED.shape
    slot = dw.fc1_FD.shape[0] // total
    zeros = jnp.zeros((slot, width), jnp.float32)

    def without(expert, matrices):
        return [lax.dynamic_update_slice(x, zeros, (expert * slot, 0)) for x in matrices]

    with jax.named_scope(REST):
        matrices = lax.fori_loop(n_experts, total, without, [dw.fc1_FD, dw.fc2_FD])
    return dw._replace(fc1_FD=matrices[0], fc2_FD=matrices[1])


def _one_layer(
    backend: str, weights: ExpertWeights, sizes_E: jax.Array, slots: tuple[int, ...]
) -> LayerExperts:
    uniform = min(slots) == max(slots)
    if backend != "loop" and not uniform:  # ragged products read a whole slot of each
        weights = _with_rows(weights, sum(slots) + max(slots))
    offsets_E = jnp.asarray(np.cumsum([0, *slots[:-1]]), jnp.int32)
    return LayerExperts(weights, offsets_E, jnp.int32(0), sizes_E, slots, uniform=uniform)


def _with_rows(weights: ExpertWeights, n_rows: int) -> ExpertWeights:
    """Weights of experts side by side with other rows at the end, zeros, or without the last."""

    def resized(array: jax.Array) -> jax.Array:
        more = max(n_rows - array.shape[0], 0)
        return jnp.pad(array, ((0, more), *[(0, 0)] * (array.ndim - 1)))[:n_rows]

    fc1_FD, fc1_bias_F, fc2_FD = map(resized, weights[:3])
    return ExpertWeights(fc1_FD, fc1_bias_F, fc2_FD, weights.fc2_bias_ED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_ffn(backend, slots, x_AD, expert_A, weights, sizes_E):
    return forward(backend, x_AD, expert_A, _one_layer(backend, weights, sizes_E, slots), None)[0]


def _fwd(backend, slots, x_AD, expert_A, weights, sizes_E):
    shape = hidden_shape(x_AD.shape[0], len(slots), slots, backend)
    hidden = lax.empty((1, *shape), x_AD.dtype)
    experts = _one_layer(backend, weights, sizes_E, slots)
    y_AD, hidden = forward(backend, x_AD, expert_A, experts, hidden)
    return y_AD, (x_AD, expert_A, weights, sizes_E, hidden)


def _bwd(backend, slots, residuals, dy_AD):
    x_AD, expert_A, weights, sizes_E, hidden = residuals
    experts = _one_layer(backend, weights, sizes_E, slots)
    dw = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts.weights)
    dx_AD, dw = backward(backend, x_AD, expert_A, experts, hidden, dy_AD, dw)
    dw = _with_rows(dw, sum(slots))
    dw = jax.tree.map(lambda g, w: g.astype(w.dtype), dw, weights)
    return dx_AD, None, dw, None


_grouped_ffn.defvjp(_fwd, _bwd)
