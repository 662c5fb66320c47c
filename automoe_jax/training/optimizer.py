"""Adam and its learning-rate schedules."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from automoe_jax.architecture.active import Array
from automoe_jax.system.platforms import platform
from automoe_jax.training.config import OptimizerConfig


def rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of update n, counted from 0."""
    w, u = config.warmup_steps, config.steps
    span = config.peak_rate - config.final_rate

    def fall(n):
        if config.schedule == "inverse_sqrt":
            own = config.peak_rate * jnp.sqrt(max(w, 1) / jnp.maximum(n, max(w, 1)))
            return jnp.maximum(own, config.final_rate)
        left = jnp.clip((u - n) / max(u - w, 1), 0, 1)
        if config.schedule == "cosine":
            # (1 + cos(pi x)) / 2 as sin(pi (1 - x) / 2)^2: near the end, fp32 would cancel the
            # cosine.
            left = jnp.sin(0.5 * jnp.pi * left) ** 2
        return config.final_rate + span * left

    def schedule(n):
        n = jnp.asarray(n, jnp.float32)
        rise = config.initial_rate + n * (config.peak_rate - config.initial_rate) / max(w, 1)
        return jnp.where(n < w, rise, fall(n))

    return schedule


class Adam(NamedTuple):
    """`optax.adam` with the schedule, plus the config, so `apply` can do it in fewer passes."""

    init: Any
    update: Any
    config: OptimizerConfig


def make(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam with the schedule."""
    tx = optax.adam(rate(config), b1=config.b1, b2=config.b2, eps=config.eps)
    return cast(optax.GradientTransformation, Adam(tx.init, tx.update, config))


def apply(tx: Any, gradient: Any, opt_state: Any, params: Any, finite: Array) -> tuple[Any, Any]:
    """One update by `tx`, from `make` or any other transformation: (params, optimizer state).

    Both stay as they are where `finite`, (), is false.

    On a CPU Adam is bound by memory traffic. XLA would compute the new moments twice, once to store
    them and once for the weights, and copy the old ones first: three times the time.
    """
    if not isinstance(tx, Adam) or platform() != "cpu":
        updates, new_state = tx.update(gradient, opt_state, params)
        updated = optax.apply_updates(params, updates), new_state
        choose = functools.partial(jnp.where, finite)
        return jax.tree.map(choose, updated, (params, opt_state))
    adam, *others = opt_state
    config, one = tx.config, jnp.asarray(finite, jnp.int32)
    count = adam.count + one

    def moments(_, carry):
        m, v, c1, c2 = carry
        m = jax.tree.map(lambda m, g: config.b1 * m + c1 * g, m, gradient)
        v = jax.tree.map(lambda v, g: config.b2 * v + (c2 * g) * g, v, gradient)
        return m, v, 0.5 * c1, 0.5 * c2

    def weights(_, carry):
        params, step, unbias = carry
        params = jax.tree.map(
            lambda p, m, v: p - step * m / (jnp.sqrt(v * unbias) + config.eps), params, m, v
        )
        return params, 0.5 * step, 0.5 * unbias

    # Loops of one round, or none, which XLA cannot know: it stores the moments before it computes
    # the weights from them, and both loops work in place. The loops change the factors; otherwise
    # XLA would hoist their products with gradients and moments out of the loops and store them too.
    factors = jnp.float32(1 - config.b1), jnp.float32(1 - config.b2)
    m, v, *_ = lax.fori_loop(0, one, moments, (adam.mu, adam.nu, *factors))
    step = rate(config)(adam.count) / (1 - config.b1**count)
    unbias = 1 / (1 - config.b2**count)
    params, *_ = lax.fori_loop(0, one, weights, (params, step, unbias))
    others = jax.tree.map(lambda counter: counter + one, tuple(others))
    return params, (adam._replace(count=count, mu=m, nu=v), *others)
