"""Plain implementations that tests compare with."""

import jax
import jax.numpy as jnp

from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.training.step import LossSums


def smoothed_cross_entropy(
    logits_BTV: jax.Array, target_BT: jax.Array, smoothing: float
) -> LossSums:
    """(1 - smoothing) * nll + smoothing / V * sum over all V words of -log p, without pads.

    V includes the pad column, as in the published models.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    nll_BT = log_z_BT - chosen_BT
    uniform_BT = log_z_BT - jnp.mean(logits_BTV, axis=-1)
    loss_BT = (1 - smoothing) * nll_BT + smoothing * uniform_BT
    real_BT = target_BT != PAD_ID
    return LossSums(
        jnp.sum(loss_BT * real_BT), jnp.sum(nll_BT * real_BT), jnp.sum(real_BT).astype(jnp.float32)
    )
