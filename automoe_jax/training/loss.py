"""Label-smoothed cross-entropy, summed over target tokens. Letters: B batch, T time, V words."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from automoe_jax.architecture.ids import EOS_ID, PAD_ID


class LossSums(NamedTuple):
    """Sums over real target tokens, eos included; natural logarithm. All []."""

    loss: jax.Array  # label-smoothed
    nll: jax.Array
    tokens: jax.Array


def smoothed_cross_entropy(
    logits_BTV: jax.Array, target_BT: jax.Array, smoothing: float
) -> LossSums:
    """(1 - smoothing) * nll + smoothing / V * sum over all V words of -log p; pads left out.

    V counts the pad column, as the published models do.
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


def decoder_input(target_BT: jax.Array) -> jax.Array:
    """The target moved right behind an eos; pads stay pads."""
    moved_BT = jnp.pad(target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=EOS_ID)
    return jnp.where(target_BT == PAD_ID, PAD_ID, moved_BT)
