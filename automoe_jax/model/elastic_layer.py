"""One layer of a supernet's stack: its static side, its functions, its part of the weights.

Letters: L layers, B batch, T time, N = B * T tokens, P segments of S memory positions each, D
embedding, E experts, A assignments (tokens times top_k), K experts per token.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.active import ActiveStack, Array
from automoe_jax.model import stacked
from automoe_jax.model.attention import Segments
from automoe_jax.model.block import Bits, Block, Memory, Spec, layer_bits
from automoe_jax.model.experts import ExpertChoice, Route, combine, load_balance, route
from automoe_jax.model.layers import Width
from automoe_jax.ops import grouped_ffn
from automoe_jax.ops.grouping import Active, ExpertWeights

Params = Any
_KEYS_VALUES = ("key", "value")


@dataclasses.dataclass(frozen=True)
class Elastic:
    """What a stack is compiled for.

    Attributes:
      specs: the bounding layers; they differ in nothing but `experts` and `top_k`.
      dims: embedding widths, ascending.
      ffn_dims: FFN sizes of an expert besides 0; the largest is its slot in the weights.
      memory_dims: of a decoder, the encoder's widths.
      qkv_dim: Q/K/V width.
      dropout: rate at `base_dim`, scaled to the active width.
      base_dim: the width that the rate is for.
      attention_dropout: rate on attention probabilities, not scaled.
      backend: of the grouped FFN.
    """

    specs: tuple[Spec, ...]
    dims: tuple[int, ...]
    ffn_dims: tuple[int, ...]
    memory_dims: tuple[int, ...]
    qkv_dim: int
    dropout: float
    base_dim: int
    attention_dropout: float
    backend: str

    @property
    def experts(self) -> list[tuple[int, ...]]:
        """`experts` of each layer."""
        return [spec.experts for spec in self.specs]

    @property
    def most(self) -> Spec:
        """A layer that bounds all."""
        widest = max(self.specs, key=lambda spec: len(spec.experts))
        return dataclasses.replace(widest, top_k=max(spec.top_k for spec in self.specs))

    def block(self, spec: Spec | None = None) -> Block:
        """The module of one layer; of all layers without `spec`."""
        spec = spec or self.most
        return Block(spec, self.qkv_dim, self.attention_dropout, self.memory_dims)

    def rate(self, dim: Any) -> Any:
        """Dropout at a width."""
        return self.dropout * dim / self.base_dim

    def active_experts(self, row: ActiveStack, layer: Array) -> Active:
        """Where a layer's experts are."""
        slot = max(self.ffn_dims)
        base = jnp.array(stacked.rows_of(self.experts), jnp.int32)[layer]
        bias = jnp.array(stacked.bias_rows_of(self.experts), jnp.int32)[layer]
        n_experts = len(self.most.experts)
        return Active(
            base + slot * jnp.arange(n_experts), bias, jnp.asarray(row.sizes_LE[:n_experts])
        )


class Context(NamedTuple):
    """What all layers share and nothing is differentiated by."""

    choice: ActiveStack
    self_mask_BTT: jax.Array
    real_BT: jax.Array
    memory_real_BS: jax.Array | None
    memory_dim: Array | None  # [], active width of the memory
    keys_L: jax.Array | None  # for dropout


def bits_of(elastic: Elastic, context: Context, layer, x_BTD, memory: Memory | None) -> Bits:
    key = None if context.keys_L is None else context.keys_L[layer]
    return layer_bits(elastic.most, key, x_BTD, memory)


def memory_of(elastic: Elastic, memory_PBSD, context: Context, row: ActiveStack, gated: bool):
    if memory_PBSD is None:
        return None
    assert context.memory_real_BS is not None
    p, s = memory_PBSD.shape[0], memory_PBSD.shape[2]
    segment_M = jnp.arange(p * s) // s
    real_BM = jnp.tile(context.memory_real_BS, (1, p)) & (segment_M < row.cross_span_L)
    segments = None
    if gated:
        assert context.memory_dim is not None
        segments = Segments(row.cross_span_L, context.memory_dim)
    return Memory(memory_PBSD, real_BM, segments)


def attend(
    elastic: Elastic,
    context: Context,
    row: ActiveStack,
    bits: Bits,
    gated: bool,
    active: Width | None,
    rate: Any,
    params: Params,
    x_BTD: jax.Array,
    memory_PBSD: jax.Array | None,
):
    """Attention and router: ((x, p, balance), (expert, logits)), the second without gradient."""
    memory = memory_of(elastic, memory_PBSD, context, row, gated)
    apply: Any = elastic.block().apply
    x_BTD = apply(
        {"params": params}, x_BTD, context.self_mask_BTT, memory, rate, bits, row, active,
        method="attend",
    )  # fmt: skip
    real_N = context.real_BT.reshape(-1)
    logits_NE = jnp.zeros((real_N.shape[0], 1), x_BTD.dtype)
    if "router" in params["experts"]:
        logits_BTE = x_BTD @ params["experts"]["router"] + params["experts"]["router_bias"]
        logits_NE = logits_BTE.reshape(real_N.shape[0], -1)
    choice = ExpertChoice(row.n_experts_L, row.sizes_LE, row.top_k_L)
    routed, routing = route(logits_NE, real_N, elastic.most.top_k, choice)
    balance = load_balance(routing, real_N)
    return (x_BTD, routed.p_NK, balance), (routed.expert_NK, routing.logits_NE)


def finish(
    elastic: Elastic,
    row: ActiveStack,
    expert_NK: jax.Array,
    bits: Bits,
    active: Width | None,
    rate: Any,
    params: Params,
    x_BTD: jax.Array,
    p_NK: jax.Array,
    y_AD: jax.Array,
):
    """The experts' outputs combined, added and normalised."""
    n_experts = len(elastic.most.experts)
    identity_A = grouped_ffn.identity(expert_NK.reshape(-1), row.sizes_LE[:n_experts])
    y_ND = combine(y_AD, Route(p_NK, expert_NK), identity_A, rate, bits.experts_AD)
    apply: Any = elastic.block().apply
    return apply({"params": params}, x_BTD, y_ND, active, method="finish"), ()


def per_token(x_BTD: jax.Array, top_k: int) -> jax.Array:
    """One row per assignment: (A, D)."""
    return jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), top_k, axis=0)


def small(params: Params, layer: Array, dim: int) -> Params:
    """A layer's own weights besides its experts', cut to a width."""

    def part(path, array):
        names = [entry.key for entry in path]
        array = lax.dynamic_index_in_dim(array, layer, keepdims=False)
        if "cross_attention" in names and any(name in _KEYS_VALUES for name in names):
            return array  # its input is the memory
        elastic_axis = {"kernel": 0, "router": 0, "scale": 0, "bias": 0}.get(names[-1])
        if "out" in names:
            elastic_axis = array.ndim - 1
        elif names[-1] == "bias" and "_norm" not in names[-2]:
            elastic_axis = None  # of Q, K and V
        if elastic_axis is None:
            return array
        return lax.slice_in_dim(array, 0, dim, axis=elastic_axis)

    return jax.tree_util.tree_map_with_path(part, without_experts(params))


def without_experts(params: Params) -> Params:
    experts = {k: v for k, v in params["experts"].items() if k not in stacked.FLAT}
    return {**params, "experts": experts}


def experts_of(params: Params) -> ExpertWeights:
    return ExpertWeights(*(params["experts"][name] for name in stacked.FLAT))


def put(buffer: jax.Array, value: jax.Array, layer: Array) -> jax.Array:
    """`value` in the front of a layer's part of the buffer."""
    at = (layer, *[0] * value.ndim)
    return lax.dynamic_update_slice(buffer, value[None].astype(buffer.dtype), at)


def get(buffer: jax.Array, shape: tuple[int, ...], layer: Array) -> jax.Array:
    return lax.dynamic_slice(buffer, (layer, *[0] * len(shape)), (1, *shape))[0]
