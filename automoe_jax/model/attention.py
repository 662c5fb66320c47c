"""Multi-head attention with an elastic number of heads at a fixed Q/K/V width.

Letters: B batch, T queries, S keys, H sub-heads, K sub-head size, D embedding, Q the Q/K/V width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from automoe_jax.formulas import MASKED
from automoe_jax.model.layers import Width, cut, keep_mask, xavier

# Added to masked scores: finite, so that a row with nothing to attend to stays finite too.


class Linear(nn.Module):
    """x @ kernel + bias with stated fans; the bias starts at zero."""

    features: int
    fans: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", xavier(*self.fans), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ kernel + bias


class Attention(nn.Module):
    """Attention at `n_heads` heads, or at an active divisor of it.

    With active heads, scores are computed at the finest split (`n_heads` sub-heads) and those of
    one head are added up: a dot product over a head is the sum of those over its parts.
    """

    n_heads: int
    qkv_dim: int
    dropout_rate: float

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        memory_BSD: jax.Array,
        mask_BTS: jax.Array,
        *,
        active: Width | None = None,
        heads: jax.Array | None = None,
        bits_BHTS: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from `x_BTD` to `memory_BSD`.

        Args:
          x_BTD: queries' input, cut to its active width.
          memory_BSD: keys' and values' input, cut to its own.
          mask_BTS: true where a query may look; broadcastable.
          active: width of the output.
          heads: [], active heads; None for `n_heads`.
          bits_BHTS: random bits for dropout on the probabilities; None to leave it out.

        Returns:
          (B, T, D), cut to `active`.
        """
        n, q = self.n_heads, self.qkv_dim
        d = x_BTD.shape[-1]
        d_memory = memory_BSD.shape[-1]
        # The published models have Q, K and V as one matrix where their inputs are of one width.
        fan_out = 3 * q if d == d_memory else q
        q_BTQ = Linear(q, (d, fan_out), name="query")(x_BTD)
        k_BSQ = Linear(q, (d_memory, fan_out), name="key")(memory_BSD)
        v_BSQ = Linear(q, (d_memory, fan_out), name="value")(memory_BSD)
        q_BTHK, k_BSHK, v_BSHK = (y.reshape(*y.shape[:2], n, q // n) for y in (q_BTQ, k_BSQ, v_BSQ))

        scale = (q / (n if heads is None else heads)) ** -0.5
        scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK * scale, k_BSHK)
        head_H = None
        if heads is not None:
            head_H = jnp.arange(n) // (n // heads)  # the head of each sub-head
            same_HH = (head_H[:, None] == head_H[None, :]).astype(scores_BHTS.dtype)
            # As a batched product: without the batch axis on both sides, the result comes out
            # with the heads last and has to be transposed.
            same_BHH = jnp.broadcast_to(same_HH, (scores_BHTS.shape[0], n, n))
            scores_BHTS = jnp.einsum("BGH,BHTS->BGTS", same_BHH, scores_BHTS)
        scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS, MASKED)
        probs_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
        if bits_BHTS is not None:
            keep_BHTS = keep_mask(bits_BHTS, self.dropout_rate)
            if head_H is not None:  # the sub-heads of a head drop together
                keep_BHTS = keep_BHTS[:, head_H]
            probs_BHTS = jnp.where(keep_BHTS, probs_BHTS / (1 - self.dropout_rate), 0)
        y_BTHK = jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS, v_BSHK)
        y_BTD = Linear(d, (q, d), name="out")(y_BTHK.reshape(q_BTQ.shape))
        return cut(y_BTD, active)
