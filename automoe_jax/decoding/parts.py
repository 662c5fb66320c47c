"""Parts of a translation as programs of their own, to time what each adds.

Each program does what the one before it does, and more: the encoder; the decoder's layers for a
number of words, whose choice does not matter to their time; the output layer with the best next
words; the whole beam search. Letters as in `xla_engine`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.ids import EOS_ID
from automoe_jax.decoding.xla_engine import ModelSpec, Request

# What a translation's time is made of, in the order of the programs.
PARTS = ("encoder", "decoder layers", "output layer", "beam search")


def programs(
    engine: ModuleType, spec: ModelSpec, n_words: int, beam_size: int
) -> tuple[Callable[..., Any], ...]:
    """The programs before the whole one, compiled when called first.

    Each takes (weights, source (B, S), int32 arange (T,) of the words to decode).
    """

    def encoder(weights, source_BS, time_T):
        return engine.start(weights, spec, source_BS)

    def layers(weights, source_BS, time_T):
        return _decoded(engine, spec, n_words, beam_size, weights, source_BS, time_T, 0)

    def output(weights, source_BS, time_T):
        return _decoded(engine, spec, n_words, beam_size, weights, source_BS, time_T, 1)

    return tuple(map(jax.jit, (encoder, layers, output)))


def _decoded(
    engine: ModuleType, spec: ModelSpec, n_words: int, j: int, weights, source_BS, time_T, output
):
    """Sums over steps of what the decoder gives, so that no step can be left out."""
    b, time = source_BS.shape[0], time_T.shape[0]
    memory = engine.start(weights, spec, source_BS)
    own_BJT = jnp.broadcast_to(jnp.arange(b * j, dtype=jnp.int32).reshape(b, j, 1), (b, j, time))
    never, live = jnp.bool_(False), jnp.int32(b)

    def advance(step, state):
        ids_BJ, total, caches = state
        request = Request(
            ids_BJ, step, jnp.arange(b, dtype=jnp.int32), own_BJT, live, never, never, 2 * j,
            n_words,
        )  # fmt: skip
        x_RD, caches = engine.decode(weights, spec, request, caches, memory)
        if output:
            found = engine.candidates(weights, x_RD, request, memory)
            ids_BJ = found.word_BJC[:, :, 0]
            return ids_BJ, total + jnp.sum(found.log_z_BJ), caches
        return ids_BJ, total + jnp.sum(x_RD), caches

    ids_BJ = jnp.full((b, j), EOS_ID, jnp.int32)
    state = ids_BJ, jnp.float32(0), engine.empty_caches(spec, b * j, time)
    ids_BJ, total, _ = lax.fori_loop(0, time, advance, state)
    return ids_BJ, total
