"""The supernet: every subnet of a search space, as data, under one compilation.

Letters: B batch, T target time, S source time, D embedding, P segments of S memory positions each,
L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from automoe_jax.architecture.active import ActiveStack, ActiveSubnet
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.model import elastic_stack, seq2seq, stacked
from automoe_jax.model.block import Block, CrossMemory
from automoe_jax.model.elastic_layer import Context, StackStatic
from automoe_jax.model.elastic_stack import StackOutput
from automoe_jax.model.scales import scales_of
from automoe_jax.model.seq2seq import Output
from automoe_jax.model.sharing import sharing_of
from automoe_jax.ops import grouped_ffn


class ElasticStack(nn.Module):
    """The layers of a supernet's encoder or decoder."""

    static: StackStatic
    masked: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, memory_PBSD: jax.Array | None, context: Context
    ) -> StackOutput:
        params = self.param(stacked.LAYERS, self._init, x_BTD.shape[-1], memory_PBSD)
        if self.is_initializing():  # weights are wanted, not outputs: compile nothing else
            return elastic_stack.zero_output(self.static, x_BTD)
        run = elastic_stack.run_masked if self.masked else elastic_stack.run
        params = self.static.sharing.experts(params, context.active.n_experts_L)
        return run(self.static, params, x_BTD, memory_PBSD, context)

    def _init(self, key: jax.Array, dim: int, memory_PBSD: jax.Array | None) -> Any:
        x_BTD, real_BT = jnp.zeros((1, 1, dim)), jnp.ones((1, 1), bool)
        memory = None
        if memory_PBSD is not None:
            memory = CrossMemory(jnp.zeros((1, 1, 1, memory_PBSD.shape[-1])), real_BT)
        static = self.static
        layers = [
            dataclasses.replace(layer, experts=(static.ffn_dims[-1],) * static.sharing.stored)
            if static.sharing.kind != "front"
            else layer
            for layer in static.layers
        ]
        inputs = (x_BTD, real_BT[:, None], real_BT, memory, 0.0, None)
        keys = jax.random.split(key, len(layers))
        params: list[Any] = [None] * len(layers)
        for layer in dict.fromkeys(layers):
            alike = np.flatnonzero([other == layer for other in layers])
            one = functools.partial(_layer_params, static.block(layer), inputs)
            # Layers that are equal in one call: each call compiles its own random numbers.
            for i, own in zip(alike, _unstacked(jax.vmap(one)(keys[alike])), strict=True):
                params[i] = own
        joined = stacked.join(params, [layer.experts for layer in layers])
        if static.spread > 1:  # called for the shapes alone
            return {**joined, "experts": stacked.part(joined["experts"], 0, static.spread)}
        return static.sharing.started(joined, len(layers))


def _layer_params(block: Block, inputs: tuple[Any, ...], key: jax.Array) -> Any:
    return block.init(key, *inputs)["params"]


def _unstacked(tree: Any) -> list[Any]:
    """The trees of a tree of stacked arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef.unflatten(own) for own in zip(*leaves, strict=True)]


class Supernet(nn.Module):
    """Encoder and decoder at the largest sizes of a search space; runs any subnet of it."""

    space: SearchSpace  # its hull has the sizes of all weights
    vocab_sizes: tuple[int, int]  # of source and target, pad included
    dropout: float = 0.0  # rate at the full width, scaled to the active one
    attention_dropout: float = 0.0
    router_jitter: float = 0.0
    dtype: str = "float32"  # of activations and products; sums, norms and routers are fp32
    remat: bool = False  # True to store of each layer its input alone, and compute it again
    spread: int = 1  # devices that the experts of a layer are spread over, see `spread_experts`
    masked: bool = False  # make layers elastic by masks alone, see `elastic_stack.run_masked`
    backend: str = ""  # of the grouped FFN; empty for the platform's default

    @nn.compact
    def __call__(
        self,
        source_BS: jax.Array,
        target_in_BT: jax.Array,
        subnet: ActiveSubnet,
        key: jax.Array | None = None,
    ) -> Output:
        """A teacher-forced pass through the active subnet; other arguments as in `Transformer`."""
        hull = self.space.hull()
        words = seq2seq.word_tables(hull, self.vocab_sizes, self.space.share_embeddings)
        key = key if self.dropout or self.attention_dropout or self.router_jitter else None
        encoder_keys, decoder_keys = seq2seq.dropout_keys(hull, key)
        real_BS, real_BT = source_BS != PAD_ID, target_in_BT != PAD_ID

        x_BSD = self._input(words.source, source_BS, "encoder", subnet.encoder, encoder_keys)
        masks = real_BS[:, None], real_BS, None
        context = Context(subnet.encoder, *masks, None, encoder_keys.layers_L)
        encoder = ElasticStack(self.stack_static("encoder"), self.masked, name="encoder")
        encoded = encoder(x_BSD, None, context)

        x_BTD = self._input(words.target, target_in_BT, "decoder", subnet.decoder, decoder_keys)
        memory_PBSD = jnp.stack([
            encoded.outputs_LBTD[jnp.maximum(subnet.encoder.depth - 1 - back, 0)]
            for back in range(seq2seq.longest_span(hull))
        ])  # fmt: skip
        masks = seq2seq.causal_mask(target_in_BT), real_BT, real_BS
        memory_dim = subnet.encoder.embed_dim
        context = Context(subnet.decoder, *masks, memory_dim, decoder_keys.layers_L)
        decoder = ElasticStack(self.stack_static("decoder"), self.masked, name="decoder")
        decoded = decoder(x_BTD, memory_PBSD, context)

        hidden_BTD = decoded.outputs_LBTD[subnet.decoder.depth - 1]
        return Output(
            logits_BTV=words.output.logits(hidden_BTD),
            hidden_BTD=hidden_BTD,
            router_losses=jax.tree.map(
                lambda *x: jnp.concatenate(x), encoded.losses_L, decoded.losses_L
            ),
            n_layers=subnet.encoder.depth + subnet.decoder.depth,
            encoder_layers=list(encoded.outputs_LBTD),
            decoder_layers=list(decoded.outputs_LBTD),
            router_logits=[
                logits_NE[:, : len(layer.experts)]
                for out, stack in ((encoded, hull.encoder), (decoded, hull.decoder))
                for logits_NE, layer in zip(out.logits_LNE, stack.layers, strict=True)
            ],
        )

    def stack_static(self, side: str) -> StackStatic:
        """The static side of a stack, "encoder" or "decoder"."""
        stack = getattr(self.space.hull(), side)

        def sizes(name: str) -> tuple[int, ...]:
            return tuple(sorted(set(getattr(self.space, name))))

        return StackStatic(
            layers=stack.layers,
            dims=sizes(f"{side}_embed_dims"),
            ffn_dims=sizes(f"{side}_ffn_dims"),
            memory_dims=sizes("encoder_embed_dims") if side == "decoder" else (),
            qkv_dim=self.space.qkv_dim,
            dropout=self.dropout,
            base_dim=stack.embed_dim,
            attention_dropout=self.attention_dropout,
            router_jitter=self.router_jitter,
            scales=scales_of(self.space),
            sharing=sharing_of(self.space, side),
            backend=self.backend or grouped_ffn.default_backend(),
            remat=self.remat,
            spread=self.spread,
        )

    def _input(self, table, ids_BT, side: str, active: ActiveStack, keys: seq2seq.DropoutKeys):
        dim = getattr(self.space.hull(), side).embed_dim
        rate = self.dropout * active.embed_dim / dim
        return seq2seq.stack_input(
            table, ids_BT, dim, dim, rate, keys.embedding, active.embed_dim, self.dtype
        )
