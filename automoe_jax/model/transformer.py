"""The post-norm encoder-decoder Transformer: a supernet where it is given a choice, else a subnet.

Letters: B batch, T target time, S source time, D embedding, V vocabulary, M memory time (source
time times cross-attention span), N tokens, E experts, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from automoe_jax.choice import Array, Choice, LayerChoice
from automoe_jax.ids import PAD_ID
from automoe_jax.model.attention import Attention
from automoe_jax.model.experts import ExpertChoice, Experts, Routing, load_balance
from automoe_jax.model.layers import (
    Embedding,
    LayerNorm,
    Width,
    cut,
    dropout,
    position_table,
    positions,
    random_bits,
    width,
)
from automoe_jax.subnet import DecoderLayer, EncoderLayer, Subnet


class Rates(NamedTuple):
    """Dropout of a stack at its active width, and the attention's, which is not scaled."""

    hidden: Array | float
    attention: float


class Output(NamedTuple):
    """What a forward pass returns; what is not used costs nothing under jit."""

    logits_BTV: jax.Array
    load_balance: jax.Array  # [], mean over the active layers
    encoder_layers: list[jax.Array]  # output of each layer, skipped ones repeat the last
    decoder_layers: list[jax.Array]
    router_logits: list[jax.Array]  # (N, E) per layer, encoder first


def _layer_choice(choice: LayerChoice | None, i: int) -> LayerChoice | None:
    """Row `i` of a stack's choice."""
    if choice is None:
        return None
    fields = {
        name: value[i] if name.endswith(("_L", "_LE")) and value.shape[0] else value
        for name, value in choice._asdict().items()
    }
    return LayerChoice(**fields)


class Block(nn.Module):
    """One layer: self-attention, cross-attention in a decoder, experts; each x = LN(x + f(x)).

    Attributes:
      spec: the layer; in a supernet its bounding layer.
      qkv_dim: Q/K/V width.
      attention_dropout: rate on attention probabilities.
    """

    spec: EncoderLayer | DecoderLayer
    qkv_dim: int
    attention_dropout: float

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        real_BT: jax.Array,
        memory: tuple[jax.Array, jax.Array] | None,
        choice: LayerChoice | None,
        active: Width | None,
        rate: Array | float,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Routing]:
        """Runs the layer.

        Args:
          x_BTD: input, cut to `active`.
          self_mask_BTT: where self-attention may look.
          real_BT: false for padding.
          memory: (B, M, D) encoder outputs and (B, M) their mask, segments of S in the order
            last, second last, third last layer; None in an encoder.
          choice: this layer's row of the choice.
          active: active width of the stack.
          rate: dropout at that width.
          key: for dropout; None to leave it out.
        """
        spec = self.spec
        b, t, d = x_BTD.shape
        n_heads = spec.heads if isinstance(spec, EncoderLayer) else spec.self_heads
        shapes = [(b, n_heads, t, t), (b, t, d), (b * t * spec.top_k, d)]
        if isinstance(spec, DecoderLayer):
            assert memory is not None
            shapes += [(b, spec.cross_heads, t, memory[0].shape[1]), (b, t, d)]
        bits = random_bits(key, shapes)

        def attend(name: str, n_heads: int, heads, memory_BMD, mask_BTM, bits):
            module = Attention(n_heads, self.qkv_dim, self.attention_dropout, name=name)
            y_BTD = module(
                x_BTD, memory_BMD, mask_BTM, active=active, heads=heads, bits_BHTS=bits[0]
            )
            return LayerNorm(name=f"{name}_norm")(x_BTD + dropout(y_BTD, rate, bits[1]), active)

        heads = None if choice is None else choice.heads_L
        x_BTD = attend("self_attention", n_heads, heads, x_BTD, self_mask_BTT, bits[:2])
        if isinstance(spec, DecoderLayer):
            assert memory is not None
            memory_BMD, real_BM = memory
            source_time = memory_BMD.shape[1]
            if choice is None:
                heads = None
            else:
                heads = choice.cross_heads_L
                segment_M = jnp.arange(source_time) // (source_time // spec.cross_span)
                real_BM = real_BM & (segment_M < choice.cross_span_L)
            x_BTD = attend(
                "cross_attention", spec.cross_heads, heads, memory_BMD, real_BM[:, None], bits[3:]
            )

        experts = None
        if choice is not None:
            sizes_E = choice.sizes_LE[: len(spec.experts)]
            experts = ExpertChoice(choice.n_experts_L, sizes_E, choice.top_k_L)
        y_ND, routing = Experts(spec.experts, spec.top_k, name="experts")(
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            real_BT.reshape(-1),
            experts,
            dropout_rate=rate,
            bits_AD=bits[2],
        )
        y_BTD = cut(y_ND.reshape(x_BTD.shape), active)
        return LayerNorm(name="experts_norm")(x_BTD + y_BTD, active), routing


class Stack(nn.Module):
    """The layers of an encoder or a decoder; those beyond the active depth are skipped.

    A skipped layer is the identity behind a `lax.cond`: it costs nothing.
    """

    layers: tuple[EncoderLayer | DecoderLayer, ...]
    qkv_dim: int
    attention_dropout: float
    always: int  # front layers that every subnet has

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        real_BT: jax.Array,
        memories: list[tuple[jax.Array, jax.Array]] | None,
        choice: LayerChoice | None,
        active: Width | None,
        rate: Array | float,
        keys: list[jax.Array | None],
    ) -> tuple[list[jax.Array], list[Routing]]:
        """Output and routing of each layer. `memories` and `keys` have one entry per layer."""
        outputs, routings = [], []
        for i, spec in enumerate(self.layers):
            block = Block(spec, self.qkv_dim, self.attention_dropout, name=f"layer_{i}")
            row = _layer_choice(choice, i)
            memory = None if memories is None else memories[i]
            skippable = choice is not None and i >= self.always and not self.is_initializing()

            def run(block, x_BTD, memory=memory, row=row, key=keys[i]):
                return block(x_BTD, self_mask_BTT, real_BT, memory, row, active, rate, key)

            if skippable:
                assert choice is not None
                shapes = jax.eval_shape(functools.partial(_routing_of, spec), x_BTD)
                x_BTD, routing = nn.cond(
                    choice.depth > i,
                    run,
                    lambda block, x_BTD, shapes=shapes: (x_BTD, shapes_to_zeros(shapes)),
                    block,
                    x_BTD,
                )
            else:
                x_BTD, routing = run(block, x_BTD)
            outputs.append(x_BTD)
            routings.append(routing)
        return outputs, routings


def _routing_of(spec: EncoderLayer | DecoderLayer, x_BTD: jax.Array) -> Routing:
    n, n_experts = x_BTD.shape[0] * x_BTD.shape[1], len(spec.experts)
    return Routing(jnp.zeros((n, n_experts), x_BTD.dtype), jnp.zeros((n, spec.top_k), jnp.int32))


def shapes_to_zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


class Words(NamedTuple):
    """The tables of source, target and output; the same one where they are shared."""

    source: Embedding
    target: Embedding
    output: Embedding


class Transformer(nn.Module):
    """Encoder, decoder, and the embedding tables that they share, or not, with the output.

    Attributes:
      arch: sizes of all weights: a subnet to run as it is, or the hull of a space.
      vocab_sizes: V of source and target, pad columns included.
      encoder_base_dim, decoder_base_dim: widths of the supernet, at which positions are made and
        to which dropout is scaled; an extracted subnet keeps them.
      dropout: rate at the base width.
      attention_dropout: rate on attention probabilities.
      min_encoder_depth, min_decoder_depth: layers that every subnet has (supernet only).
      share_embeddings: as `SearchSpace.share_embeddings`.
    """

    arch: Subnet
    vocab_sizes: tuple[int, int]
    encoder_base_dim: int
    decoder_base_dim: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    min_encoder_depth: int = 1
    min_decoder_depth: int = 1
    share_embeddings: str = "all"

    def setup(self):
        (source, target), arch = self.vocab_sizes, self.arch
        if self.share_embeddings == "all":
            dim = max(arch.encoder.embed_dim, arch.decoder.embed_dim)
            self.embedding = Embedding(source, dim)
            self.words = Words(self.embedding, self.embedding, self.embedding)
        else:
            self.source_embedding = Embedding(source, arch.encoder.embed_dim)
            self.target_embedding = output = Embedding(target, arch.decoder.embed_dim)
            if self.share_embeddings == "none":
                self.output = output = Embedding(target, arch.decoder.embed_dim, zero_pad=False)
            self.words = Words(self.source_embedding, self.target_embedding, output)
        common = {"qkv_dim": self.arch.qkv_dim, "attention_dropout": self.attention_dropout}
        self.encoder = Stack(self.arch.encoder.layers, always=self.min_encoder_depth, **common)
        self.decoder = Stack(self.arch.decoder.layers, always=self.min_decoder_depth, **common)

    def __call__(
        self,
        source_BS: jax.Array,
        target_in_BT: jax.Array,
        choice: Choice | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """A teacher-forced pass.

        Args:
          source_BS: token ids, eos included, padded on either side.
          target_in_BT: decoder input, starting with eos, padded on the right.
          choice: the active subnet; None runs `arch` itself, without masks.
          key: for dropout; None to leave it out.
        """
        encoded, e_routings = self.encode(source_BS, choice, key)
        decoded, d_routings = self.decode(target_in_BT, encoded, source_BS, choice, key)
        balance = self._load_balance(
            choice,
            [(e_routings, source_BS, "encoder"), (d_routings, target_in_BT, "decoder")],
        )
        return Output(
            logits_BTV=self.words.output.logits(decoded[-1]),
            load_balance=balance,
            encoder_layers=encoded,
            decoder_layers=decoded,
            router_logits=[r.logits_NE for r in (*e_routings, *d_routings)],
        )

    def encode(
        self,
        source_BS: jax.Array,
        choice: Choice | None = None,
        key: jax.Array | None = None,
    ) -> tuple[list[jax.Array], list[Routing]]:
        """Outputs (B, S, D) and routing of each encoder layer."""
        dim, base_dim = self.arch.encoder.embed_dim, self.encoder_base_dim
        side = None if choice is None else choice.encoder
        active, rate = self._active(side, dim, base_dim)
        real_BS = source_BS != PAD_ID
        keys = self._keys(key)[: len(self.arch.encoder.layers) + 1]
        x_BSD = self._embed(self.words.source, source_BS, dim, base_dim, active, rate, keys[-1])
        return self.encoder(x_BSD, real_BS[:, None], real_BS, None, side, active, rate, keys)

    def decode(
        self,
        target_in_BT: jax.Array,
        encoded: list[jax.Array],
        source_BS: jax.Array,
        choice: Choice | None = None,
        key: jax.Array | None = None,
    ) -> tuple[list[jax.Array], list[Routing]]:
        """Outputs (B, T, D) and routing of each decoder layer."""
        dim, base_dim = self.arch.decoder.embed_dim, self.decoder_base_dim
        side = None if choice is None else choice.decoder
        active, rate = self._active(side, dim, base_dim)
        t = target_in_BT.shape[1]
        causal_BTT = jnp.tril(jnp.ones((1, t, t), bool))
        keys = self._keys(key)[len(self.arch.encoder.layers) + 1 :]
        x_BTD = self._embed(self.words.target, target_in_BT, dim, base_dim, active, rate, keys[-1])
        memories = self._memories(encoded, source_BS, choice)
        return self.decoder(
            x_BTD, causal_BTT, target_in_BT != PAD_ID, memories, side, active, rate, keys
        )

    def _keys(self, key: jax.Array | None) -> list[jax.Array | None]:
        """A dropout key for each layer and for the embedding behind its stack's layers."""
        n = len(self.arch.encoder.layers) + len(self.arch.decoder.layers) + 2
        if key is None or not (self.dropout or self.attention_dropout):
            return [None] * n
        return list(jax.random.split(key, n))

    def _active(self, side: LayerChoice | None, dim: int, base_dim: int):
        if side is None:
            return None, self.dropout * dim / base_dim
        return width(side.embed_dim, dim), self.dropout * side.embed_dim / base_dim

    def _embed(self, words, ids_BT, dim, base_dim, active, rate, key):
        # At the base width, then cut: see position_table.
        table = position_table(ids_BT.shape[1], base_dim)[:, :dim]
        x_BTD = words(ids_BT, dim, active)
        x_BTD = cut(x_BTD + jnp.asarray(table)[positions(ids_BT)], active)
        return dropout(x_BTD, rate, random_bits(key, [x_BTD.shape])[0])

    def _memories(self, encoded, source_BS, choice):
        """Per decoder layer the last encoder outputs along time, last layer first, with mask."""
        real_BS = source_BS != PAD_ID
        longest = max(layer.cross_span for layer in self.arch.decoder.layers)
        if choice is None or self.min_encoder_depth == len(encoded):
            newest = encoded[::-1][:longest]
        else:
            # Layers past the active depth repeat its last output: count back from the depth.
            stacked_LBSD = jnp.stack(encoded)
            newest = [
                stacked_LBSD[jnp.maximum(choice.encoder.depth - 1 - back, 0)]
                for back in range(longest)
            ]
        return [
            (
                jnp.concatenate(newest[: layer.cross_span], axis=1),
                jnp.tile(real_BS, (1, layer.cross_span)),
            )
            for layer in self.arch.decoder.layers
        ]

    def _load_balance(self, choice, stacks) -> jax.Array:
        total, n_layers = jnp.float32(0), jnp.float32(0)
        for routings, ids_BT, name in stacks:
            real_N = (ids_BT != PAD_ID).reshape(-1)
            for i, routing in enumerate(routings):
                here = jnp.float32(1)
                if choice is not None:
                    here = (getattr(choice, name).depth > i).astype(jnp.float32)
                total += here * load_balance(routing, real_N)
                n_layers += here
        return total / n_layers
