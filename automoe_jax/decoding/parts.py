"""Parts of a translation as programs of their own, to time what each adds.

Each program does what the one before it does, and more: the encoder; the decoder's layers, for a
number of words; the output layer with the best next words; the whole beam search. The words that
the second and the third decode are drawn, other ones for each hypothesis, as a search's differ: so
a mixture's layers read several experts. Letters as in `xla_engine`.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from automoe_jax.architecture.ids import UNK_ID
from automoe_jax.decoding.xla_engine import Candidates, ModelSpec, Request

# What a translation's time is made of, in the order of the programs.
PARTS = ("encoder", "decoder layers", "output layer", "beam search")


def words(n_words: int, sentences: int, beams: int, steps: int) -> np.ndarray:
    """The words that are decoded, (T, B, J)."""
    first = min(UNK_ID + 1, n_words - 1)
    rng = np.random.default_rng(0)
    return rng.integers(first, n_words, (steps, sentences, beams)).astype(np.int32)


def programs(
    engine: ModuleType, spec: ModelSpec, n_words: int, beam_size: int
) -> tuple[Callable[..., Any], ...]:
    """The programs before the whole one, compiled when called first.

    Each takes (weights, source (B, S), `words`). They return all that they make, so that nothing
    is left out: what the encoder gives; also the decoder's last output (R, D) and a sum of all of
    them; also the best next words at the last step.
    """

    def encoder(weights, source_BS, words_TBJ):
        return engine.start(weights, spec, source_BS)

    def decoder(weights, source_BS, words_TBJ, *, output: bool):
        (t, b, j), memory = words_TBJ.shape, engine.start(weights, spec, source_BS)
        rows = b * j
        own_BJT = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32).reshape(b, j, 1), (b, j, t))
        never, live = jnp.bool_(False), jnp.int32(b)
        sentence_B = jnp.arange(b, dtype=jnp.int32)

        def advance(step, state):
            x_RD, found, total, caches = state
            request = Request(
                words_TBJ[step], step, sentence_B, own_BJT, live, never, never, 2 * j, n_words
            )
            x_RD, caches = engine.decode(weights, spec, request, caches, memory)
            total += jnp.sum(x_RD)
            if output:
                found = engine.candidates(weights, x_RD, request, memory)
                total += jnp.sum(found.log_z_BJ)
            return x_RD, found, total, caches

        c = min(2 * j, n_words)
        found = Candidates(jnp.zeros((b, j, c)), jnp.zeros((b, j, c), jnp.int32), jnp.zeros((b, j)))
        x_RD = jnp.zeros((rows, spec.subnet.decoder.embed_dim))
        caches = engine.empty_caches(spec, rows, t)
        *given, _ = lax.fori_loop(0, t, advance, (x_RD, found, jnp.float32(0), caches))
        return given, memory

    layers = functools.partial(decoder, output=False)
    return tuple(map(jax.jit, (encoder, layers, functools.partial(decoder, output=True))))
