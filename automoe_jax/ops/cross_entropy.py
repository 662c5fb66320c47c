"""Label-smoothed cross-entropy of an output layer, without an array of tokens times words.

Letters: N tokens, C tokens of a chunk, D embedding, V words.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.active import Array
from automoe_jax.system.platforms import platform

# Each chunk reads and writes the table's gradient (V x D) once and its logits several times: from
# 256 to 1,024 tokens the time differs by 5 % on 2 cores, the memory by a factor of 4.
CHUNK_CPU, CHUNK_ACCELERATOR = 512, 4096
# The name of the loop over chunks in a compiled program: their number, and the width.
CHUNKS = "{}_chunks_of_width_{}"


class Teacher(NamedTuple):
    """A model whose predictions of the same tokens are soft targets; no gradient reaches it."""

    h_ND: jax.Array  # its hidden activations, of its table's width or less
    weight: Array | float  # share of the soft targets in the loss, []
    temperature: float = 1.0
    table_VD: jax.Array | None = None  # of its output layer; None for the student's own


class _Soft(NamedTuple):
    """A `Teacher` whose rows are those of the chunks."""

    h_ND: jax.Array
    weight: jax.Array
    table_VD: jax.Array | None


class _Softmax(NamedTuple):
    p_CV: jax.Array
    log_z_C: jax.Array  # logarithm of the sum of the exponentials


class _Static(NamedTuple):
    smoothing: float
    dims: tuple[int, ...]
    chunk: int
    temperature: float


def chunked_cross_entropy(
    h_ND: jax.Array,
    table_VD: jax.Array,
    target_N: jax.Array,
    real_N: jax.Array,
    smoothing: float,
    dim: Array | None = None,
    dims: tuple[int, ...] = (),
    teacher: Teacher | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums of the loss and of the negative log-likelihood over real tokens, natural logarithm.

    loss = (1 - smoothing) * nll + smoothing / V * sum over all V words of -log p.

    With a teacher of weight w and temperature T, loss = (1 - w) * that + w * T^2 * (cross-entropy
    of the model's softmax at T under the teacher's at T); its gradient is that of the divergence
    in Hinton et al. 2015 (arXiv 1503.02531). The teacher's logits are computed again, chunk by
    chunk, from its hidden activations.

    Products have the dtype of `h_ND`; logits, losses and the table's gradient are fp32.

    Tokens are processed in chunks. With a gradient, each chunk's gradient of the logits is turned
    into those of `h_ND` and `table_VD` at once, so logits are computed once and never stored.

    `real_N` is false for padding. `h_ND` is zero beyond its active width `dim`, [], traced, one of
    `dims`; None stands for the full width. Columns of the table beyond it are unused.

    Returns loss and nll, []; nll has no gradient.
    """
    n, d = h_ND.shape
    on_cpu = platform() == "cpu"
    chunk = CHUNK_CPU if on_cpu else CHUNK_ACCELERATOR
    # Chunks of one size, each a multiple of 8 rows. Of a single one, compilers for accelerators
    # compute all loops, every width and both kinds: nothing in it depends on the loop.
    one_loop = len(dims) < 2 and teacher is None
    n_chunks = max(math.ceil(n / chunk), 1 if on_cpu or one_loop else 2)
    chunk = math.ceil(n / n_chunks / 8) * 8
    pad = n_chunks * chunk - n
    h_ND = jnp.pad(h_ND, ((0, pad), (0, 0)))
    target_N, real_N = jnp.pad(target_N, (0, pad)), jnp.pad(real_N, (0, pad))
    temperature, soft = 1.0, None
    if teacher is not None:
        temperature = teacher.temperature
        taught_ND = jnp.pad(teacher.h_ND, ((0, pad), (0, 0)))
        soft = _Soft(taught_ND, jnp.float32(teacher.weight), teacher.table_VD)
    if dim is None:
        dim, dims = jnp.int32(d), (d,)
    static = _Static(smoothing, tuple(dims), chunk, temperature)
    sums: Any = _sums(static, h_ND, table_VD, target_N, real_N, dim, soft)
    loss, nll = sums
    return loss, lax.stop_gradient(nll)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: _Static, h_ND, table_VD, target_N, real_N, dim, soft):
    table_VD = table_VD.astype(h_ND.dtype)

    def one(w, soft, i, sums):
        h_CD, table, target_C, real_C = _chunk(static, w, i, h_ND, table_VD, target_N, real_N)
        logits_CV = _dot(h_CD, table.T)
        (loss, nll), softmax = _logit_sums(logits_CV, target_C, real_C, static.smoothing)
        if soft is not None:
            targets_CV = _soft_targets(static, i, soft, table_VD)
            own, _ = _soft_sums(static, logits_CV, softmax, targets_CV, real_C)
            loss = _mix(soft, loss, own)
        return jax.tree.map(jnp.add, sums, (loss, nll))

    return _each_chunk(static, h_ND, dim, soft, one, (jnp.float32(0), jnp.float32(0)))


def _fwd(static: _Static, h_ND, table_VD, target_N, real_N, dim, soft):
    n_words, given = table_VD.shape[0], table_VD.dtype
    table_VD = table_VD.astype(h_ND.dtype)
    smoothing, chunk = static.smoothing, static.chunk

    def one(w, soft, i, carry):
        sums, dh_ND, dtable_VD = carry
        h_CD, table, target_C, real_C = _chunk(static, w, i, h_ND, table_VD, target_N, real_N)
        logits_CV = _dot(h_CD, table.T)
        (loss, nll), softmax = _logit_sums(logits_CV, target_C, real_C, smoothing)
        d_CV = jnp.where(real_C[:, None], softmax.p_CV - smoothing / n_words, 0)
        d_CV = _add_at(d_CV, target_C, -(1 - smoothing) * real_C)
        if soft is not None:
            targets_CV = _soft_targets(static, i, soft, table_VD)
            own, own_d_CV = _soft_sums(static, logits_CV, softmax, targets_CV, real_C)
            loss, d_CV = _mix(soft, loss, own), _mix(soft, d_CV, own_d_CV)
        d_CV = d_CV.astype(h_CD.dtype)
        dh_ND = lax.dynamic_update_slice(dh_ND, _dot(d_CV, table), (i * chunk, 0))
        old = lax.dynamic_slice(dtable_VD, (0, 0), (n_words, w))
        dtable_VD = lax.dynamic_update_slice(dtable_VD, old + _dot(d_CV.T, h_CD), (0, 0))
        return jax.tree.map(jnp.add, sums, (loss, nll)), dh_ND, dtable_VD

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (h_ND, table_VD)]
    carry = ((jnp.float32(0), jnp.float32(0)), *zeros)
    sums, dh_ND, dtable_VD = _each_chunk(static, h_ND, dim, soft, one, carry)
    return sums, (dh_ND.astype(h_ND.dtype), dtable_VD.astype(given))


def _bwd(static: _Static, residuals, cotangents):
    loss, _ = cotangents
    dh_ND, dtable_VD = residuals
    return (dh_ND * loss).astype(dh_ND.dtype), dtable_VD * loss, None, None, None, None


_sums.defvjp(_fwd, _bwd)


def _add_at(x_CV, at_C, value_C):
    """Adds a value to one column of each row."""
    if platform() == "cpu":
        return x_CV.at[jnp.arange(x_CV.shape[0]), at_C].add(value_C)
    # An accelerator would copy the whole array for it; a choice is part of the pass that makes x.
    own_CV = jnp.arange(x_CV.shape[1]) == at_C[:, None]
    return jnp.where(own_CV, x_CV + value_C[:, None], x_CV)


def _soft_targets(static: _Static, i, soft: _Soft, table_VD):
    """The teacher's softmax at the temperature, of a chunk."""
    table_VD = table_VD if soft.table_VD is None else soft.table_VD
    h_CD = lax.dynamic_slice_in_dim(soft.h_ND, i * static.chunk, static.chunk)
    table_VD = table_VD.astype(h_CD.dtype)
    return _softmax(_dot(h_CD, table_VD[:, : h_CD.shape[1]].T) / static.temperature).p_CV


def _soft_sums(static: _Static, logits_CV, softmax: _Softmax, targets_CV, real_C):
    """(sum of the loss under soft targets, its gradient by the logits)."""
    if static.temperature != 1:
        logits_CV /= static.temperature
        softmax = _softmax(logits_CV)
    loss_C = softmax.log_z_C - jnp.sum(targets_CV * logits_CV, axis=-1)
    d_CV = static.temperature * (softmax.p_CV - targets_CV)
    loss = static.temperature**2 * jnp.sum(loss_C * real_C)
    return loss, jnp.where(real_C[:, None], d_CV, 0)


def _mix(soft: _Soft, hard, own):
    return (1 - soft.weight) * hard + soft.weight * own


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _each_chunk(static: _Static, h_ND, dim, soft: _Soft | None, one, carry):
    """Runs `one(width, teacher, chunk index, carry)` for each chunk, at the active width.

    A teacher without weight, as that of a sandwich's first subnet, is None there, so not computed.
    """
    all_chunks = h_ND.shape[0] // static.chunk
    for w in static.dims:
        for given in (None,) if soft is None else (None, soft):
            active = dim == w
            if soft is not None:
                active &= (soft.weight == 0) == (given is None)
            n_chunks = jnp.where(active, all_chunks, 0)
            # Counted in a compiled program as if each batch had the teacher.
            counted = all_chunks if given is soft else 0
            with jax.named_scope(CHUNKS.format(counted, w)):
                carry = lax.fori_loop(0, n_chunks, functools.partial(one, w, given), carry)
    return carry


def _chunk(static: _Static, w, i, h_ND, table_VD, target_N, real_N):
    chunk = static.chunk
    h_CD = lax.dynamic_slice(h_ND, (i * chunk, 0), (chunk, w))
    target_C, real_C = (lax.dynamic_slice(x, (i * chunk,), (chunk,)) for x in (target_N, real_N))
    return h_CD, table_VD[:, :w], target_C, real_C


def _softmax(logits_CV) -> _Softmax:
    most_C1 = jnp.max(logits_CV, axis=-1, keepdims=True)
    e_CV = jnp.exp(logits_CV - most_C1)
    z_C1 = jnp.sum(e_CV, axis=-1, keepdims=True)
    return _Softmax(e_CV * (1 / z_C1), (most_C1 + jnp.log(z_C1))[:, 0])


def _logit_sums(logits_CV, target_C, real_C, smoothing):
    """((loss, nll) sums, softmax of the logits)."""
    softmax = _softmax(logits_CV)
    log_z_C = softmax.log_z_C
    nll_C = log_z_C - jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
    uniform_C = log_z_C - jnp.mean(logits_CV, axis=-1)
    loss_C = (1 - smoothing) * nll_C + smoothing * uniform_C
    return (jnp.sum(loss_C * real_C), jnp.sum(nll_C * real_C)), softmax
