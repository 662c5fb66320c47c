"""The feed-forward sublayer: router and experts, elastic in number, size and top_k.

Letters: N tokens, A assignments (tokens times top_k), D embedding, F columns of all experts,
E experts, K experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from automoe_jax.choice import Array
from automoe_jax.model.layers import dropout, uniform, xavier
from automoe_jax.ops.grouped_ffn import ExpertWeights, grouped_ffn


class ExpertChoice(NamedTuple):
    """Active experts of one layer: their number, sizes and how many each token takes."""

    n_experts: Array  # []
    sizes_E: Array
    top_k: Array  # []


class Routing(NamedTuple):
    """Router output of one layer, for the load-balance loss and for tests."""

    logits_NE: jax.Array  # minus infinity for inactive experts
    expert_NK: jax.Array  # E where a token goes to none


class Experts(nn.Module):
    """y = sum over the top k experts of p_i * expert_i(x), p not renormalised; no token dropped.

    Attributes:
      sizes: FFN size of each expert; 0 is an identity expert. In a supernet the largest sizes.
      top_k: experts per token; in a supernet the largest choice.
    """

    sizes: tuple[int, ...]
    top_k: int

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        real_N: jax.Array,
        choice: ExpertChoice | None = None,
        *,
        dropout_rate: Array | float = 0.0,
        bits_AD: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Runs each real token through its experts; padded tokens cost nothing and give zeros.

        Args:
          x_ND: tokens, cut to the active width.
          real_N: bool, false for padding.
          choice: active experts, in a supernet.
          dropout_rate: on each expert's output, before the scaling by p.
          bits_AD: random bits for dropout; None to leave it out.

        Returns:
          y_ND, zero or bias beyond the active width (the caller cuts it), and the routing.
        """
        n, d = x_ND.shape
        n_experts, total = len(self.sizes), sum(self.sizes)
        largest = max(self.sizes)
        weights = None
        if total:  # a layer of identity experts alone has none
            weights = ExpertWeights(
                self.param("fc1", xavier(d, largest), (total, d)),
                self.param("fc1_bias", nn.initializers.zeros, (total,)),
                self.param("fc2", xavier(largest, d), (total, d)),
                self.param("fc2_bias", nn.initializers.zeros, (n_experts, d)),
            )
        if n_experts == 1 and choice is None:
            routing = Routing(jnp.zeros((n, 1)), jnp.where(real_N, 0, 1)[:, None])
            if weights is None:
                return jnp.where(real_N[:, None], x_ND, 0), routing
            h_NF = jax.nn.relu(x_ND @ weights.fc1_FD.T + weights.fc1_bias_F)
            y_ND = h_NF @ weights.fc2_FD + weights.fc2_bias_ED[0]
            y_ND = dropout(y_ND, dropout_rate, bits_AD)
            return jnp.where(real_N[:, None], y_ND, 0), routing

        sizes_E = jnp.asarray(self.sizes, jnp.int32) if choice is None else choice.sizes_E
        offsets_E = jnp.asarray(np.cumsum([0, *self.sizes[:-1]]), jnp.int32)
        logits_NE = jnp.zeros((n, 1))
        if n_experts > 1:
            bound = uniform(d**-0.5)
            kernel_DE = self.param("router", bound, (d, n_experts))
            logits_NE = x_ND @ kernel_DE + self.param("router_bias", bound, (n_experts,))
        if choice is not None:
            active_E = jnp.arange(n_experts) < choice.n_experts
            logits_NE = jnp.where(active_E, logits_NE, -jnp.inf)
        p_NK, expert_NK = jax.lax.top_k(jax.nn.softmax(logits_NE, axis=-1), self.top_k)
        if choice is not None:
            taken_K = jnp.arange(self.top_k) < choice.top_k
            p_NK = jnp.where(taken_K, p_NK, 0)
            expert_NK = jnp.where(taken_K, expert_NK, n_experts)
        expert_NK = jnp.where(real_N[:, None], expert_NK, n_experts)

        expert_A = expert_NK.reshape(-1)
        x_AD = jnp.repeat(x_ND, self.top_k, axis=0)
        if weights is not None:
            y_AD = grouped_ffn(x_AD, expert_A, weights, offsets_E, sizes_E, largest)
        else:
            y_AD = jnp.where((expert_A < n_experts)[:, None], x_AD, 0)
        if bits_AD is not None:
            # An identity expert returns its input, undisturbed.
            identity_A = jnp.append(sizes_E == 0, True)[expert_A]
            y_AD = jnp.where(identity_A[:, None], y_AD, dropout(y_AD, dropout_rate, bits_AD))
        y_NKD = y_AD.reshape(n, self.top_k, d)
        return jnp.einsum("NK,NKD->ND", p_NK, y_NKD), Routing(logits_NE, expert_NK)


def load_balance(routing: Routing, real_N: jax.Array) -> jax.Array:
    """Load-balance loss of one layer, [] (Switch Transformer, eq. 4-6): E * sum_i f_i P_i.

    E counts the active experts; f_i is the share of the real tokens' assignments that expert i
    gets, P_i its mean router probability over real tokens. At least 1, which is perfect balance.
    """
    n_experts = routing.logits_NE.shape[-1]
    p_NE = jax.nn.softmax(routing.logits_NE, axis=-1) * real_N[:, None]
    n_real = jnp.maximum(jnp.sum(real_N), 1)
    count_E = jnp.bincount(routing.expert_NK.reshape(-1), length=n_experts + 1)[:n_experts]
    f_E = count_E / jnp.maximum(jnp.sum(count_E), 1)
    active = jnp.sum(jnp.isfinite(routing.logits_NE[0]))
    return active * jnp.sum(f_E * jnp.sum(p_NE, axis=0) / n_real)
