"""One layer: self-attention, cross-attention in a decoder, experts; each x = LN(x + f(x)).

Letters: B batch, T time, P segments of S memory positions each, M = P * S, D embedding, N tokens.
"""

from typing import NamedTuple

import jax
from flax import linen as nn

from automoe_jax.architecture.active import ActiveStack, Array
from automoe_jax.architecture.subnet import DecoderLayer, EncoderLayer
from automoe_jax.model.attention import Attention, Segments
from automoe_jax.model.experts import Experts, Routing
from automoe_jax.model.layers import AddNorm, Width, cut, random_bits

Spec = EncoderLayer | DecoderLayer


class Memory(NamedTuple):
    """What a decoder attends to: the last encoder layers, newest first."""

    outputs_PBSD: jax.Array
    real_BM: jax.Array
    segments: Segments | None = None


class Bits(NamedTuple):
    """Random bits of a layer's dropout; None everywhere to leave it out."""

    self_probs: jax.Array | None
    self_out: jax.Array | None
    experts_AD: jax.Array | None
    cross_probs: jax.Array | None = None
    cross_out: jax.Array | None = None


def layer_bits(spec: Spec, key: jax.Array | None, x_BTD: jax.Array, memory: Memory | None) -> Bits:
    """Random bits for all of a layer's dropout."""
    b, t, d = x_BTD.shape
    n_heads = spec.heads if isinstance(spec, EncoderLayer) else spec.self_heads
    shapes = [(b, n_heads, t, t), (b, t, d), (b * t * spec.top_k, d)]
    if isinstance(spec, DecoderLayer):
        assert memory is not None
        shapes += [(b, spec.cross_heads, t, memory.real_BM.shape[1]), (b, t, d)]
    return Bits(*random_bits(key, shapes))


class Block(nn.Module):
    """A layer of an encoder or a decoder.

    Attributes:
      spec: the layer; in a supernet its bounding layer.
      qkv_dim: Q/K/V width.
      attention_dropout: rate on attention probabilities.
      memory_dims: widths that the memory can have, in a supernet's decoder.
    """

    spec: Spec
    qkv_dim: int
    attention_dropout: float
    memory_dims: tuple[int, ...] = ()

    def setup(self):
        spec, common = self.spec, (self.qkv_dim, self.attention_dropout)
        if isinstance(spec, EncoderLayer):
            self.self_attention = Attention(spec.heads, *common)
        else:
            self.self_attention = Attention(spec.self_heads, *common)
            self.cross_attention = Attention(spec.cross_heads, *common, self.memory_dims)
            self.cross_attention_norm = AddNorm()
        self.self_attention_norm = AddNorm()
        self.experts = Experts(spec.experts, spec.top_k)
        self.experts_norm = AddNorm()

    def __call__(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        real_BT: jax.Array,
        memory: Memory | None,
        rate: float,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Routing]:
        """The whole layer, at the sizes of `spec`.

        Args:
          x_BTD: input.
          self_mask_BTT: where self-attention may look.
          real_BT: false for padding.
          memory: of a decoder.
          rate: dropout.
          key: for dropout; None to leave it out.
        """
        bits = layer_bits(self.spec, key, x_BTD, memory)
        x_BTD = self.attend(x_BTD, self_mask_BTT, memory, rate, bits)
        y_ND, routing = self.experts(
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            real_BT.reshape(-1),
            dropout_rate=rate,
            bits_AD=bits.experts_AD,
        )
        return self.finish(x_BTD, y_ND), routing

    def attend(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        memory: Memory | None,
        rate: Array | float,
        bits: Bits,
        row: ActiveStack | None = None,
        active: Width | None = None,
    ) -> jax.Array:
        """The attention sublayers.

        Args:
          row: this layer's choice, in a supernet.
          active: active width where x is wider.
          (others as in `__call__`)
        """
        heads = None if row is None else row.heads_L
        y_BTD = self.self_attention(
            x_BTD,
            None,
            self_mask_BTT,
            active=active,
            heads=heads,
            bits_BHTM=bits.self_probs,
        )
        x_BTD = self.self_attention_norm(x_BTD, y_BTD, active, rate, bits.self_out)
        if memory is None:
            return x_BTD
        y_BTD = self.cross_attention(
            x_BTD,
            memory.outputs_PBSD,
            memory.real_BM[:, None],
            active=active,
            heads=None if row is None else row.cross_heads_L,
            segments=memory.segments,
            bits_BHTM=bits.cross_probs,
        )
        return self.cross_attention_norm(x_BTD, y_BTD, active, rate, bits.cross_out)

    def finish(self, x_BTD: jax.Array, y_ND: jax.Array, active: Width | None = None) -> jax.Array:
        """Adds the experts' output and normalises."""
        return self.experts_norm(x_BTD, cut(y_ND.reshape(x_BTD.shape), active), active)
