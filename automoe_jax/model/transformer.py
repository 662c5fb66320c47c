"""The stand-alone post-norm encoder-decoder Transformer of one subnet.

Letters: B batch, T target time, S source time, D embedding, P segments of S memory positions each,
M = P * S.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.architecture.subnet import DecoderLayer, LayerSpec, Subnet
from automoe_jax.model import seq2seq
from automoe_jax.model.block import Block, CrossMemory
from automoe_jax.model.experts import RouterLosses, router_losses
from automoe_jax.model.scales import Scales
from automoe_jax.model.seq2seq import Output


class Stack(nn.Module):
    """The layers of an encoder or decoder."""

    layers: tuple[LayerSpec, ...]
    qkv_dim: int
    attention_dropout: float
    scales: Scales
    router_jitter: float
    remat: bool
    routing: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        real_BT: jax.Array,
        memory: CrossMemory | None,
        rate: float,
        keys_L: jax.Array | None,
    ) -> tuple[list[jax.Array], list[RouterLosses], list[jax.Array]]:
        """Outputs, router losses and router logits of each layer."""
        outputs, losses, logits = [], [], []
        for i, layer in enumerate(self.layers):
            own = memory
            if isinstance(layer, DecoderLayer):
                assert memory is not None
                m = layer.cross_span * memory.outputs_PBSD.shape[2]
                own = CrossMemory(memory.outputs_PBSD[: layer.cross_span], memory.real_BM[:, :m])
            fixed = self.attention_dropout, self.scales, self.router_jitter, self.routing
            kind = nn.remat(Block) if self.remat else Block
            block = kind(layer, self.qkv_dim, *fixed, name=f"layer_{i}")
            key = None if keys_L is None else keys_L[i]
            x_BTD, routing = block(x_BTD, self_mask_BTT, real_BT, own, rate, key)
            outputs.append(x_BTD)
            losses.append(router_losses(routing, real_BT.reshape(-1)))
            logits.append(routing.logits_NE)
        return outputs, losses, logits


class Transformer(nn.Module):
    """A subnet on its own: static shapes, no masks beyond padding and causality.

    Positions and dropout depend on the supernet's widths, the base widths; an extracted subnet
    keeps them.
    """

    arch: Subnet
    vocab_sizes: tuple[int, int]  # of source and target, pad included
    encoder_base_dim: int
    decoder_base_dim: int
    dropout: float = 0.0  # rate at the base width
    attention_dropout: float = 0.0
    share_embeddings: str = "all"  # as in `SearchSpace`
    scales: Scales = Scales()
    router_jitter: float = 0.0
    dtype: str = "float32"  # as in `Supernet`
    remat: bool = False
    routing: str = "learned"  # as in `Experts`

    @nn.compact
    def __call__(
        self, source_BS: jax.Array, target_in_BT: jax.Array, key: jax.Array | None = None
    ) -> Output:
        """A teacher-forced pass, with dropout if there is a key.

        The source includes eos and is padded on either side; the decoder's input starts with eos
        and is padded on the right.
        """
        arch = self.arch
        words = seq2seq.word_tables(arch, self.vocab_sizes, self.share_embeddings)
        key = key if self.dropout or self.attention_dropout or self.router_jitter else None
        encoder_keys, decoder_keys = seq2seq.dropout_keys(arch, key)
        d_e, d_d = arch.encoder.embed_dim, arch.decoder.embed_dim
        e_rate, d_rate = self.rates()
        common = (arch.qkv_dim, self.attention_dropout, self.scales, self.router_jitter)
        common = (*common, self.remat, self.routing)

        real_BS, real_BT = source_BS != PAD_ID, target_in_BT != PAD_ID
        x_BSD = seq2seq.stack_input(
            words.source, source_BS, d_e, self.encoder_base_dim, e_rate, encoder_keys.embedding,
            dtype=self.dtype,
        )  # fmt: skip
        encoder = Stack(arch.encoder.layers, *common, name="encoder")
        encoded, e_losses, e_logits = encoder(
            x_BSD, real_BS[:, None], real_BS, None, e_rate, encoder_keys.layers_L
        )

        x_BTD = seq2seq.stack_input(
            words.target, target_in_BT, d_d, self.decoder_base_dim, d_rate, decoder_keys.embedding,
            dtype=self.dtype,
        )  # fmt: skip
        span = seq2seq.longest_span(arch)
        memory = CrossMemory(jnp.stack(encoded[::-1][:span]), jnp.tile(real_BS, (1, span)))
        decoder = Stack(arch.decoder.layers, *common, name="decoder")
        decoded, d_losses, d_logits = decoder(
            x_BTD, seq2seq.causal_mask(target_in_BT), real_BT, memory, d_rate, decoder_keys.layers_L
        )
        return Output(
            logits_BTV=words.output.logits(decoded[-1]),
            hidden_BTD=decoded[-1],
            router_losses=jax.tree.map(lambda *x: jnp.stack(x), *e_losses, *d_losses),
            n_layers=len(encoded) + len(decoded),
            encoder_layers=encoded,
            decoder_layers=decoded,
            router_logits=[*e_logits, *d_logits],
        )

    def rates(self) -> tuple[float, float]:
        """Dropout of encoder and decoder, scaled to their widths."""
        d_e, d_d = self.arch.encoder.embed_dim, self.arch.decoder.embed_dim
        return (
            self.dropout * d_e / self.encoder_base_dim,
            self.dropout * d_d / self.decoder_base_dim,
        )
