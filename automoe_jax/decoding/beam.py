"""Beam search inside one compiled program.

As fairseq's generator: 2 * J candidates per step, a hypothesis ends when eos is among the best J, a
sentence ends when J hypotheses have ended, and the score is the sum of log probabilities over
(length with eos) ** length penalty. Caches stay in place when beams are reordered: each hypothesis
keeps the row in which each of its earlier words was decoded. Letters: B sentences, J beams,
C = 2 * J candidates, T cache time, S source time.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.decoding.xla_engine import NEVER, Candidates, ModelSpec, Request


class Result(NamedTuple):
    """Hypotheses of each sentence, best first.

    tokens_BJT: ids with eos, then pads. score_BJ: normalised; `NEVER` beyond the last hypothesis.
    length_BJ: tokens, eos included. complete_B: false where the cache was too short to finish;
    such a sentence has to be run again with a longer one.
    """

    tokens_BJT: jax.Array
    score_BJ: jax.Array
    length_BJ: jax.Array
    complete_B: jax.Array


class _Sentences(NamedTuple):
    """Running and ended hypotheses of each sentence."""

    sentence_B: jax.Array  # index in the batch
    history_BJ2T: jax.Array  # words so far, and the rows in which they were decoded
    log_p_BJ: jax.Array  # of running hypotheses
    ended_tokens_BJT: jax.Array
    ended_score_BJ: jax.Array
    ended_length_BJ: jax.Array
    n_ended_B: jax.Array


# Step, sentences and the engine's caches.
_State = tuple[jax.Array, _Sentences, Any]


def search(
    engine: ModuleType,
    spec: ModelSpec,
    n_words: int,
    n_beams: int,
    weights: dict[str, Any],
    source_BS: jax.Array,
    time_T: jax.Array,
    min_length: jax.Array,
    max_length: jax.Array,
    length_penalty: jax.Array,
) -> Result:
    """Translates a batch.

    engine: `xla_engine` for dense weights, `native_engine` for packed ones. n_words: of the output
    layer. n_beams: J. source_BS: token ids with eos, padded. time_T: int32 arange, as long as the
    longest output that fits, eos included. min_length: eos is barred until so many tokens stand
    before it. max_length: most tokens before eos, which is then forced.
    """
    b, j = source_BS.shape[0], n_beams
    memory = engine.start(weights, spec, source_BS)

    def running(state: _State) -> jax.Array:
        step, s, _ = state
        return (step < time_T.shape[0]) & jnp.any(s.n_ended_B < j)

    def advance(state: _State) -> _State:
        step, s, caches = state
        if engine.COMPACTS:  # unfinished sentences to the front
            order_B = jnp.argsort(s.n_ended_B >= j, stable=True)
            s = jax.tree.map(lambda x: x[order_B], s)
        last_BJ = lax.dynamic_index_in_dim(
            s.history_BJ2T[:, :, 0], jnp.maximum(step - 1, 0), axis=2, keepdims=False
        )
        request = Request(
            ids_BJ=jnp.where(step == 0, EOS_ID, last_BJ),
            step=step,
            sentence_B=s.sentence_B,
            ancestor_BJT=s.history_BJ2T[:, :, 1],
            n_live=jnp.sum(s.n_ended_B < j, dtype=jnp.int32),
            eos_barred=step < min_length,
            only_eos=step >= max_length,
            n_candidates=2 * j,  # the best 2 J of all are among the best 2 J of each beam
            n_words=n_words,
        )
        x_RD, caches = engine.decode(weights, spec, request, caches, memory)
        found = engine.candidates(weights, x_RD, request, memory)
        s = _extend(s, found, time_T == step, step, max_length, length_penalty)
        return step + 1, s, caches

    # A sentence of padding only fills up the batch: it ends at once.
    sentences = _start(jnp.any(source_BS != PAD_ID, axis=1), j, time_T)
    caches = engine.empty_caches(spec, b * j, time_T.shape[0])
    _, s, _ = lax.while_loop(running, advance, (jnp.int32(0), sentences, caches))
    if engine.COMPACTS:  # back to their places
        s = jax.tree.map(lambda x: x[jnp.argsort(s.sentence_B)], s)
    score_BJ, order_BJ = lax.top_k(s.ended_score_BJ, j)
    tokens_BJT = jnp.take_along_axis(s.ended_tokens_BJT, order_BJ[..., None], axis=1)
    length_BJ = jnp.take_along_axis(s.ended_length_BJ, order_BJ, axis=1)
    return Result(tokens_BJT, score_BJ, length_BJ, s.n_ended_B >= j)


def _start(real_B: jax.Array, j: int, time_T: jax.Array) -> _Sentences:
    b = real_B.shape[0]
    zeros_BJT = jnp.zeros((b, j, 1), jnp.int32) + 0 * time_T
    # All beams of a sentence are equal at first: only one of them may count.
    first_BJ = jnp.zeros((b, 1)) + jnp.where(jnp.arange(j) == 0, 0.0, NEVER)
    return _Sentences(
        sentence_B=jnp.arange(b, dtype=jnp.int32),
        history_BJ2T=jnp.stack([zeros_BJT + PAD_ID, zeros_BJT], axis=2),
        log_p_BJ=first_BJ,
        ended_tokens_BJT=zeros_BJT + PAD_ID,
        ended_score_BJ=jnp.full((b, j), NEVER, jnp.float32),
        ended_length_BJ=jnp.zeros((b, j), jnp.int32),
        n_ended_B=jnp.where(real_B, 0, j).astype(jnp.int32),
    )


def _extend(s: _Sentences, found: Candidates, at_step_T, step, max_length, length_penalty):
    """Ends or extends hypotheses by the candidates for the word at `step`."""
    b, j, each = found.logit_BJC.shape
    b1 = jnp.arange(b)[:, None]
    log_p_BJC = found.logit_BJC + (s.log_p_BJ - found.log_z_BJ)[..., None]
    n_candidates = 2 * j if j > 1 else each
    log_p_BC, flat_BC = lax.top_k(jnp.maximum(log_p_BJC, NEVER).reshape(b, -1), n_candidates)
    beam_BC = flat_BC // each
    token_BC = jnp.take_along_axis(found.word_BJC.reshape(b, j * each), flat_BC, axis=1)
    is_eos_BC = (token_BC == EOS_ID) & (log_p_BC > NEVER / 2)

    # Hypotheses end with an eos among the best J, in order, while there is room.
    ends_BJ = is_eos_BC[:, :j] & (s.n_ended_B < j)[:, None]
    slot_BJ = s.n_ended_B[:, None] + jnp.cumsum(ends_BJ, axis=1) - 1
    ends_BJ &= slot_BJ < j
    slot_BJ = jnp.where(ends_BJ, slot_BJ, j)  # out of range: dropped
    parent_BJT = s.history_BJ2T[b1, beam_BC[:, :j], 0]
    with_eos_BJT = jnp.where(at_step_T, EOS_ID, parent_BJT)
    score_BJ = log_p_BC[:, :j] / (step + 1.0) ** length_penalty

    def put(old, new):
        return old.at[b1, slot_BJ].set(new, mode="drop")

    # The best J candidates that are not eos go on.
    rank_BC = jnp.where(is_eos_BC, n_candidates, 0) + jnp.arange(n_candidates)
    _, keep_BJ = lax.top_k(-rank_BC, j)
    beam_BJ = jnp.take_along_axis(beam_BC, keep_BJ, axis=1)
    token_BJ = jnp.take_along_axis(token_BC, keep_BJ, axis=1)
    new_BJ2 = jnp.stack([token_BJ, b1 * j + beam_BJ], axis=-1)
    n_ended_B = s.n_ended_B + jnp.sum(ends_BJ, axis=1, dtype=jnp.int32)
    return _Sentences(
        sentence_B=s.sentence_B,
        history_BJ2T=jnp.where(at_step_T, new_BJ2[..., None], s.history_BJ2T[b1, beam_BJ]),
        log_p_BJ=jnp.take_along_axis(log_p_BC, keep_BJ, axis=1),
        ended_tokens_BJT=put(s.ended_tokens_BJT, with_eos_BJT),
        ended_score_BJ=put(s.ended_score_BJ, score_BJ),
        ended_length_BJ=put(s.ended_length_BJ, jnp.full_like(slot_BJ, step + 1)),
        n_ended_B=jnp.where(step >= max_length, j, n_ended_B),
    )
