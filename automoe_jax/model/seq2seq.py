"""What `Transformer` and `Supernet` share besides blocks: word tables, positions, keys, output.

Letters: B batch, T or S time, D embedding, V vocabulary, L layers, N tokens, E experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from automoe_jax.architecture.active import Array
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.model.experts import RouterLosses
from automoe_jax.model.formulas import frequencies
from automoe_jax.model.layers import Width, cut, dropout, random_bits, width


class Output(NamedTuple):
    """Result of a teacher-forced pass; unused fields cost nothing under jit."""

    logits_BTV: jax.Array
    hidden_BTD: jax.Array  # the decoder's output, zero beyond the active width
    router_losses: RouterLosses  # of each layer, encoder first; 0 beyond the active depth
    n_layers: Array | int  # active ones
    encoder_layers: list[jax.Array]  # output of each layer; zeros beyond the active depth
    decoder_layers: list[jax.Array]
    router_logits: list[jax.Array]  # (N, E) per layer, encoder first

    @property
    def load_balance(self) -> jax.Array:
        """[], mean over the active layers."""
        return jnp.sum(self.router_losses.load_balance) / self.n_layers


class DropoutKeys(NamedTuple):
    """Keys of a stack; None without dropout."""

    layers_L: jax.Array | None
    embedding: jax.Array | None


def dropout_keys(arch: Subnet, key: jax.Array | None) -> tuple[DropoutKeys, DropoutKeys]:
    """The keys of encoder and decoder."""
    if key is None:
        return DropoutKeys(None, None), DropoutKeys(None, None)
    n, n_decoder = len(arch.encoder.layers), len(arch.decoder.layers)
    keys = jax.random.split(key, n + 1 + n_decoder + 1)
    return DropoutKeys(keys[:n], keys[n]), DropoutKeys(keys[n + 1 : -1], keys[-1])


def causal_mask(target_in_BT: jax.Array) -> jax.Array:
    """(1, T, T): true where decoder self-attention may look."""
    t = target_in_BT.shape[1]
    return jnp.tril(jnp.ones((1, t, t), bool))


def longest_span(arch: Subnet) -> int:
    """The most encoder layers that a decoder layer attends to."""
    return max(layer.cross_span for layer in arch.decoder.layers)


class Embedding(nn.Module):
    """A table (V, D) of word vectors for inputs or for logits, initialised from N(0, 1 / D)."""

    vocab_size: int  # pad included
    dim: int
    zero_pad: bool = True  # initialise the pad row with zeros, as for inputs

    def setup(self):
        def init(key, shape):
            table = jax.random.normal(key, shape) * shape[1] ** -0.5
            return table.at[PAD_ID].set(0) if self.zero_pad else table

        self.table_VD = self.param("table", init, (self.vocab_size, self.dim))

    def __call__(self, ids_BT: jax.Array, dim: int, active_width: Width | None) -> jax.Array:
        """Rows of the table at width `dim`, times the square root of the active width."""
        n = float(dim) if active_width is None else active_width.dim.astype(jnp.float32)
        return cut(self.table_VD[ids_BT, :dim], active_width) * jnp.sqrt(n)

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Scores of all words: no bias, no scale."""
        return h_BTD @ self.table_VD[:, : h_BTD.shape[-1]].T.astype(h_BTD.dtype)


class WordTables(NamedTuple):
    """The tables of source, target and output; one object where they are shared."""

    source: Embedding
    target: Embedding
    output: Embedding


def word_tables(arch: Subnet, vocab_sizes: tuple[int, int], share_embeddings: str) -> WordTables:
    """Submodules of the module that calls this from its compact method."""
    (v_source, v_target), d_e, d_d = vocab_sizes, arch.encoder.embed_dim, arch.decoder.embed_dim
    if share_embeddings == "all":
        table = Embedding(v_source, max(d_e, d_d), name="embedding")
        return WordTables(table, table, table)
    source = Embedding(v_source, d_e, name="source_embedding")
    target = Embedding(v_target, d_d, name="target_embedding")
    if share_embeddings == "decoder":
        return WordTables(source, target, target)
    return WordTables(source, target, Embedding(v_target, d_d, zero_pad=False, name="output"))


def output_table(params: Any) -> jax.Array:
    """The word vectors of the output layer, (V, D), whichever table they are in."""
    names = ("output", "target_embedding", "embedding")
    return next(params[name]["table"] for name in names if name in params)


def stack_input(
    table: Embedding,
    ids_BT: jax.Array,
    dim: int,
    base_dim: int,
    rate: Array | float,
    key: jax.Array | None,
    active_dim: Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Word vectors plus positions at width `dim`, of a dtype; dropout only with a key.

    Positions depend on the supernet's width `base_dim`. In a supernet, the result is zero beyond
    `active_dim`, [].
    """
    active_width = None if active_dim is None else width(active_dim, dim)
    # At the base width, then cut: see position_table.
    rows = position_table(ids_BT.shape[1], base_dim)[:, :dim]
    x_BTD = table(ids_BT, dim, active_width)
    x_BTD = cut(x_BTD + jnp.asarray(rows)[positions(ids_BT)], active_width)
    return dropout(x_BTD, rate, random_bits(key, [x_BTD.shape])[0]).astype(dtype)


def position_table(n_positions: int, dim: int) -> np.ndarray:
    """Sinusoidal rows (n_positions + 2, dim): row 1 is zero, for pads; row 2 is the first token's.

    Computed at the supernet's width. A narrower subnet takes the front columns, so it keeps the
    proportion of sines and cosines that it had in the supernet.
    """
    angle = np.arange(n_positions + 2, dtype=np.float32)[:, None] * frequencies(dim)
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    table = np.pad(table, ((0, 0), (0, dim % 2)))
    table[PAD_ID] = 0
    return table.astype(np.float32)


def positions(ids_BT: jax.Array) -> jax.Array:
    """Row of `position_table` for each token: real tokens count from 2, pads have 1."""
    real_BT = (ids_BT != PAD_ID).astype(jnp.int32)
    return jnp.cumsum(real_BT, axis=1) * real_BT + PAD_ID
