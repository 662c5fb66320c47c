"""What `Transformer` and `Supernet` share besides blocks and word tables.

Letters: B batch, T target time, D embedding, V vocabulary, N tokens, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from automoe_jax.architecture.subnet import Subnet


class Output(NamedTuple):
    """Result of a teacher-forced pass; unused fields cost nothing under jit."""

    logits_BTV: jax.Array
    hidden_BTD: jax.Array  # the decoder's output, zero beyond the active width
    load_balance: jax.Array  # [], mean over the active layers
    encoder_layers: list[jax.Array]  # output of each layer; zeros beyond the active depth
    decoder_layers: list[jax.Array]
    router_logits: list[jax.Array]  # (N, E) per layer, encoder first


class DropoutKeys(NamedTuple):
    """Keys of one stack's dropout; None without dropout."""

    layers: list[jax.Array] | None
    embedding: jax.Array | None


def dropout_keys(arch: Subnet, key: jax.Array | None) -> tuple[DropoutKeys, DropoutKeys]:
    """The keys of encoder and decoder."""
    if key is None:
        return DropoutKeys(None, None), DropoutKeys(None, None)
    n_encoder = len(arch.encoder.layers) + 1
    keys = list(jax.random.split(key, n_encoder + len(arch.decoder.layers) + 1))
    encoder, decoder = keys[:n_encoder], keys[n_encoder:]
    return DropoutKeys(encoder[:-1], encoder[-1]), DropoutKeys(decoder[:-1], decoder[-1])


def longest_span(arch: Subnet) -> int:
    """The most encoder layers that a decoder layer attends to."""
    return max(layer.cross_span for layer in arch.decoder.layers)


def causal_mask(target_in_BT: jax.Array) -> jax.Array:
    """(1, T, T): true where decoder self-attention may look."""
    t = target_in_BT.shape[1]
    return jnp.tril(jnp.ones((1, t, t), bool))
