"""One layer: self-attention, cross-attention in a decoder, experts; each x = LN(x + f(x)).

Letters: B batch, T time, P segments of S memory positions each, M = P * S, D embedding, N tokens.
"""

from typing import NamedTuple

import jax
from flax import linen as nn

from automoe_jax.architecture.active import ActiveStack, Array
from automoe_jax.architecture.subnet import DecoderLayer, EncoderLayer, LayerSpec
from automoe_jax.model.attention import Attention, Segments
from automoe_jax.model.experts import Experts, Routing
from automoe_jax.model.layers import AddNorm, Width, cut, random_bits
from automoe_jax.model.scales import Scales


class CrossMemory(NamedTuple):
    """Input of cross-attention: the outputs of the last encoder layers, newest first."""

    outputs_PBSD: jax.Array
    real_BM: jax.Array
    segments: Segments | None = None


class DropoutBits(NamedTuple):
    """Random bits of a layer's dropout; all None without dropout."""

    self_probs: jax.Array | None
    self_out: jax.Array | None
    experts_AD: jax.Array | None
    cross_probs: jax.Array | None = None
    cross_out: jax.Array | None = None
    router: jax.Array | None = None


def layer_bits(
    layer: LayerSpec,
    key: jax.Array | None,
    x_BTD: jax.Array,
    memory_real_BM: jax.Array | None,
    *,
    jitter: bool,
) -> DropoutBits:
    """Random bits for all dropout of a layer, and for its router's noise if there is `jitter`."""
    b, t, d = x_BTD.shape
    n_heads = layer.heads if isinstance(layer, EncoderLayer) else layer.self_heads
    shapes = [(b, n_heads, t, t), (b, t, d), (b * t * layer.top_k, d)]
    if isinstance(layer, DecoderLayer):
        assert memory_real_BM is not None
        shapes += [(b, layer.cross_heads, t, memory_real_BM.shape[1]), (b, t, d)]
    if not jitter:
        return DropoutBits(*random_bits(key, shapes))
    *bits, router_ND = random_bits(key, [*shapes, (b * t, d)])
    return DropoutBits(*bits, router=router_ND)


class Block(nn.Module):
    """A layer of an encoder or a decoder."""

    layer: LayerSpec  # in a supernet, the largest form of the layer
    qkv_dim: int
    attention_dropout: float
    scales: Scales = Scales()
    router_jitter: float = 0.0
    routing: str = "learned"  # as in `Experts`
    memory_dims: tuple[int, ...] = ()  # in a supernet's decoder, the widths of the memory

    def setup(self):
        layer, common = self.layer, (self.qkv_dim, self.attention_dropout)
        if isinstance(layer, EncoderLayer):
            self.self_attention = Attention(layer.heads, *common)
        else:
            self.self_attention = Attention(layer.self_heads, *common)
            self.cross_attention = Attention(layer.cross_heads, *common, self.memory_dims)
            self.cross_attention_norm = AddNorm()
        self.self_attention_norm = AddNorm()
        self.experts = Experts(
            layer.experts, layer.top_k, self.scales.ffn, self.scales.gate, self.router_jitter,
            self.routing,
        )  # fmt: skip
        self.experts_norm = AddNorm()

    def __call__(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        real_BT: jax.Array,
        memory: CrossMemory | None,
        rate: float,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Routing]:
        """The whole layer, at the sizes of `layer`.

        The self-attention mask is true where a query may attend, `real_BT` is false for padding.
        `rate` is dropout's; without a key there is none.
        """
        real_BM = None if memory is None else memory.real_BM
        bits = layer_bits(self.layer, key, x_BTD, real_BM, jitter=self.router_jitter > 0)
        x_BTD = self.attend(x_BTD, self_mask_BTT, memory, rate, bits)
        rows = x_BTD.reshape(-1, x_BTD.shape[-1]), real_BT.reshape(-1)
        y_ND, routing = self.experts(
            *rows, dropout_rate=rate, bits_AD=bits.experts_AD, jitter_bits_ND=bits.router
        )
        return self.finish(x_BTD, y_ND), routing

    def attend(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        memory: CrossMemory | None,
        rate: Array | float,
        bits: DropoutBits,
        row: ActiveStack | None = None,
        active_width: Width | None = None,
    ) -> jax.Array:
        """The attention sublayers.

        In a supernet, `row` is this layer of the active stack; `active_width` is None where x is
        cut to it.
        """
        heads, cross_heads = (None, None) if row is None else (row.heads_L, row.cross_heads_L)
        y_BTD = self.self_attention(
            x_BTD, None, self_mask_BTT,
            active_width=active_width, heads=heads, bits_BHTM=bits.self_probs,
        )  # fmt: skip
        y_BTD *= self.scales.attention
        x_BTD = self.self_attention_norm(x_BTD, y_BTD, active_width, rate, bits.self_out)
        if memory is None:
            return x_BTD
        y_BTD = self.cross_attention(
            x_BTD, memory.outputs_PBSD, memory.real_BM[:, None], active_width=active_width,
            heads=cross_heads, segments=memory.segments, bits_BHTM=bits.cross_probs,
        )  # fmt: skip
        y_BTD *= self.scales.attention
        return self.cross_attention_norm(x_BTD, y_BTD, active_width, rate, bits.cross_out)

    def finish(
        self, x_BTD: jax.Array, y_ND: jax.Array, active_width: Width | None = None
    ) -> jax.Array:
        """Adds the experts' output and normalises."""
        return self.experts_norm(x_BTD, cut(y_ND.reshape(x_BTD.shape), active_width), active_width)
