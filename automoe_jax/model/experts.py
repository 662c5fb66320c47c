"""The feed-forward sublayer: router and experts, elastic in number, size and top_k.

Letters: N tokens, A assignments (tokens times top_k), D embedding, F columns of all experts,
E experts, K experts per token.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from automoe_jax.architecture.active import ActiveStack, Array
from automoe_jax.model.layers import dropout, uniform, xavier
from automoe_jax.ops.grouped_ffn import grouped_ffn, identity
from automoe_jax.ops.grouping import ExpertWeights


class Routing(NamedTuple):
    """Router output of one layer."""

    logits_NE: jax.Array  # minus infinity for inactive experts
    expert_NK: jax.Array  # E for a padded token or beyond the active top_k
    gate_NK: jax.Array  # factors on the outputs of these experts


def route(
    logits_NE: jax.Array, real_N: jax.Array, top_k: int, gate: str, row: ActiveStack | None
) -> Routing:
    """The top k experts of each token; padding, where `real_N` is false, has none.

    In a supernet, `top_k` is the largest and `row` this layer of the active stack. `gate` as in
    `SearchSpace`.
    """
    n_experts = logits_NE.shape[-1]
    n_active = n_experts if row is None else row.n_experts_L
    if row is not None:
        logits_NE = jnp.where(row.taken_LE[:n_experts], logits_NE, -jnp.inf)
    p_NK, expert_NK = jax.lax.top_k(jax.nn.softmax(logits_NE, axis=-1), top_k)
    if row is not None:
        taken_K = jnp.arange(top_k) < row.top_k_L
        p_NK = jnp.where(taken_K, p_NK, 0)
        expert_NK = jnp.where(taken_K, expert_NK, n_experts)
    expert_NK = jnp.where(real_N[:, None], expert_NK, n_experts)
    gate_NK = p_NK
    if gate == "count":
        gate_NK = p_NK * n_active
    elif gate == "normalised":
        gate_NK = p_NK / jax.lax.stop_gradient(jnp.sum(p_NK, axis=-1, keepdims=True))
    return Routing(logits_NE, expert_NK, gate_NK)


def rerouted(routing: Routing, sizes: tuple[int, ...], how: str, seed: int) -> Routing:
    """The same gates, and another expert for each token: to see what the router's choice is worth.

    "random" draws one by `seed`, whatever the token; "largest" takes the largest for all.
    """
    n_experts, shape = len(sizes), routing.expert_NK.shape
    other_NK = np.full(shape, int(np.argmax(sizes)))
    if how == "random":
        other_NK = np.random.default_rng(seed).integers(n_experts, size=shape)
    has_one = routing.expert_NK < n_experts
    return routing._replace(expert_NK=jnp.where(has_one, other_NK, routing.expert_NK))


def combine(
    y_AD, gate_NK, identity_A, ffn_scale: float, dropout_rate: Array | float, bits_AD
) -> jax.Array:
    """Sum over each token's experts of gate times `ffn_scale` times its output: (N, D).

    Dropout, unless `bits_AD` is None, applies to each expert's output before the scaling. Identity
    experts have neither dropout nor `ffn_scale`.
    """
    if bits_AD is not None:
        y_AD = jnp.where(identity_A[:, None], y_AD, dropout(y_AD, dropout_rate, bits_AD))
    if ffn_scale != 1:
        gate_NK = jnp.where(identity_A.reshape(gate_NK.shape), gate_NK, ffn_scale * gate_NK)
    y_NKD = y_AD.astype(jnp.float32).reshape(*gate_NK.shape, -1)
    return jnp.einsum("NK,NKD->ND", gate_NK, y_NKD).astype(y_AD.dtype)


class Experts(nn.Module):
    """y = sum over the top k experts of gate_i * ffn_scale * expert_i(x); no token dropped.

    `SearchSpace` says what gate and scale are.

    Initialises a layer's weights, and runs it in a stand-alone model; a supernet's layers run in
    `elastic_stack`.
    """

    sizes: tuple[int, ...]  # FFN size of each expert; 0 is an identity expert
    top_k: int
    ffn_scale: float
    gate: str = "probability"
    jitter: float = 0.0
    routing: str = "learned"  # or how each token's expert is chosen instead, see `rerouted`

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        real_N: jax.Array,
        *,
        dropout_rate: Array | float = 0.0,
        bits_AD: jax.Array | None = None,
        jitter_bits_ND: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing]:
        """(y_ND, routing). Padding, where `real_N` is false, costs nothing and gives zeros."""
        n, d = x_ND.shape
        n_experts, total, largest = len(self.sizes), sum(self.sizes), max(self.sizes)
        weights = None
        if total:  # a layer of identity experts alone has none
            weights = ExpertWeights(
                self.param("fc1", xavier(d, largest), (total, d)),
                self.param("fc1_bias", nn.initializers.zeros, (total,)),
                self.param("fc2", xavier(largest, d), (total, d)),
                self.param("fc2_bias", nn.initializers.zeros, (n_experts, d)),
            ).of_dtype(x_ND.dtype)
        logits_NE = jnp.zeros((n, 1))
        if n_experts > 1:
            bound = uniform(d**-0.5)
            kernel_DE = self.param("router", bound, (d, n_experts))
            seen_ND = jittered(x_ND.astype(jnp.float32), self.jitter, jitter_bits_ND)
            logits_NE = router_product(seen_ND, kernel_DE) + self.param(
                "router_bias", bound, (n_experts,)
            )
        routing = route(logits_NE, real_N, self.top_k, self.gate, None)
        if self.routing != "learned" and n_experts > 1:
            seed = zlib.crc32("/".join(self.path).encode())
            routing = rerouted(routing, self.sizes, self.routing, seed)
        sizes_E = np.array(self.sizes)
        expert_A = routing.expert_NK.reshape(-1)
        if n_experts == 1:
            y_AD = x_ND
            if weights is not None:
                h_NF = jax.nn.relu(x_ND @ weights.fc1_FD.T + weights.fc1_bias_F)
                y_AD = h_NF.astype(x_ND.dtype) @ weights.fc2_FD + weights.fc2_bias_ED[0]
            y_AD = jnp.where(real_N[:, None], y_AD, 0).astype(x_ND.dtype)
        else:
            x_AD = jnp.repeat(x_ND, self.top_k, axis=0)
            if self.is_initializing():  # weights are wanted, not outputs
                y_AD = jnp.zeros_like(x_AD)
            elif weights is not None:
                y_AD = grouped_ffn(x_AD, expert_A, weights, sizes_E, self.sizes)
            else:
                y_AD = jnp.where((expert_A < n_experts)[:, None], x_AD, 0)
        identity_A = identity(expert_A, sizes_E)
        scales = self.ffn_scale, dropout_rate, bits_AD
        return combine(y_AD, routing.gate_NK, identity_A, *scales), routing


def router_product(x_ND: jax.Array, router_DE: jax.Array) -> jax.Array:
    """x @ router in fp32, which accelerators would else round to bfloat16."""
    return jnp.matmul(x_ND, router_DE, precision=jax.lax.Precision.HIGHEST)


class RouterLosses(NamedTuple):
    """Auxiliary losses of routers: of one layer, [], or of several, (L,)."""

    load_balance: jax.Array
    z: jax.Array


def router_losses(routing: Routing, real_N: jax.Array) -> RouterLosses:
    """The losses of one layer."""
    return RouterLosses(load_balance(routing, real_N), z_loss(routing, real_N))


def z_loss(routing: Routing, real_N: jax.Array) -> jax.Array:
    """Router z-loss of one layer, [] (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, eq. 5).

    Mean over real tokens of the squared log of the sum of the exponentials of the logits. 0 where a
    layer has one expert, and so no router.
    """
    active_E = jnp.isfinite(routing.logits_NE[0])
    log_z_N = jax.nn.logsumexp(routing.logits_NE, axis=-1)
    mean = jnp.sum(jnp.where(real_N, log_z_N**2, 0)) / jnp.maximum(jnp.sum(real_N), 1)
    return jnp.where(jnp.sum(active_E) > 1, mean, 0.0)


def router_entropy(logits_NE: jax.Array) -> jax.Array:
    """(N,): entropy of each token's router probabilities in nats; logits may be minus infinity."""
    log_p_NE = jax.nn.log_softmax(logits_NE, axis=-1)
    return -jnp.sum(jnp.exp(log_p_NE) * jnp.where(log_p_NE > -jnp.inf, log_p_NE, 0), axis=-1)


def jittered(x_ND: jax.Array, jitter: float, bits_ND: jax.Array | None) -> jax.Array:
    """A router's input times noise, uniform in 1 +- `jitter` (Switch Transformer, app. C).

    Unchanged without bits.
    """
    if bits_ND is None:
        return x_ND
    return x_ND * (1 - jitter + bits_ND.astype(x_ND.dtype) * (2 * jitter / 2**16))


def load_balance(routing: Routing, real_N: jax.Array) -> jax.Array:
    """Load-balance loss of one layer, [] (Switch Transformer, eq. 4-6): E * sum_i f_i P_i.

    E: active experts; f_i: share of the real tokens' assignments that go to expert i; P_i: its mean
    router probability over real tokens. The minimum, 1, is perfect balance.
    """
    n_experts = routing.logits_NE.shape[-1]
    p_NE = jax.nn.softmax(routing.logits_NE, axis=-1) * real_N[:, None]
    n_real = jnp.maximum(jnp.sum(real_N), 1)
    count_E = jnp.bincount(routing.expert_NK.reshape(-1), length=n_experts + 1)[:n_experts]
    f_E = count_E / jnp.maximum(jnp.sum(count_E), 1)
    active = jnp.sum(jnp.isfinite(routing.logits_NE[0]))
    return active * jnp.sum(f_E * jnp.sum(p_NE, axis=0) / n_real)
