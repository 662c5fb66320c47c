"""Inference of one subnet by the kernels of `native`: as `xla_engine`, without padding.

Source words are packed sentence after sentence, and rows of unfinished hypotheses come first: each
kernel takes the number of rows and does not touch the others. Letters: B sentences, J beams,
R = B * J rows, S source time, N = B * S words, T cache time, Q the Q/K/V width, D embedding,
L listed words, C candidates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.architecture.space import GATES
from automoe_jax.architecture.subnet import LayerSpec
from automoe_jax.decoding.layout import LISTED, output_name
from automoe_jax.decoding.weights import tables
from automoe_jax.decoding.xla_engine import Candidates, ModelSpec, Request, listed, sinusoid

Arrays = dict[str, Any]
# Whether the beam search moves unfinished sentences to the front.
COMPACTS = True


class PackedMemory(NamedTuple):
    """Cross-attention keys and values, by decoder layer and by encoder layer that it attends to."""

    start_B: jax.Array  # first word of each sentence
    length_B: jax.Array
    kv_NQ: list[list[jax.Array]]  # (N, 2 Q)
    listed_BL: jax.Array | None  # words that each sentence may use, None for all


class PackedCaches(NamedTuple):
    """Keys and values of self-attention, (R, T, Q) each, and the decoder's position table."""

    layers: list[tuple[jax.Array, jax.Array]]
    positions_TD: jax.Array


def _calls(name: str, results: Sequence[Any], *arguments, aliases=None, **attributes):
    """Calls a kernel; `aliases` names the result that shares the memory of an argument."""
    call = jax.ffi.ffi_call(f"automoe_{name}", results, input_output_aliases=aliases)
    return call(*arguments, **attributes)


def _call(name: str, shape: Sequence[Any], *arguments, **attributes) -> jax.Array:
    """Calls a kernel with one float32 result."""
    (result,) = _calls(name, [_floats(shape)], *arguments, **attributes)
    return result


def _floats(shape: Sequence[Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class PackedScope:
    """Weights under a prefix, and the kernels that use them on the first `count` rows."""

    def __init__(self, weights: Arrays, prefix: str, count: jax.Array):
        self._weights, self._prefix, self._count = weights, prefix, count

    def matrix(self, name: str) -> list[jax.Array]:
        """The arrays of a linear map or of a norm, in the order that kernels take them."""
        leaves = ("kernel", "scale", "total", "bias")
        names = [f"{self._prefix}.{name}.{leaf}" for leaf in leaves]
        return [self._weights[n] for n in names if n in self._weights]

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        width = self._weights[f"{self._prefix}.{name}.bias"].shape[0]
        return _call("linear", (x.shape[0], width), self._count, x, *self.matrix(name))

    def linear_add_norm(self, name: str, norm: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """LayerNorm(x + linear(y))."""
        norms = self.matrix(norm)
        return _call("linear_add_norm", x.shape, self._count, x, y, *self.matrix(name), *norms)

    def experts_add_norm(self, layer: LayerSpec, gate: str, x: jax.Array) -> jax.Array:
        """LayerNorm(x + experts(x))."""
        matrices = self.matrix("router") if len(layer.experts) > 1 else []
        for e, size in enumerate(layer.experts):
            if size:
                matrices += self.matrix(f"expert_{e}.fc1") + self.matrix(f"expert_{e}.fc2")
        return _call(
            "experts_add_norm", x.shape, self._count, x, *matrices, *self.matrix("experts_norm"),
            sizes=np.array(layer.experts, np.int64), top_k=np.int64(layer.top_k),
            gate=np.int64(GATES.index(gate)),
        )  # fmt: skip


def _positions(time, base: int, dim: int) -> jax.Array:
    """The first `time` rows of the position table."""
    return sinusoid(jnp.arange(time) + PAD_ID + 1, base, dim)


def start(weights: Arrays, spec: ModelSpec, source_BS: jax.Array) -> PackedMemory:
    """Runs the encoder, once per sentence."""
    subnet = spec.subnet
    b, s = source_BS.shape
    n, d, q = b * s, subnet.encoder.embed_dim, subnet.qkv_dim
    real_BS = source_BS != PAD_ID
    length_B = jnp.sum(real_BS, axis=1, dtype=jnp.int32)
    start_B = jnp.cumsum(length_B, dtype=jnp.int32) - length_B
    count = jnp.sum(length_B, dtype=jnp.int32)
    # Words are packed; padding may stand anywhere.
    time_BS = jnp.cumsum(real_BS, axis=1, dtype=jnp.int32) - 1
    place_BS = jnp.where(real_BS, start_B[:, None] + time_BS, n)
    rows = jnp.zeros((2, n), jnp.int32)
    both = jnp.stack([source_BS, time_BS]).reshape(2, n)
    ids_N, time_N = rows.at[:, place_BS.reshape(n)].set(both, mode="drop")
    table_SD = _positions(s, spec.encoder_base_dim, d)
    x_ND = _call("embed", (n, d), count, ids_N, time_N, tables(weights).source, table_SD)
    outputs = []
    for i, layer in enumerate(subnet.encoder.layers):
        scope = PackedScope(weights, f"encoder.{i}", count)
        y_NQ = _call(
            "encoder_attention", (n, q), start_B, length_B, scope.linear("qkv", x_ND),
            heads=np.int64(layer.heads),
        )  # fmt: skip
        x_ND = scope.linear_add_norm("self_out", "self_attention_norm", x_ND, y_NQ)
        x_ND = scope.experts_add_norm(layer, spec.gate, x_ND)
        outputs.append(x_ND)
    kv_NQ = []
    for i, layer in enumerate(subnet.decoder.layers):
        scope = PackedScope(weights, f"decoder.{i}", count)
        kv_NQ.append([scope.linear("cross_kv", x) for x in outputs[::-1][: layer.cross_span]])
    listed_BL = listed(weights, source_BS) if LISTED in weights else None
    return PackedMemory(start_B, length_B, kv_NQ, listed_BL)


def empty_caches(spec: ModelSpec, rows, time) -> PackedCaches:
    """Caches of `rows` hypotheses and `time` steps (which may be symbolic)."""
    decoder, shape = spec.subnet.decoder, (rows, time, spec.subnet.qkv_dim)
    zeros = [(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)) for _ in decoder.layers]
    return PackedCaches(zeros, _positions(time, spec.decoder_base_dim, decoder.embed_dim))


def decode(
    weights: Arrays, spec: ModelSpec, request: Request, caches: PackedCaches, memory: PackedMemory
) -> tuple[jax.Array, PackedCaches]:
    """A step of the decoder's layers; as `xla_engine.decode`."""
    subnet = spec.subnet
    b, j = request.ids_BJ.shape
    rows, q, d = b * j, subnet.qkv_dim, subnet.decoder.embed_dim
    count = request.n_live * j
    time = request.ancestor_BJT.shape[2]
    ancestor_RT = request.ancestor_BJT.reshape(rows, time)
    step_R = jnp.full((rows,), request.step)
    words = request.ids_BJ.reshape(rows), step_R, tables(weights).target
    x_RD = _call("embed", (rows, d), count, *words, caches.positions_TD)
    layers = []
    for i, layer in enumerate(subnet.decoder.layers):
        scope = PackedScope(weights, f"decoder.{i}", count)
        shapes = [_floats(a.shape) for a in caches.layers[i]]
        y_RQ, *cache = _calls(
            "self_attention", [_floats((rows, q)), *shapes], count,
            request.step, ancestor_RT, scope.linear("qkv", x_RD), *caches.layers[i],
            aliases={4: 1, 5: 2}, heads=np.int64(layer.self_heads),
        )  # fmt: skip
        layers.append(tuple(cache))
        x_RD = scope.linear_add_norm("self_out", "self_attention_norm", x_RD, y_RQ)
        y_RQ = _call(
            "cross_attention", (rows, q), count, request.sentence_B, memory.start_B,
            memory.length_B, scope.linear("cross_q", x_RD), *memory.kv_NQ[i],
            heads=np.int64(layer.cross_heads), beams=np.int64(j),
        )  # fmt: skip
        x_RD = scope.linear_add_norm("cross_out", "cross_attention_norm", x_RD, y_RQ)
        x_RD = scope.experts_add_norm(layer, spec.gate, x_RD)
    return x_RD, PackedCaches(layers, caches.positions_TD)


def candidates(
    weights: Arrays, x_RD: jax.Array, request: Request, memory: PackedMemory
) -> Candidates:
    """The best next words by the output layer."""
    b, j = request.ids_BJ.shape
    rows, count = b * j, request.n_live * j
    c = min(request.n_candidates, request.n_words)
    results = [_floats((rows, c)), jax.ShapeDtypeStruct((rows, c), jnp.int32), _floats((rows,))]
    eos = (request.eos_barred.astype(jnp.int32), request.only_eos.astype(jnp.int32))
    numbers = {"words": np.int64(request.n_words), "pad": np.int64(PAD_ID), "eos": np.int64(EOS_ID)}
    if memory.listed_BL is None:
        quantized = "output.kernel" in weights
        names = ("output.kernel", "output.scale", "output.total")
        output = [weights[n] for n in (names if quantized else [output_name(weights)])]
        found = _calls("top_words", results, count, x_RD, *output, *eos, **numbers)
    else:
        found = _calls(
            "top_listed", results, count, request.sentence_B, x_RD, tables(weights).output,
            memory.listed_BL, *eos, beams=np.int64(j), **numbers,
        )  # fmt: skip
    return Candidates(*(x.reshape(b, j, *x.shape[1:]) for x in found))
