"""Inference of the Evolved Transformer by XLA's operations: as `xla_engine`, which see for letters.

Convolutions of the decoder keep what they saw, as attention keeps keys and values. W: positions of
a convolution, C: its channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.evolved import DEPTHWISE, NARROW
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.architecture.subnet import DecoderLayer, EncoderLayer, doubled_heads
from automoe_jax.decoding import xla_engine
from automoe_jax.decoding.xla_engine import (
    Arrays,
    DenseCache,
    DenseMemory,
    DenseScope,
    Encoded,
    ModelSpec,
    Request,
)
from automoe_jax.ops.convolution import add_front, depthwise, shifted

# Whether the beam search moves unfinished sentences to the front.
COMPACTS = False
# The output layer is the same.
candidates = xla_engine.candidates


class CellCache(NamedTuple):
    """What a decoder cell keeps of the words so far."""

    first: DenseCache
    own: DenseCache
    branches_RTC: jax.Array  # inputs of the convolutions side by side
    joined_RTC: jax.Array  # inputs of the one on their sum


def start(weights: Arrays, spec: ModelSpec, source_BS: jax.Array) -> Encoded:
    """Runs the encoder, and the keys and values of both attentions to it, once per sentence."""
    real_BS = source_BS != PAD_ID
    x_BSD = xla_engine.source_rows(weights, spec, source_BS)
    for i, layer in enumerate(spec.subnet.encoder.layers):
        x_BSD = _encoder_cell(DenseScope(weights, f"encoder.{i}"), layer, x_BSD, real_BS)
    x_BSD = DenseScope(weights, "encoder").norm("norm", x_BSD)
    memory: list[DenseMemory] = []
    for i, layer in enumerate(spec.subnet.decoder.layers):
        scope = DenseScope(weights, f"decoder.{i}")
        for name in ("first_cross_kv", "cross_kv"):
            kv = scope.linear(name, x_BSD)
            memory.append(xla_engine.dense_memory(kv, layer.cross_heads, real_BS))
    return Encoded(memory, xla_engine.allowed_words(weights, source_BS))


def _encoder_cell(
    scope: DenseScope, layer: EncoderLayer, x_BSD: jax.Array, real_BS: jax.Array
) -> jax.Array:
    values, gates = jnp.split(scope.linear("gated", scope.norm("gated_norm", x_BSD)), 2, axis=-1)
    x_BSD += values * jax.nn.sigmoid(gates)

    y_BSD = jnp.where(real_BS[..., None], scope.norm("branches_norm", x_BSD), 0)
    wide = jax.nn.relu(scope.linear("wide", y_BSD))
    near = jnp.concatenate(shifted(y_BSD, NARROW), axis=-1)
    y_BSC = scope.norm("joined_norm", add_front(wide, jax.nn.relu(scope.linear("narrow", near))))
    y_BSC = jnp.where(real_BS[..., None], y_BSC, 0)
    y_BSC = depthwise(y_BSC, scope("joined.depthwise"))
    x_BSD = add_front(x_BSD, scope.linear("joined", y_BSC))

    y_BSD = scope.norm("self_attention_norm", x_BSD)
    y_BSQ = xla_engine.source_attention(scope, layer.heads, y_BSD, real_BS)
    x_BSD += scope.linear("self_out", y_BSQ)
    h_BSF = jax.nn.relu(scope.linear("fc1", scope.norm("ffn_norm", x_BSD)))
    return x_BSD + scope.linear("fc2", h_BSF)


def empty_caches(spec: ModelSpec, rows, time) -> list[CellCache]:
    """Zeroed caches of `rows` hypotheses and `time` steps (which may be symbolic)."""
    d, q = spec.subnet.decoder.embed_dim, spec.subnet.qkv_dim
    return [
        CellCache(
            xla_engine.empty_cache(rows, time, doubled_heads(layer.self_heads), q),
            xla_engine.empty_cache(rows, time, layer.self_heads, q),
            jnp.zeros((rows, time, d), jnp.float32),
            jnp.zeros((rows, time, 2 * d), jnp.float32),
        )
        for layer in spec.subnet.decoder.layers
    ]


def decode(
    weights: Arrays, spec: ModelSpec, request: Request, caches: list[CellCache], encoded: Encoded
) -> tuple[jax.Array, list[CellCache]]:
    """A step of the decoder's layers; as `xla_engine.decode`."""
    x_RD, row_RT = xla_engine.decoder_rows(weights, spec, request)
    new_caches = []
    for i, layer in enumerate(spec.subnet.decoder.layers):
        scope, memory = DenseScope(weights, f"decoder.{i}"), encoded.memory[2 * i : 2 * i + 2]
        cell = _DecoderCell(scope, layer, request, row_RT, memory)
        x_RD, cache = cell.run(x_RD, caches[i])
        new_caches.append(cache)
    return DenseScope(weights, "decoder").norm("norm", x_RD), new_caches


class _DecoderCell(NamedTuple):
    """A step of one decoder cell."""

    scope: DenseScope
    layer: DecoderLayer
    request: Request
    row_RT: jax.Array
    memory: list[DenseMemory]  # of its two attentions to the encoder

    def run(self, x_RD: jax.Array, cache: CellCache) -> tuple[jax.Array, CellCache]:
        """The cell's output, and the cache with this step."""
        scope, step, row_RT = self.scope, self.request.step, self.row_RT
        y_RD = scope.norm("first_norm", x_RD)
        qkv = scope.linear("first_qkv", y_RD)
        heads = doubled_heads(self.layer.self_heads)
        y_RQ, first = xla_engine.self_attention(qkv, heads, cache.first, step, row_RT)
        x_RD += scope.linear("first_self_out", y_RQ) + self._cross("first_", y_RD, self.memory[0])

        y_RD = scope.norm("branches_norm", x_RD)
        branches_RTC = lax.dynamic_update_slice_in_dim(
            cache.branches_RTC, y_RD[:, None], step, axis=1
        )
        wide = jax.nn.relu(self._separable("wide", branches_RTC))
        sum_RC = add_front(wide, self._separable("narrow", branches_RTC))
        y_RC = scope.norm("joined_norm", sum_RC)
        joined_RTC = lax.dynamic_update_slice_in_dim(cache.joined_RTC, y_RC[:, None], step, axis=1)
        x_RD += self._separable("joined", joined_RTC)

        qkv = scope.linear("qkv", scope.norm("self_attention_norm", x_RD))
        y_RQ, own = xla_engine.self_attention(qkv, self.layer.self_heads, cache.own, step, row_RT)
        x_RD += scope.linear("self_out", y_RQ)
        x_RD += self._cross("", scope.norm("cross_attention_norm", x_RD), self.memory[1])
        h_RF = jax.nn.swish(scope.linear("fc1", scope.norm("ffn_norm", x_RD)))
        return x_RD + scope.linear("fc2", h_RF), CellCache(first, own, branches_RTC, joined_RTC)

    def _cross(self, prefix: str, y_RD: jax.Array, memory: DenseMemory) -> jax.Array:
        """Attention to the source (R, D)."""
        q_RQ, beams = self.scope.linear(f"{prefix}cross_q", y_RD), self.request.ids_BJ.shape[1]
        y_RQ = xla_engine.cross_attention(q_RQ, self.layer.cross_heads, beams, memory)
        return self.scope.linear(f"{prefix}cross_out", y_RQ)

    def _separable(self, name: str, seen_RTC: jax.Array) -> jax.Array:
        """A separable convolution up to this step, of what it saw so far."""
        width, step = DEPTHWISE["decoder"][name], self.request.step
        at_W = step - width + 1 + jnp.arange(width)
        row_RW = self.row_RT[:, jnp.maximum(at_W, 0)]
        near_RWC = jnp.where(at_W[:, None] >= 0, seen_RTC[row_RW, jnp.maximum(at_W, 0)], 0)
        y_RC = jnp.einsum("RWC,WC->RC", near_RWC, self.scope(f"{name}.depthwise"))
        return self.scope.linear(name, y_RC)
