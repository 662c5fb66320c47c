"""The post-norm encoder-decoder Transformer: a supernet where it is given a choice, else a subnet.

Letters: B batch, T target time, S source time, D embedding, V vocabulary, P segments of S memory
positions each, N tokens, E experts, L layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from automoe_jax.architecture.active import ActiveSubnet, Array
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import DecoderLayer, EncoderLayer, Subnet
from automoe_jax.model import elastic_stack as elastic
from automoe_jax.model import stacked
from automoe_jax.model.block import Block, Memory
from automoe_jax.model.elastic_layer import Context, Elastic
from automoe_jax.model.elastic_stack import StackOutput
from automoe_jax.model.experts import load_balance
from automoe_jax.model.layers import (
    Embedding,
    cut,
    dropout,
    position_table,
    positions,
    random_bits,
    width,
)
from automoe_jax.ops import grouped_ffn


class Output(NamedTuple):
    """What a forward pass returns; what is not used costs nothing under jit."""

    logits_BTV: jax.Array
    hidden_BTD: jax.Array  # the decoder's output, zero beyond the active width
    load_balance: jax.Array  # [], mean over the active layers
    encoder_layers: list[jax.Array]  # output of each layer; zeros beyond the active depth
    decoder_layers: list[jax.Array]
    router_logits: list[jax.Array]  # (N, E) per layer, encoder first


@dataclasses.dataclass(frozen=True)
class SupernetStatic:
    """The static side of a supernet: what its compiled program is specialised for.

    Attributes:
      encoder_dims, decoder_dims: embedding widths, ascending.
      encoder_ffn_dims, decoder_ffn_dims: FFN sizes of experts besides 0.
      masked: whether the layers run under masks alone, see `elastic.run_masked`.
      backend: of the grouped FFN; empty for the platform's.
    """

    encoder_dims: tuple[int, ...]
    decoder_dims: tuple[int, ...]
    encoder_ffn_dims: tuple[int, ...]
    decoder_ffn_dims: tuple[int, ...]
    masked: bool = False
    backend: str = ""


def supernet_static(space: SearchSpace, masked: bool = False, backend: str = "") -> SupernetStatic:
    """Those of a search space."""
    return SupernetStatic(
        tuple(sorted(set(space.encoder_embed_dims))),
        tuple(sorted(set(space.decoder_embed_dims))),
        tuple(sorted(set(space.encoder_ffn_dims))),
        tuple(sorted(set(space.decoder_ffn_dims))),
        masked,
        backend,
    )


class Stack(nn.Module):
    """The layers of a stand-alone encoder or decoder."""

    layers: tuple[EncoderLayer | DecoderLayer, ...]
    qkv_dim: int
    attention_dropout: float

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        self_mask_BTT: jax.Array,
        real_BT: jax.Array,
        memory: Memory | None,
        rate: float,
        keys: list[jax.Array | None],
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
        """(outputs, load-balance loss summed, router logits); `keys` has one entry per layer."""
        outputs, balance, logits = [], jnp.float32(0), []
        for i, spec in enumerate(self.layers):
            own = memory
            if isinstance(spec, DecoderLayer):
                assert memory is not None
                m = spec.cross_span * memory.outputs_PBSD.shape[2]
                own = Memory(memory.outputs_PBSD[: spec.cross_span], memory.real_BM[:, :m])
            block = Block(spec, self.qkv_dim, self.attention_dropout, name=f"layer_{i}")
            x_BTD, routing = block(x_BTD, self_mask_BTT, real_BT, own, rate, keys[i])
            outputs.append(x_BTD)
            balance += load_balance(routing, real_BT.reshape(-1))
            logits.append(routing.logits_NE)
        return outputs, balance, logits


class ElasticStack(nn.Module):
    """The layers of a supernet's encoder or decoder."""

    static: Elastic
    masked: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, memory_PBSD: jax.Array | None, context: Context
    ) -> StackOutput:
        params = self.param(stacked.LAYERS, self._init, x_BTD.shape[-1], memory_PBSD)
        run = elastic.run_masked if self.masked else elastic.run
        return run(self.static, params, x_BTD, memory_PBSD, context)

    def _init(self, key: jax.Array, dim: int, memory_PBSD: jax.Array | None) -> Any:
        x_BTD, real_BT = jnp.zeros((1, 1, dim)), jnp.ones((1, 1), bool)

        def one(spec, key) -> Any:
            memory = None
            if memory_PBSD is not None:
                memory = Memory(jnp.zeros((1, 1, 1, memory_PBSD.shape[-1])), real_BT)
            block = self.static.block(spec)
            return block.init(key, x_BTD, real_BT[:, None], real_BT, memory, 0.0, None)["params"]

        specs = self.static.specs
        layers = [
            one(spec, k) for spec, k in zip(specs, jax.random.split(key, len(specs)), strict=True)
        ]
        return stacked.join(layers, self.static.experts)


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
      choices: of a supernet, which then needs a choice at every call; None for one subnet.
      share_embeddings: as `SearchSpace.share_embeddings`.
    """

    arch: Subnet
    vocab_sizes: tuple[int, int]
    encoder_base_dim: int
    decoder_base_dim: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    choices: SupernetStatic | None = None
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
        if self.choices is None:
            common = {"qkv_dim": arch.qkv_dim, "attention_dropout": self.attention_dropout}
            self.encoder = Stack(arch.encoder.layers, **common)
            self.decoder = Stack(arch.decoder.layers, **common)
        else:
            masked = self.choices.masked
            self.encoder = ElasticStack(self._static("encoder"), masked)
            self.decoder = ElasticStack(self._static("decoder"), masked)

    def _static(self, side: str) -> Elastic:
        assert self.choices is not None
        return Elastic(
            specs=getattr(self.arch, side).layers,
            dims=getattr(self.choices, f"{side}_dims"),
            ffn_dims=getattr(self.choices, f"{side}_ffn_dims"),
            memory_dims=self.choices.encoder_dims if side == "decoder" else (),
            qkv_dim=self.arch.qkv_dim,
            dropout=self.dropout,
            base_dim=getattr(self, f"{side}_base_dim"),
            attention_dropout=self.attention_dropout,
            backend=self.choices.backend or grouped_ffn.default_backend(),
        )

    def __call__(
        self,
        source_BS: jax.Array,
        target_in_BT: jax.Array,
        choice: ActiveSubnet | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """A teacher-forced pass.

        Args:
          source_BS: token ids, eos included, padded on either side.
          target_in_BT: decoder input, starting with eos, padded on the right.
          choice: the active subnet of a supernet; None in a stand-alone model.
          key: for dropout; None to leave it out.
        """
        if (choice is None) != (self.choices is None):
            raise ValueError("a supernet needs a choice, and a stand-alone model takes none")
        if choice is not None:
            encoded = self._encode_elastic(source_BS, choice, key)
            decoded = self._decode_elastic(target_in_BT, encoded, source_BS, choice, key)
            depths = choice.encoder.depth, choice.decoder.depth
            layers = [list(out.outputs_LBTD) for out in (encoded, decoded)]
            logits = [
                own[:, : len(spec.experts)]
                for out, stack in ((encoded, self.arch.encoder), (decoded, self.arch.decoder))
                for own, spec in zip(out.logits_LNE, stack.layers, strict=True)
            ]
            hidden_BTD = decoded.outputs_LBTD[depths[1] - 1]
            balance = encoded.balance + decoded.balance
        else:
            encoder_layers, e_balance, e_logits = self._encode(source_BS, key)
            decoder_layers, d_balance, d_logits = self._decode(
                target_in_BT, encoder_layers, source_BS, key
            )
            layers, depths = [encoder_layers, decoder_layers], (len(e_logits), len(d_logits))
            hidden_BTD, logits = decoder_layers[-1], [*e_logits, *d_logits]
            balance = e_balance + d_balance
        return Output(
            logits_BTV=self.words.output.logits(hidden_BTD),
            hidden_BTD=hidden_BTD,
            load_balance=balance / (depths[0] + depths[1]),
            encoder_layers=layers[0],
            decoder_layers=layers[1],
            router_logits=logits,
        )

    # --- a stand-alone model -----------------------------------------------------------------

    def _encode(self, source_BS, key):
        dim, base_dim = self.arch.encoder.embed_dim, self.encoder_base_dim
        real_BS = source_BS != PAD_ID
        keys = self._keys(key, "encoder")
        x_BSD, rate = self._embed(self.words.source, source_BS, dim, base_dim, None, keys[-1])
        encoder: Any = self.encoder
        return encoder(x_BSD, real_BS[:, None], real_BS, None, rate, keys)

    def _decode(self, target_in_BT, encoded, source_BS, key):
        dim, base_dim = self.arch.decoder.embed_dim, self.decoder_base_dim
        keys = self._keys(key, "decoder")
        x_BTD, rate = self._embed(self.words.target, target_in_BT, dim, base_dim, None, keys[-1])
        span = self._longest_span()
        memory = Memory(jnp.stack(encoded[::-1][:span]), jnp.tile(source_BS != PAD_ID, (1, span)))
        mask_BTT = _causal(target_in_BT)
        decoder: Any = self.decoder
        return decoder(x_BTD, mask_BTT, target_in_BT != PAD_ID, memory, rate, keys)

    # --- a supernet --------------------------------------------------------------------------

    def _encode_elastic(self, source_BS, choice: ActiveSubnet, key) -> StackOutput:
        dim, base_dim = self.arch.encoder.embed_dim, self.encoder_base_dim
        real_BS = source_BS != PAD_ID
        keys = self._keys(key, "encoder")
        side = choice.encoder
        x_BSD, _ = self._embed(
            self.words.source, source_BS, dim, base_dim, side.embed_dim, keys[-1]
        )
        context = Context(side, real_BS[:, None], real_BS, None, None, _stack_keys(keys))
        encoder: Any = self.encoder
        return encoder(x_BSD, None, context)

    def _decode_elastic(
        self, target_in_BT, encoded: StackOutput, source_BS, choice: ActiveSubnet, key
    ) -> StackOutput:
        dim, base_dim = self.arch.decoder.embed_dim, self.decoder_base_dim
        keys = self._keys(key, "decoder")
        side = choice.decoder
        x_BTD, _ = self._embed(
            self.words.target, target_in_BT, dim, base_dim, side.embed_dim, keys[-1]
        )
        memory_PBSD = jnp.stack([
            encoded.outputs_LBTD[jnp.maximum(choice.encoder.depth - 1 - back, 0)]
            for back in range(self._longest_span())
        ])  # fmt: skip
        context = Context(
            side, _causal(target_in_BT), target_in_BT != PAD_ID, source_BS != PAD_ID,
            choice.encoder.embed_dim, _stack_keys(keys),
        )  # fmt: skip
        decoder: Any = self.decoder
        return decoder(x_BTD, memory_PBSD, context)

    # --- both --------------------------------------------------------------------------------

    def _longest_span(self) -> int:
        return max(layer.cross_span for layer in self.arch.decoder.layers)

    def _keys(self, key: jax.Array | None, side: str) -> list[jax.Array | None]:
        """A dropout key for each layer of a stack and for its embedding, which comes last."""
        n_encoder = len(self.arch.encoder.layers) + 1
        n = n_encoder + len(self.arch.decoder.layers) + 1
        here = slice(n_encoder) if side == "encoder" else slice(n_encoder, n)
        if key is None or not (self.dropout or self.attention_dropout):
            return [None] * len(range(n)[here])
        return list(jax.random.split(key, n)[here])

    def rate(self, dim: Array | int, base_dim: int) -> Any:
        """Dropout at a width."""
        return self.dropout * dim / base_dim

    def _embed(self, words, ids_BT, dim: int, base_dim: int, active_dim: Array | None, key):
        """(input of a stack, its dropout rate)."""
        active = None if active_dim is None else width(active_dim, dim)
        rate = self.rate(dim if active_dim is None else active_dim, base_dim)
        # At the base width, then cut: see position_table.
        table = position_table(ids_BT.shape[1], base_dim)[:, :dim]
        x_BTD = words(ids_BT, dim, active)
        x_BTD = cut(x_BTD + jnp.asarray(table)[positions(ids_BT)], active)
        return dropout(x_BTD, rate, random_bits(key, [x_BTD.shape])[0]), rate


def _stack_keys(keys: list[jax.Array | None]) -> jax.Array | None:
    """The layers' dropout keys as one array."""
    layers = [key for key in keys[:-1] if key is not None]
    return jnp.stack(layers) if layers else None


def _causal(target_in_BT: jax.Array) -> jax.Array:
    t = target_in_BT.shape[1]
    return jnp.tril(jnp.ones((1, t, t), bool))


def output_table(params: Any) -> jax.Array:
    """The words of the output layer, (V, D), whichever table they are in."""
    names = ("output", "target_embedding", "embedding")
    return next(params[name]["table"] for name in names if name in params)
