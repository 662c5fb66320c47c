"""Inference of one subnet by XLA's operations: the encoder, and one cached step of the decoder.

Plain functions over dense weights (`weights.prepare`, `weights.quantize`), for accelerators and for
CPUs without a C compiler (`native_engine` serves the others). Letters: B sentences, J beams per
sentence, R = B * J rows, S source time, T cache time, M memory time (source time times
cross-attention span), H heads, K head size, D embedding, Q the Q/K/V width, V vocabulary,
L listed words, C candidates, N tokens, A = N * top_k assignments of tokens, E experts.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.architecture.subnet import LayerSpec, Subnet
from automoe_jax.decoding.layout import COMMON, LISTED
from automoe_jax.decoding.weights import INT8_MAX, tables
from automoe_jax.model.formulas import LAYER_NORM_EPS, MASKED, frequencies

Arrays = dict[str, Any]
# Log probability of an impossible word; finite, so that sums stay comparable. LOWEST in kernels.c.
NEVER = -1e30
# Whether the beam search moves unfinished sentences to the front.
COMPACTS = False
# Tokens of one expert that the encoder computes at a time.
BLOCK_ROWS = 32


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Compile-time facts: the architecture, the widths of positions, the gate of `SearchSpace`."""

    subnet: Subnet
    encoder_base_dim: int
    decoder_base_dim: int
    gate: str = "probability"


class DenseCache(NamedTuple):
    """Self-attention keys and values of one decoder layer: (R, T, H, K)."""

    key: jax.Array
    value: jax.Array


class DenseMemory(NamedTuple):
    """Cross-attention keys and values of one decoder layer, once per sentence: (B, M, H, K)."""

    key: jax.Array
    value: jax.Array
    real_BM: jax.Array


class Encoded(NamedTuple):
    """Output of the encoder for the decoder; words each sentence may use, None for all."""

    memory: list[DenseMemory]
    allowed_BV: jax.Array | None


class Request(NamedTuple):
    """Input of a step of the decoder.

    ids_BJ: the last word of each hypothesis, eos at step 0. sentence_B: the sentence of each group
    of J hypotheses. ancestor_BJT: the row in which each earlier word of a hypothesis was decoded.
    n_live: number of groups, from the front, whose results are needed.
    """

    ids_BJ: jax.Array
    step: jax.Array  # []
    sentence_B: jax.Array
    ancestor_BJT: jax.Array
    n_live: jax.Array  # []
    eos_barred: jax.Array  # []
    only_eos: jax.Array  # []
    n_candidates: int
    n_words: int


class Candidates(NamedTuple):
    """The best next words of each hypothesis, best first, without pad; log_z is over all words."""

    logit_BJC: jax.Array  # `NEVER` beyond the last candidate
    word_BJC: jax.Array
    log_z_BJ: jax.Array


class DenseScope:
    """Weights under a prefix, and the layers that use them."""

    def __init__(self, weights: Arrays, prefix: str):
        self._weights, self._prefix = weights, prefix

    def __call__(self, name: str) -> jax.Array:
        return self._weights[f"{self._prefix}.{name}"]

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        kernel_KN, bias_N = self(f"{name}.kernel"), self(f"{name}.bias")
        if kernel_KN.dtype == jnp.int8:
            return _int8_product(x, kernel_KN, self(f"{name}.scale")) + bias_N
        return x @ kernel_KN + bias_N

    def add_norm(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """LayerNorm(x + y)."""
        return self.norm(name, x + y)

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        """LayerNorm."""
        centred = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean(centred * centred, -1, keepdims=True)
        unit = centred * lax.rsqrt(variance + LAYER_NORM_EPS)
        return unit * self(f"{name}.scale") + self(f"{name}.bias")


def _int8_product(x: jax.Array, kernel_KN: jax.Array, scale_N: jax.Array) -> jax.Array:
    """Product with an int8 matrix: each row of x is quantised by its largest value."""
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    q = jnp.round(x * jnp.where(top > 0, INT8_MAX / top, 0)).astype(jnp.int8)
    rows = q.reshape(-1, q.shape[-1])
    # XLA has no fast int8 product for a single row.
    single = isinstance(rows.shape[0], int) and rows.shape[0] == 1
    rows = jnp.pad(rows, ((0, int(single)), (0, kernel_KN.shape[0] - rows.shape[1])))
    y = jnp.matmul(rows, kernel_KN, preferred_element_type=jnp.int32)
    y = y[:1] if single else y
    return y.reshape(*x.shape[:-1], scale_N.size) * (top / INT8_MAX * scale_N)


def sinusoid(positions: jax.Array, base_dim: int, dim: int) -> jax.Array:
    """Rows of the position table (first token at 2), cut to `dim` of its `base_dim` columns."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(base_dim)
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    if base_dim % 2:
        table = jnp.pad(table, [(0, 0)] * positions.ndim + [(0, 1)])
    return table[..., :dim]


def embed(table_VD: jax.Array, ids: jax.Array, positions: jax.Array, base: int, dim: int):
    """Scaled embedding plus position; pads get no position."""
    x = table_VD[ids][..., :dim] * math.sqrt(dim)
    return x + jnp.where((ids != PAD_ID)[..., None], sinusoid(positions, base, dim), 0)


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)


def encode(weights: Arrays, spec: ModelSpec, source_BS: jax.Array) -> list[jax.Array]:
    """Output (B, S, D) of every encoder layer."""
    subnet, d = spec.subnet, spec.subnet.encoder.embed_dim
    real_BS = source_BS != PAD_ID
    x_BSD = source_rows(weights, spec, source_BS)
    outputs = []
    for i, layer in enumerate(subnet.encoder.layers):
        scope = DenseScope(weights, f"encoder.{i}")
        b, s = source_BS.shape
        y_BSQ = source_attention(scope, layer.heads, x_BSD, real_BS)
        x_BSD = scope.add_norm("self_attention_norm", x_BSD, scope.linear("self_out", y_BSQ))
        rows = x_BSD.reshape(b * s, d), real_BS.reshape(b * s)
        y_ND = experts_in_blocks(scope, layer, spec.gate, *rows)
        x_BSD = scope.add_norm("experts_norm", x_BSD, y_ND.reshape(b, s, d))
        outputs.append(x_BSD)
    return outputs


def source_rows(weights: Arrays, spec: ModelSpec, source_BS: jax.Array) -> jax.Array:
    """The encoder's input (B, S, D)."""
    position_BS = jnp.cumsum(source_BS != PAD_ID, axis=1) + PAD_ID
    table_VD, d = tables(weights).source, spec.subnet.encoder.embed_dim
    return embed(table_VD, source_BS, position_BS, spec.encoder_base_dim, d)


def source_attention(scope: DenseScope, heads: int, x_BSD: jax.Array, real_BS: jax.Array):
    """Self-attention (B, S, Q) of the encoder, without its output map."""
    qkv = scope.linear("qkv", x_BSD)
    b, s, k = *x_BSD.shape[:2], qkv.shape[-1] // 3 // heads
    qkv = qkv.reshape(b, s, 3, heads, k)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", qkv[:, :, 0] * k**-0.5, qkv[:, :, 1])
    probs_BHTS = _softmax(scores_BHTS, real_BS[:, None, None])
    return jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS, qkv[:, :, 2]).reshape(b, s, heads * k)


def start(weights: Arrays, spec: ModelSpec, source_BS: jax.Array) -> Encoded:
    """Runs the encoder, and the keys and values of cross-attention, once per sentence."""
    outputs, real_BS = encode(weights, spec, source_BS), source_BS != PAD_ID
    memory = []
    for i, layer in enumerate(spec.subnet.decoder.layers):
        memory_BMD = jnp.concatenate(outputs[::-1][: layer.cross_span], axis=1)
        real_BM = jnp.tile(real_BS, (1, layer.cross_span))
        kv = DenseScope(weights, f"decoder.{i}").linear("cross_kv", memory_BMD)
        memory.append(dense_memory(kv, layer.cross_heads, real_BM))
    return Encoded(memory, allowed_words(weights, source_BS))


def dense_memory(kv_BMQ: jax.Array, heads: int, real_BM: jax.Array) -> DenseMemory:
    """Cross-attention's memory of keys and values, joined."""
    kv = kv_BMQ.reshape(*kv_BMQ.shape[:2], 2, heads, -1)
    return DenseMemory(kv[:, :, 0], kv[:, :, 1], real_BM)


def allowed_words(weights: Arrays, source_BS: jax.Array) -> jax.Array | None:
    """Words that each sentence may use (B, V); None for all."""
    if LISTED not in weights:
        return None
    listed_BL = listed(weights, source_BS)
    b, n_words = source_BS.shape[0], tables(weights).output.shape[0]
    place_BL = jnp.where(listed_BL < 0, n_words, listed_BL)  # out of range: dropped
    none_BV = jnp.zeros((b, n_words), bool)
    return none_BV.at[jnp.arange(b)[:, None], place_BL].set(True, mode="drop")


def listed(weights: Arrays, source_BS: jax.Array) -> jax.Array:
    """The words that each sentence may use (B, L), int32, without repetition; -1 is padding."""
    b = source_BS.shape[0]
    own_BSN = jnp.where((source_BS != PAD_ID)[..., None], weights[LISTED][source_BS], -1)
    common_BL = jnp.broadcast_to(weights[COMMON], (b, weights[COMMON].shape[0]))
    all_BL = jnp.sort(jnp.concatenate([common_BL, own_BSN.reshape(b, -1)], axis=1), axis=1)
    repeated_BL = jnp.pad(all_BL[:, 1:] == all_BL[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(repeated_BL, -1, all_BL)


def empty_caches(spec: ModelSpec, rows, time) -> list[DenseCache]:
    """Zeroed caches of `rows` hypotheses and `time` steps (which may be symbolic)."""
    q = spec.subnet.qkv_dim
    return [empty_cache(rows, time, x.self_heads, q) for x in spec.subnet.decoder.layers]


def empty_cache(rows, time, heads: int, qkv_dim: int) -> DenseCache:
    """A zeroed cache of one self-attention."""
    shape = rows, time, heads, qkv_dim // heads
    return DenseCache(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def self_attention(
    qkv: jax.Array, heads: int, cache: DenseCache, step: jax.Array, row_RT: jax.Array
) -> tuple[jax.Array, DenseCache]:
    """Attention (R, Q) to the words so far; the cache with this step's keys and values.

    qkv: (R, 3 Q). row_RT: the row of the cache that has each word's keys and values.
    """
    rows, time = row_RT.shape
    k = qkv.shape[1] // 3 // heads
    qkv = qkv.reshape(rows, 3, heads, k)
    time_T = jnp.arange(time)
    cache = DenseCache(
        lax.dynamic_update_slice_in_dim(cache.key, qkv[:, None, 1], step, axis=1),
        lax.dynamic_update_slice_in_dim(cache.value, qkv[:, None, 2], step, axis=1),
    )
    key_RTHK, value_RTHK = (part[row_RT, time_T] for part in cache)
    scores_RHT = jnp.einsum("RHK,RTHK->RHT", qkv[:, 0] * k**-0.5, key_RTHK)
    y_RHK = jnp.einsum("RHT,RTHK->RHK", _softmax(scores_RHT, time_T <= step), value_RTHK)
    return y_RHK.reshape(rows, heads * k), cache


def cross_attention(q_RQ: jax.Array, heads: int, beams: int, memory: DenseMemory) -> jax.Array:
    """Attention (R, Q) to the source."""
    k = q_RQ.shape[1] // heads
    q_BJHK = q_RQ.reshape(-1, beams, heads, k) * k**-0.5
    scores_BHJM = jnp.einsum("BJHK,BMHK->BHJM", q_BJHK, memory.key)
    probs_BHJM = _softmax(scores_BHJM, memory.real_BM[:, None, None])
    return jnp.einsum("BHJM,BMHK->BJHK", probs_BHJM, memory.value).reshape(q_RQ.shape)


def decode(
    weights: Arrays, spec: ModelSpec, request: Request, caches: list[DenseCache], encoded: Encoded
) -> tuple[jax.Array, list[DenseCache]]:
    """A step of the decoder's layers: their output (R, D), and the caches with this step."""
    j, step = request.ids_BJ.shape[1], request.step
    x_RD, row_RT = decoder_rows(weights, spec, request)
    new_caches = []
    for i, layer in enumerate(spec.subnet.decoder.layers):
        scope = DenseScope(weights, f"decoder.{i}")
        qkv = scope.linear("qkv", x_RD)
        y_RQ, cache = self_attention(qkv, layer.self_heads, caches[i], step, row_RT)
        new_caches.append(cache)
        x_RD = scope.add_norm("self_attention_norm", x_RD, scope.linear("self_out", y_RQ))
        q_RQ = scope.linear("cross_q", x_RD)
        y_RQ = cross_attention(q_RQ, layer.cross_heads, j, encoded.memory[i])
        x_RD = scope.add_norm("cross_attention_norm", x_RD, scope.linear("cross_out", y_RQ))
        y_RD = experts_by_branch(scope, layer, spec.gate, x_RD)
        x_RD = scope.add_norm("experts_norm", x_RD, y_RD)
    return x_RD, new_caches


def decoder_rows(weights: Arrays, spec: ModelSpec, request: Request) -> tuple[jax.Array, jax.Array]:
    """The decoder's input (R, D), and the rows of caches (R, T) that hold each word so far."""
    step, time = request.step, request.ancestor_BJT.shape[2]
    ids_R, d = request.ids_BJ.reshape(-1), spec.subnet.decoder.embed_dim
    position = jnp.full(ids_R.shape, 1) * (step + PAD_ID + 1)
    x_RD = embed(tables(weights).target, ids_R, position, spec.decoder_base_dim, d)
    rows = x_RD.shape[0]
    ancestor_RT = request.ancestor_BJT.reshape(rows, time)
    return x_RD, jnp.where(jnp.arange(time) == step, jnp.arange(rows)[:, None], ancestor_RT)


def logits(weights: Arrays, x_RD: jax.Array, request: Request) -> jax.Array:
    """The output layer (B, J, V)."""
    if "output.kernel" in weights:
        logits_RV = _int8_product(x_RD, weights["output.kernel"], weights["output.scale"])
    else:
        logits_RV = lax.dot_general(x_RD, tables(weights).output, (((1,), (1,)), ((), ())))
    return logits_RV.reshape(*request.ids_BJ.shape, logits_RV.shape[-1])


def candidates(weights: Arrays, x_RD: jax.Array, request: Request, encoded: Encoded) -> Candidates:
    """The best next words by the output layer."""
    logits_BJV = logits(weights, x_RD, request)
    if encoded.allowed_BV is not None:
        logits_BJV = jnp.where(encoded.allowed_BV[:, None], logits_BJV, NEVER)
    log_z_BJ = jax.nn.logsumexp(logits_BJV, axis=-1)
    v = jnp.arange(logits_BJV.shape[-1])
    barred_V = (v == PAD_ID) | jnp.where(v == EOS_ID, request.eos_barred, request.only_eos)
    allowed_BJV = jnp.where(barred_V, NEVER, logits_BJV)
    best_BJC, word_BJC = lax.top_k(allowed_BJV, min(request.n_candidates, v.size))
    return Candidates(best_BJC, word_BJC, log_z_BJ)


def _route(scope: DenseScope, layer: LayerSpec, gate: str, x_ND: jax.Array):
    """Factors and experts (N, top_k) of each token."""
    probs_NE = jax.nn.softmax(scope.linear("router", x_ND), axis=-1)
    p_NK, expert_NK = lax.top_k(probs_NE, layer.top_k)
    if gate == "count":
        p_NK = p_NK * len(layer.experts)
    elif gate == "normalised":
        p_NK = p_NK / jnp.sum(p_NK, axis=-1, keepdims=True)
    return p_NK, expert_NK


def _expert(scope: DenseScope, e: int, x_RD: jax.Array) -> jax.Array:
    h_RF = jax.nn.relu(scope.linear(f"expert_{e}.fc1", x_RD))
    return scope.linear(f"expert_{e}.fc2", h_RF)


def experts_by_branch(scope: DenseScope, layer: LayerSpec, gate: str, x_RD: jax.Array) -> jax.Array:
    """The expert sublayer for few rows: the weights of an expert without rows are not read."""
    if len(layer.experts) == 1:
        return _expert(scope, 0, x_RD) if layer.experts[0] else x_RD
    p_RK, expert_RK = _route(scope, layer, gate, x_RD)
    y_RD = jnp.zeros_like(x_RD)
    for e, size in enumerate(layer.experts):
        p_R = jnp.sum(jnp.where(expert_RK == e, p_RK, 0), axis=-1)[:, None]
        if size:
            y_RD = lax.cond(
                jnp.any(expert_RK == e), lambda y, x, p, e=e: y + p * _expert(scope, e, x),
                lambda y, x, p: y, y_RD, x_RD, p_R,
            )  # fmt: skip
        else:
            y_RD = y_RD + p_R * x_RD
    return y_RD


def experts_in_blocks(
    scope: DenseScope, layer: LayerSpec, gate: str, x_ND: jax.Array, real_N: jax.Array
) -> jax.Array:
    """The expert sublayer for many tokens: sorted by expert, computed in blocks of one expert.

    Padding is routed to no expert and gives zeros.
    """
    if len(layer.experts) == 1:
        y_ND = _expert(scope, 0, x_ND) if layer.experts[0] else x_ND
        return jnp.where(real_N[:, None], y_ND, 0)
    n, d = x_ND.shape
    k, n_experts = layer.top_k, len(layer.experts)
    p_NK, expert_NK = _route(scope, layer, gate, x_ND)
    expert_A = jnp.where(real_N[:, None], expert_NK, n_experts).reshape(n * k)
    order_A = jnp.argsort(expert_A, stable=True)
    count_E = jnp.bincount(expert_A, length=n_experts + 1)[:n_experts]
    blocks_E = (count_E + BLOCK_ROWS - 1) // BLOCK_ROWS
    end_E, last_block_E = jnp.cumsum(count_E), jnp.cumsum(blocks_E)
    x_sorted = jnp.pad(x_ND[order_A // k], ((0, BLOCK_ROWS), (0, 0)))
    branches = [
        (lambda x, e=e: _expert(scope, e, x)) if size else (lambda x: x)
        for e, size in enumerate(layer.experts)
    ]

    def block(i, y_sorted):
        expert = jnp.sum(last_block_E <= i)
        within = i - (last_block_E[expert] - blocks_E[expert])
        start = end_E[expert] - count_E[expert] + within * BLOCK_ROWS
        x_RD = lax.dynamic_slice(x_sorted, (start, 0), (BLOCK_ROWS, d))
        y_RD = lax.switch(expert, branches, x_RD)
        mine_R = start + jnp.arange(BLOCK_ROWS) < end_E[expert]
        old_RD = lax.dynamic_slice(y_sorted, (start, 0), (BLOCK_ROWS, d))
        new_RD = jnp.where(mine_R[:, None], y_RD, old_RD)
        return lax.dynamic_update_slice(y_sorted, new_RD, (start, 0))

    y_sorted = lax.fori_loop(0, last_block_E[-1], block, jnp.zeros_like(x_sorted))
    y_AD = jnp.zeros((n * k, d), x_ND.dtype).at[order_A].set(y_sorted[: n * k])
    return jnp.einsum("NK,NKD->ND", p_NK, y_AD.reshape(n, k, d))
