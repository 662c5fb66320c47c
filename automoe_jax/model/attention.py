"""Multi-head attention with an elastic number of heads at a fixed Q/K/V width.

Letters: B batch, T queries, P segments of S keys each, M = P * S, H sub-heads, K sub-head size,
D embedding, Q the Q/K/V width.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from automoe_jax.architecture.active import Array
from automoe_jax.model.formulas import MASKED
from automoe_jax.model.layers import Width, compiled_widths, cut, keep_mask, xavier
from automoe_jax.ops.gated_dot import gated_dot

_PROBS = "attention probabilities"


class Segments(NamedTuple):
    """The active part of a memory; the rest enters no product."""

    span: Array  # [], active segments
    dim: Array  # [], active width


class Linear(nn.Module):
    """x @ kernel + bias with stated fans; the bias starts at zero."""

    features: int
    fans: tuple[int, int]

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: Segments | None = None, dims: tuple[int, ...] = ()
    ) -> jax.Array:
        """With `segments`, the leading axis of x is P and `dims` are the widths it can have."""
        kernel = self.param("kernel", xavier(*self.fans), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = kernel.astype(x.dtype)
        if segments is None:
            return (x @ kernel + bias).astype(x.dtype)  # so that its gradient is summed in fp32
        widths = compiled_widths(dims, math.prod(x.shape[1:-1]))
        y: Any = gated_dot(widths, segments.span, segments.dim, x, kernel)
        return (y + bias).astype(x.dtype)


class Attention(nn.Module):
    """Attention with `n_heads` heads, or with an active number of heads that divides it.

    Active heads: scores are computed at the finest split (`n_heads` sub-heads), then the scores of
    the sub-heads of each head are added up. A dot product over a head is the sum over its parts.
    """

    n_heads: int
    qkv_dim: int
    dropout_rate: float  # on attention probabilities
    memory_dims: tuple[int, ...] = ()  # the widths that a memory with `segments` can have

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        memory_PBSD: jax.Array | None,
        mask_BTM: jax.Array,
        *,
        active_width: Width | None = None,
        heads: Array | None = None,
        segments: Segments | None = None,
        bits_BHTM: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from `x_BTD` to `memory_PBSD`, or to itself where that is None.

        Inputs are zero beyond their active widths; the output is cut to `active_width`. The mask,
        broadcastable, is true where a query may attend. `heads`, [], and `segments` are the active
        ones, None for all; `bits_BHTM` are for dropout on the probabilities, None for no dropout.
        """
        n, q = self.n_heads, self.qkv_dim
        d = x_BTD.shape[-1]
        memory = x_BTD if memory_PBSD is None else memory_PBSD
        d_memory = memory.shape[-1]
        # The published models fuse Q, K and V into one matrix where their inputs have one width.
        fan_out = 3 * q if d == d_memory else q
        q_BTQ = Linear(q, (d, fan_out), name="query")(x_BTD)
        k_PBSQ, v_PBSQ = (
            Linear(q, (d_memory, fan_out), name=name)(memory, segments, self.memory_dims)
            for name in ("key", "value")
        )
        if memory_PBSD is None:
            k_PBSQ, v_PBSQ = k_PBSQ[None], v_PBSQ[None]
        qkv = (q_BTQ, k_PBSQ, v_PBSQ)
        q_BTHK, k_PBSHK, v_PBSHK = (y.reshape(*y.shape[:-1], n, q // n) for y in qkv)

        # The backward pass keeps the inputs and the probabilities; all between them is element-wise
        # or as small as a mask.
        core = jax.checkpoint(
            functools.partial(self._core, heads),
            prevent_cse=False,
            policy=jax.checkpoint_policies.save_only_these_names(_PROBS),
        )
        y_BTHK = core(q_BTHK, k_PBSHK, v_PBSHK, mask_BTM, bits_BHTM)
        y_BTD = Linear(d, (q, d), name="out")(y_BTHK.reshape(q_BTQ.shape))
        return cut(y_BTD, active_width)

    def _core(self, heads, q_BTHK, k_PBSHK, v_PBSHK, mask_BTM, bits_BHTM) -> jax.Array:
        """Mean of the values, weighted by the probabilities: (B, T, H, K)."""
        b, _, n, k = q_BTHK.shape
        scale = (n * k / (n if heads is None else heads)) ** -0.5
        # Transposed here, the products are plain batches of matrices; otherwise XLA transposes the
        # longer operand for each product.
        q_BHTK = (q_BTHK * scale).transpose(0, 2, 1, 3)
        kv = (k_PBSHK, v_PBSHK)
        k_BHMK, v_BHMK = (x.transpose(1, 3, 0, 2, 4).reshape(b, n, -1, k) for x in kv)
        scores_BHTM = jnp.einsum("BHTK,BHMK->BHTM", q_BHTK, k_BHMK).astype(jnp.float32)
        head_H = None
        if heads is not None:
            head_H = jnp.arange(n) // (n // heads)  # the head of each sub-head
            same_HH = (head_H[:, None] == head_H[None, :]).astype(scores_BHTM.dtype)
            # Batched: without B on both sides, the result has the heads last and is transposed.
            same_BHH = jnp.broadcast_to(same_HH, (b, n, n))
            scores_BHTM = jnp.einsum("BGH,BHTM->BGTM", same_BHH, scores_BHTM)
        scores_BHTM = jnp.where(mask_BTM[:, None], scores_BHTM, MASKED)
        probs_BHTM = jax.nn.softmax(scores_BHTM, axis=-1).astype(v_BHMK.dtype)
        probs_BHTM = checkpoint_name(probs_BHTM, _PROBS)
        if bits_BHTM is not None:
            keep_BHTM = keep_mask(bits_BHTM, self.dropout_rate)
            if head_H is not None:  # the sub-heads of a head drop together
                keep_BHTM = keep_BHTM[:, head_H]
            probs_BHTM = jnp.where(keep_BHTM, probs_BHTM / (1 - self.dropout_rate), 0)
        return jnp.einsum("BHTM,BHMK->BHTK", probs_BHTM, v_BHMK).transpose(0, 2, 1, 3)
