"""The Evolved Transformer (So et al. 2019, arXiv 1901.11117), a stand-alone model.

Every sublayer is x + f(LayerNorm(x)), and each stack ends in a LayerNorm. An encoder cell has a
gated linear unit; two convolutions with ReLU side by side, of widths 1 and 3, and a separable one
of width 9 on the normalised sum; self-attention; an FFN. A decoder cell has self-attention of twice
the heads, at most 16, beside attention to the encoder; separable convolutions of widths 11, with
ReLU, and 7 side by side and one of width 7 on the normalised sum; self-attention; attention to the
encoder; an FFN with swish. Sums of different widths add to the front columns.

Attentions have biases, as the project's others do (0.1 % of the parameters). Letters as in
`transformer`, C channels, W positions of a convolution.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from automoe_jax.architecture.evolved import DEPTHWISE, NARROW
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.architecture.subnet import (
    DecoderLayer,
    EncoderLayer,
    LayerSpec,
    Subnet,
    doubled_heads,
)
from automoe_jax.model import seq2seq
from automoe_jax.model.attention import Attention, Linear
from automoe_jax.model.experts import RouterLosses
from automoe_jax.model.formulas import LAYER_NORM_EPS
from automoe_jax.model.layers import dropout, random_bits, uniform
from automoe_jax.model.seq2seq import Output
from automoe_jax.ops.convolution import add_front, depthwise, shifted


class Norm(nn.Module):
    """LayerNorm, computed in fp32; eps 1e-5."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (d,))
        bias_D = self.param("bias", nn.initializers.zeros, (d,))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        variance = jnp.mean(centred * centred, -1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS) * scale_D + bias_D).astype(
            x.dtype
        )


class Convolution(nn.Module):
    """A convolution over `width` positions around each one."""

    features: int
    width: int

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        near = jnp.concatenate(shifted(x_BTC, self.width), axis=-1)
        fans = near.shape[-1], self.width * self.features
        return Linear(self.features, fans, name="map")(near)


class Separable(nn.Module):
    """A convolution of each channel by itself, then a linear map."""

    features: int
    width: int
    causal: bool

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        c = x_BTC.shape[-1]
        bound = math.sqrt(3 / self.width)  # Xavier-uniform: as many inputs as outputs
        kernel_WC = self.param("depthwise", uniform(bound), (self.width, c)).astype(x_BTC.dtype)
        y_BTC = depthwise(x_BTC, kernel_WC, causal=self.causal)
        return Linear(self.features, (c, self.features), name="map")(y_BTC)


class _Drop:
    """Dropout of one cell: each call draws its own bits; the identity without a key."""

    def __init__(self, rate: float, key: jax.Array | None):
        self._rate, self._key, self._n = rate, key, 0

    def bits(self, shape: tuple[int, ...]) -> jax.Array | None:
        self._n += 1
        key = None if self._key is None else jax.random.fold_in(self._key, self._n)
        return random_bits(key, [shape])[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        return dropout(x, self._rate, self.bits(x.shape))


class Memory(NamedTuple):
    """The encoder's output; false for padding."""

    outputs_BSD: jax.Array
    real_BS: jax.Array


def _linear(name: str, x: jax.Array, features: int) -> jax.Array:
    return Linear(features, (x.shape[-1], features), name=name)(x)


class _Attend(NamedTuple):
    """What the attentions of a cell have in common; each is a submodule of the cell."""

    qkv_dim: int
    rate: float
    drop: _Drop
    self_mask_BTT: jax.Array

    def __call__(
        self, name: str, heads: int, x_BTD: jax.Array, memory: Memory | None = None
    ) -> jax.Array:
        """Attention to the memory, else to x itself."""
        mask, inputs = self.self_mask_BTT, None
        if memory is not None:
            mask, inputs = memory.real_BS[:, None], memory.outputs_BSD[None]
        keys = x_BTD.shape[1] if memory is None else memory.real_BS.shape[1]
        bits = self.drop.bits((x_BTD.shape[0], heads, x_BTD.shape[1], keys))
        attention = Attention(heads, self.qkv_dim, self.rate, name=name)
        return attention(x_BTD, inputs, mask, bits_BHTM=bits)


def _ffn(
    x_BTD: jax.Array, size: int, activation: Callable[[jax.Array], jax.Array], drop: _Drop
) -> jax.Array:
    """x and the FFN of it."""
    h_BTF = activation(_linear("fc1", Norm(name="ffn_norm")(x_BTD), size))
    return x_BTD + drop(_linear("fc2", drop(h_BTF), x_BTD.shape[-1]))


class EncoderCell(nn.Module):
    """A cell of the encoder."""

    layer: EncoderLayer
    qkv_dim: int
    attention_dropout: float

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array, rate: float, key: jax.Array | None
    ) -> jax.Array:
        """`real_BT` is false for padding; `rate` is dropout's, without a key there is none."""
        d, drop, widths = x_BTD.shape[-1], _Drop(rate, key), DEPTHWISE["encoder"]
        attend = _Attend(self.qkv_dim, self.attention_dropout, drop, real_BT[:, None])
        y_BTD = Norm(name="gated_norm")(x_BTD)
        gates = jax.nn.sigmoid(_linear("gates", y_BTD, d))
        x_BTD += drop(_linear("gated", y_BTD, d) * gates)

        # Convolutions see no padding.
        y_BTD = jnp.where(real_BT[..., None], Norm(name="branches_norm")(x_BTD), 0)
        wide = drop(jax.nn.relu(_linear("wide", y_BTD, 4 * d)))
        narrow = drop(jax.nn.relu(Convolution(d // 2, NARROW, name="narrow")(y_BTD)))
        y_BTC = Norm(name="joined_norm")(add_front(wide, narrow))
        y_BTC = jnp.where(real_BT[..., None], y_BTC, 0)
        joined = Separable(d // 2, widths["joined"], causal=False, name="joined")
        x_BTD = add_front(x_BTD, drop(joined(y_BTC)))

        y_BTD = Norm(name="self_attention_norm")(x_BTD)
        x_BTD += drop(attend("self_attention", self.layer.heads, y_BTD))
        return _ffn(x_BTD, self.layer.experts[0], jax.nn.relu, drop)


class DecoderCell(nn.Module):
    """A cell of the decoder."""

    layer: DecoderLayer
    qkv_dim: int
    attention_dropout: float

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        memory: Memory,
        rate: float,
        key: jax.Array | None,
    ) -> jax.Array:
        """The mask is true where a query may attend; else as `EncoderCell`."""
        layer, d, drop, widths = self.layer, x_BTD.shape[-1], _Drop(rate, key), DEPTHWISE["decoder"]
        attend = _Attend(self.qkv_dim, self.attention_dropout, drop, self_mask_BTT)
        y_BTD = Norm(name="first_norm")(x_BTD)
        own = attend("first_self_attention", doubled_heads(layer.self_heads), y_BTD)
        x_BTD += drop(own) + drop(attend("first_cross_attention", layer.cross_heads, y_BTD, memory))

        y_BTD = Norm(name="branches_norm")(x_BTD)
        wide = drop(jax.nn.relu(Separable(2 * d, widths["wide"], causal=True, name="wide")(y_BTD)))
        narrow = drop(Separable(d // 2, widths["narrow"], causal=True, name="narrow")(y_BTD))
        y_BTC = Norm(name="joined_norm")(add_front(wide, narrow))
        x_BTD += drop(Separable(d, widths["joined"], causal=True, name="joined")(y_BTC))

        y_BTD = Norm(name="self_attention_norm")(x_BTD)
        x_BTD += drop(attend("self_attention", layer.self_heads, y_BTD))
        y_BTD = Norm(name="cross_attention_norm")(x_BTD)
        x_BTD += drop(attend("cross_attention", layer.cross_heads, y_BTD, memory))
        return _ffn(x_BTD, layer.experts[0], jax.nn.swish, drop)


class EvolvedStack(nn.Module):
    """The cells of an encoder or decoder, and the LayerNorm after them."""

    layers: tuple[LayerSpec, ...]
    cell: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: tuple, rate: float, keys_L: jax.Array | None
    ) -> list[jax.Array]:
        """The output of each cell, the last one's normalised; `inputs` are the cells' others."""
        outputs = []
        for i, layer in enumerate(self.layers):
            key = None if keys_L is None else keys_L[i]
            x_BTD = self.cell(layer, name=f"layer_{i}")(x_BTD, *inputs, rate, key)
            outputs.append(x_BTD)
        return [*outputs[:-1], Norm(name="norm")(outputs[-1])]


class EvolvedTransformer(nn.Module):
    """An architecture of evolved cells; fields and call as of `Transformer`."""

    arch: Subnet
    vocab_sizes: tuple[int, int]
    encoder_base_dim: int
    decoder_base_dim: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    share_embeddings: str = "all"
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, source_BS: jax.Array, target_in_BT: jax.Array, key: jax.Array | None = None
    ) -> Output:
        arch = self.arch
        words = seq2seq.word_tables(arch, self.vocab_sizes, self.share_embeddings)
        key = key if self.dropout or self.attention_dropout else None
        bases = self.encoder_base_dim, self.decoder_base_dim
        ids, tables = (source_BS, target_in_BT), (words.source, words.target)
        real_BS, real_BT = source_BS != PAD_ID, target_in_BT != PAD_ID
        cells = EncoderCell, DecoderCell
        all_keys = seq2seq.dropout_keys(arch, key)
        outputs: list[list[jax.Array]] = []
        for i, (side, stack) in enumerate(arch.stacks):
            keys, rate = all_keys[i], self.dropout * stack.embed_dim / bases[i]
            x_BTD = seq2seq.stack_input(
                tables[i], ids[i], stack.embed_dim, bases[i], rate, keys.embedding,
                dtype=self.dtype,
            )  # fmt: skip
            kind: Any = nn.remat(cells[i]) if self.remat else cells[i]
            inputs: tuple[Any, ...] = (real_BS,)
            if side == "decoder":
                inputs = seq2seq.causal_mask(target_in_BT), Memory(outputs[0][-1], real_BS)
            cell = functools.partial(
                kind, qkv_dim=arch.qkv_dim, attention_dropout=self.attention_dropout
            )
            made = EvolvedStack(stack.layers, cell, name=side)
            outputs.append(made(x_BTD, inputs, rate, keys.layers_L))
        encoded, decoded = outputs
        n = len(encoded) + len(decoded)
        none_L = jnp.zeros(n, jnp.float32)
        return Output(
            logits_BTV=words.output.logits(decoded[-1]),
            hidden_BTD=decoded[-1],
            router_losses=RouterLosses(none_L, none_L),
            n_layers=n,
            encoder_layers=encoded,
            decoder_layers=decoded,
            router_logits=[
                *(jnp.zeros((real_BS.size, 1)) for _ in encoded),
                *(jnp.zeros((real_BT.size, 1)) for _ in decoded),
            ],
        )
