"""The feed-forward sublayer: router and experts, elastic in number, size and top_k.

Letters: N tokens, A assignments (tokens times top_k), D embedding, F columns of all experts,
E experts, K experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from automoe_jax.architecture.active import Array
from automoe_jax.model.layers import dropout, uniform, xavier
from automoe_jax.ops.grouped_ffn import grouped_ffn, identity
from automoe_jax.ops.grouping import ExpertWeights


class ExpertChoice(NamedTuple):
    """Active experts of one layer: their number, sizes and how many each token takes."""

    n_experts: Array  # []
    sizes_E: Array
    top_k: Array  # []


class Routing(NamedTuple):
    """Router output of one layer, for the load-balance loss and for tests."""

    logits_NE: jax.Array  # minus infinity for inactive experts
    expert_NK: jax.Array  # E where a token goes to none


class Route(NamedTuple):
    """Where each assignment goes and what its result counts."""

    p_NK: jax.Array
    expert_NK: jax.Array  # E where a token goes to none


def route(
    logits_NE: jax.Array, real_N: jax.Array, top_k: int, choice: ExpertChoice | None
) -> tuple[Route, Routing]:
    """The top k experts of each token with their probabilities, which are not renormalised.

    Args:
      logits_NE: the router's.
      real_N: bool; a padded token goes to none.
      top_k: most experts per token.
      choice: active experts, in a supernet.
    """
    n_experts = logits_NE.shape[-1]
    if choice is not None:
        active_E = jnp.arange(n_experts) < choice.n_experts
        logits_NE = jnp.where(active_E, logits_NE, -jnp.inf)
    p_NK, expert_NK = jax.lax.top_k(jax.nn.softmax(logits_NE, axis=-1), top_k)
    if choice is not None:
        taken_K = jnp.arange(top_k) < choice.top_k
        p_NK = jnp.where(taken_K, p_NK, 0)
        expert_NK = jnp.where(taken_K, expert_NK, n_experts)
    expert_NK = jnp.where(real_N[:, None], expert_NK, n_experts)
    return Route(p_NK, expert_NK), Routing(logits_NE, expert_NK)


def combine(
    y_AD: jax.Array,
    routed: Route,
    identity_A: jax.Array,
    dropout_rate: Array | float,
    bits_AD: jax.Array | None,
) -> jax.Array:
    """Sum over each token's experts, (N, D), of p times the expert's output.

    Dropout is on each expert's output before it is scaled; an identity expert returns its input
    undisturbed.
    """
    if bits_AD is not None:
        y_AD = jnp.where(identity_A[:, None], y_AD, dropout(y_AD, dropout_rate, bits_AD))
    y_NKD = y_AD.reshape(*routed.p_NK.shape, -1)
    return jnp.einsum("NK,NKD->ND", routed.p_NK, y_NKD)


class Experts(nn.Module):
    """y = sum over the top k experts of p_i * expert_i(x), p not renormalised; no token dropped.

    The experts of one layer of a stand-alone model; a supernet's are in `elastic`.

    Attributes:
      sizes: FFN size of each expert; 0 is an identity expert.
      top_k: experts per token.
    """

    sizes: tuple[int, ...]
    top_k: int

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        real_N: jax.Array,
        *,
        dropout_rate: Array | float = 0.0,
        bits_AD: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Runs each real token through its experts; padded tokens cost nothing and give zeros.

        Args:
          x_ND: tokens.
          real_N: bool, false for padding.
          dropout_rate: on each expert's output, before the scaling by p.
          bits_AD: random bits for dropout; None to leave it out.

        Returns:
          y_ND and the routing.
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
        logits_NE = jnp.zeros((n, 1))
        if n_experts > 1:
            bound = uniform(d**-0.5)
            kernel_DE = self.param("router", bound, (d, n_experts))
            logits_NE = x_ND @ kernel_DE + self.param("router_bias", bound, (n_experts,))
        routed, routing = route(logits_NE, real_N, self.top_k, None)
        sizes_E = np.array(self.sizes)
        expert_A = routed.expert_NK.reshape(-1)
        if n_experts == 1:
            y_AD = x_ND
            if weights is not None:
                h_NF = jax.nn.relu(x_ND @ weights.fc1_FD.T + weights.fc1_bias_F)
                y_AD = h_NF @ weights.fc2_FD + weights.fc2_bias_ED[0]
            y_AD = jnp.where(real_N[:, None], y_AD, 0)
        else:
            x_AD = jnp.repeat(x_ND, self.top_k, axis=0)
            if weights is not None:
                y_AD = grouped_ffn(x_AD, expert_A, weights, sizes_E, self.sizes)
            else:
                y_AD = jnp.where((expert_A < n_experts)[:, None], x_AD, 0)
        identity_A = identity(expert_A, sizes_E)
        return combine(y_AD, routed, identity_A, dropout_rate, bits_AD), routing


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
