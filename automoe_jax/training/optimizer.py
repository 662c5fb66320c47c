"""Adam and the published learning-rate schedule."""

import dataclasses
import math

import jax.numpy as jnp
import optax

from automoe_jax.errors import UserError

_MOST = {
    "initial_rate": math.inf,
    "peak_rate": math.inf,
    "final_rate": math.inf,
    "b1": 1.0,
    "b2": 1.0,
    "eps": math.inf,
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Rate: linear from `initial_rate` to `peak_rate` in `warmup_steps`, then cosine to
    `final_rate` at `steps`, and `final_rate` from there on (SEMANTICS: the published code jumps
    back to the peak for its last update). Adam without clipping or weight decay.
    """

    steps: int = 40_000
    warmup_steps: int = 10_000
    initial_rate: float = 1e-7
    peak_rate: float = 1e-3
    final_rate: float = 1e-7
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8

    def __post_init__(self):
        for name, most in _MOST.items():
            if not 0 <= getattr(self, name) < most:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 0 up to below {most:g}")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; at least 1 is needed")
        if not 0 <= self.warmup_steps <= self.steps:
            raise UserError(
                f"warmup_steps is {self.warmup_steps}; allowed: 0 to steps {self.steps}"
            )


def rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of update n, counted from 0."""
    w, u = config.warmup_steps, config.steps

    def schedule(n):
        n = jnp.asarray(n, jnp.float32)
        rise = config.initial_rate + n * (config.peak_rate - config.initial_rate) / max(w, 1)
        # (1 + cos(pi x)) / 2 as sin(pi (1 - x) / 2)^2: near the end, fp32 would cancel the cosine.
        left = jnp.clip((u - n) / max(u - w, 1), 0, 1)
        span = config.peak_rate - config.final_rate
        fall = config.final_rate + span * jnp.sin(0.5 * jnp.pi * left) ** 2
        return jnp.where(n < w, rise, fall)

    return schedule


def make(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam with the schedule."""
    return optax.adam(rate(config), b1=config.b1, b2=config.b2, eps=config.eps)
