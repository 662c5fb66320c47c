"""One layer of a supernet's stack: the functions of a round, and its part of the stacked weights.

Letters: L layers, B batch, T time, N = B * T tokens, P segments of S memory positions each,
M = P * S, D embedding, E experts, A assignments (tokens times top_k), K experts per token.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from automoe_jax.architecture.active import ActiveStack, Array, layer_row
from automoe_jax.architecture.subnet import LayerSpec
from automoe_jax.model import stacked
from automoe_jax.model.attention import Segments
from automoe_jax.model.block import Block, CrossMemory, DropoutBits, layer_bits
from automoe_jax.model.experts import (
    combine,
    jittered,
    route,
    router_losses,
    router_product,
)  # fmt: skip
from automoe_jax.model.layers import Width, width
from automoe_jax.model.scales import Scales
from automoe_jax.model.sharing import Sharing
from automoe_jax.ops import grouped_ffn, spread_experts
from automoe_jax.ops.grouping import ExpertWeights, LayerExperts

Params = Any


@dataclasses.dataclass(frozen=True)
class StackStatic:
    """The static side of a supernet's stack: its compiled program is specialised for this."""

    layers: tuple[LayerSpec, ...]  # largest forms; they differ only in `experts` and `top_k`
    dims: tuple[int, ...]  # embedding widths, ascending
    ffn_dims: tuple[int, ...]  # of an expert, besides 0; the largest is its slot in the weights
    memory_dims: tuple[int, ...]  # in a decoder, the encoder's widths
    qkv_dim: int
    dropout: float  # rate at `base_dim`, scaled to the active width
    base_dim: int  # the supernet's width
    attention_dropout: float  # rate on attention probabilities, not scaled
    router_jitter: float
    scales: Scales
    sharing: Sharing
    backend: str  # of the grouped FFN
    remat: bool = False  # True to compute a layer again in its backward pass, and store its input
    spread: int = 1  # devices that the experts of a layer are spread over, see `spread_experts`

    @property
    def experts(self) -> list[tuple[int, ...]]:
        """`experts` of each layer."""
        return [layer.experts for layer in self.layers]

    @property
    def n_experts(self) -> int:
        """Experts of the layer with the most."""
        return max(len(sizes) for sizes in self.experts)

    @property
    def top_k(self) -> int:
        """The largest `top_k` of a layer."""
        return max(layer.top_k for layer in self.layers)

    def block(self, layer: LayerSpec | None = None) -> Block:
        """The module of one layer; without `layer`, a module that bounds all of them."""
        if layer is None:
            widest = max(self.layers, key=lambda layer: len(layer.experts))
            layer = dataclasses.replace(widest, top_k=self.top_k)
        fixed = self.attention_dropout, self.scales, self.router_jitter
        return Block(layer, self.qkv_dim, *fixed, memory_dims=self.memory_dims)

    @property
    def experts_here(self) -> int:
        """Experts that a device has of the layer with the most."""
        return self.n_experts // self.spread

    def experts_before(self, layer: Array) -> jax.Array:
        """The number of the device's experts in all layers before this one, []."""
        _, rows = stacked.rows_of(self.experts)
        return jnp.array(np.array(rows) // self.spread, jnp.int32)[layer]

    def layer_experts(self, params: Params, row: ActiveStack, layer: Array) -> LayerExperts:
        """The active experts of a layer among the stacked weights; of these the device's own."""
        bias_row, slot = self.experts_before(layer), max(self.ffn_dims)
        offsets_E = slot * (bias_row + jnp.arange(self.experts_here))
        sizes_E = jnp.asarray(row.sizes_LE[: self.n_experts])
        if self.spread > 1:
            sizes_E = sizes_E.reshape(-1, self.spread)[:, spread_experts.place(self.spread)]
        return LayerExperts(
            experts_of(params), offsets_E, bias_row, sizes_E, self.ffn_dims, self.spread,
            n_own=self.experts_before(layer + 1) - bias_row,
        )  # fmt: skip


class Context(NamedTuple):
    """Per-call, non-differentiable inputs shared by all layers."""

    active: ActiveStack
    self_mask_BTT: jax.Array
    real_BT: jax.Array
    memory_real_BS: jax.Array | None
    memory_dim: Array | None  # [], active width of the memory
    keys_L: jax.Array | None  # for dropout


class LayerContext(NamedTuple):
    """Non-differentiable inputs of one layer."""

    row: ActiveStack  # of this layer
    rate: Any  # dropout
    bits: DropoutBits
    memory_real_BM: jax.Array | None
    segments: Segments | None  # active part of the memory; None to compute all of it
    active_width: Width | None  # None where arrays have exactly the active width


def layer_context(
    static: StackStatic, context: Context, layer, x_BTD, memory_PBSD, *, exact: bool
) -> LayerContext:
    """The inputs of a layer; with `exact`, x is cut to the active width, else zero beyond it."""
    row = layer_row(context.active, layer)
    real_BM = segments = None
    if memory_PBSD is not None:
        assert context.memory_real_BS is not None
        assert context.memory_dim is not None
        p, _, s, _ = memory_PBSD.shape
        segment_M = jnp.arange(p * s) // s
        real_BM = jnp.tile(context.memory_real_BS, (1, p)) & (segment_M < row.cross_span_L)
        segments = Segments(row.cross_span_L, context.memory_dim)
    key = None if context.keys_L is None else context.keys_L[layer]
    jitter = static.router_jitter > 0
    bits = layer_bits(static.block().layer, key, x_BTD, real_BM, jitter=jitter)
    dim = x_BTD.shape[-1] if exact else context.active.embed_dim
    active_width = None if exact else width(dim, x_BTD.shape[-1])
    rate = static.dropout * dim / static.base_dim
    return LayerContext(row, rate, bits, real_BM, segments, active_width)


# Differentiable parts of a layer, in order; the experts run between `route_tokens` and `finish`.


def attend(
    static: StackStatic, context: Context, own: LayerContext, params, x_BTD, memory_PBSD
) -> jax.Array:
    """The attention sublayers."""
    memory = None
    if memory_PBSD is not None:
        assert own.memory_real_BM is not None
        memory = CrossMemory(memory_PBSD, own.memory_real_BM, own.segments)
    apply: Any = static.block().apply
    return apply(
        {"params": params}, x_BTD, context.self_mask_BTT, memory, own.rate, own.bits, own.row,
        own.active_width, method="attend",
    )  # fmt: skip


def route_tokens(static: StackStatic, context: Context, own: LayerContext, params, x_BTD):
    """The router: ((gates, losses), (experts, logits)), the second aux."""
    real_N = context.real_BT.reshape(-1)
    logits_NE = jnp.zeros((real_N.shape[0], 1))
    if params:
        x_ND = x_BTD.astype(jnp.float32).reshape(len(real_N), -1)
        x_ND = jittered(x_ND, static.router_jitter, own.bits.router)
        logits_NE = router_product(x_ND, params["router"]) + params["router_bias"]
    routing = route(logits_NE, real_N, static.top_k, static.scales.gate, own.row)
    losses = router_losses(routing, real_N)
    return (routing.gate_NK, losses), (routing.expert_NK, routing.logits_NE)


def finish(static: StackStatic, own: LayerContext, expert_NK, params, x_BTD, gate_NK, y_AD):
    """The experts' outputs combined, added and normalised."""
    sizes_E = own.row.sizes_LE[: static.n_experts]
    identity_A = grouped_ffn.identity(expert_NK.reshape(-1), sizes_E)
    scales = static.scales.ffn, own.rate, own.bits.experts_AD
    y_ND = combine(y_AD, gate_NK, identity_A, *scales)
    apply: Any = static.block().apply
    return apply({"params": params}, x_BTD, y_ND, own.active_width, method="finish")


class LayerParams(NamedTuple):
    """Weights of one layer, or stacked ones, besides the experts', by part of the layer."""

    attend: Params
    route: Params
    finish: Params


def without_experts(params: Params) -> LayerParams:
    """The stacked weights that have a layer axis."""
    attention = {k: v for k, v in params.items() if not k.startswith("experts")}
    router = {k: v for k, v in params["experts"].items() if k not in stacked.FLAT}
    return LayerParams(attention, router, {"experts_norm": params["experts_norm"]})


def with_experts(params: LayerParams, experts: ExpertWeights) -> Params:
    """Inverse of `without_experts` and `experts_of`."""
    experts_by_name = dict(zip(stacked.FLAT, experts, strict=True))
    return {**params.attend, **params.finish, "experts": {**params.route, **experts_by_name}}


def experts_of(params: Params) -> ExpertWeights:
    """The experts of all layers."""
    return ExpertWeights(*(params["experts"][name] for name in stacked.FLAT))


def of_dtype(params: Params, dtype: Any) -> Params:
    """Stacked weights with the matrices of attention and of experts in a dtype."""

    def cast(path, array):
        name = path[-1].key
        return array.astype(dtype) if name in ("kernel", "fc1", "fc2") else array

    return jax.tree_util.tree_map_with_path(cast, params)


def layer_params(params: Params, layer: Array, dim: int) -> LayerParams:
    """The weights of one layer, cut to a width."""

    def part(path, array):
        array = lax.dynamic_index_in_dim(array, layer, keepdims=False)
        axis = _elastic_axis([entry.key for entry in path if hasattr(entry, "key")], array.ndim)
        return array if axis is None else lax.slice_in_dim(array, 0, dim, axis=axis)

    return jax.tree_util.tree_map_with_path(part, without_experts(params))


def _elastic_axis(names: list[str], ndim: int) -> int | None:
    """The axis of a weight that has the stack's width."""
    module, name = names[-2] if len(names) > 1 else "", names[-1]
    if "_norm" in module or name == "router":
        return 0
    if module == "out":
        return ndim - 1
    of_memory = names[0] == "cross_attention" and module in ("key", "value")
    return 0 if name == "kernel" and not of_memory else None


def put(buffer: jax.Array, value: jax.Array, layer: Array) -> jax.Array:
    """Writes `value` to the front of a layer's part of the buffer."""
    at = (layer, *[0] * value.ndim)
    return lax.dynamic_update_slice(buffer, value[None].astype(buffer.dtype), at)


def get(buffer: jax.Array, shape: tuple[int, ...], layer: Array) -> jax.Array:
    """Reads the front of a layer's part of the buffer."""
    return lax.dynamic_slice(buffer, (layer, *[0] * len(shape)), (1, *shape))[0]
