"""Beam search inside one compiled program.

As fairseq's generator does it: 2 * J candidates per step, a hypothesis ends when eos is among the
best J, a sentence ends when J hypotheses have ended, and the score is the sum of log probabilities
over (length with eos) ** length penalty. Letters: B sentences, J beams, C = 2 * J candidates,
T cache time, S source time, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.decoding import model
from automoe_jax.decoding.model import Cache, Spec
from automoe_jax.ids import EOS_ID, PAD_ID

NEVER = -1e30  # finite: sums of it stay comparable


class Result(NamedTuple):
    """Hypotheses of each sentence, best first.

    tokens_BJT: ids with eos, then pads. score_BJ: normalised; `NEVER` where there is none.
    length_BJ: tokens, eos included. complete_B: false where the cache was too short to finish;
    such a sentence has to be run again with more time.
    """

    tokens_BJT: jax.Array
    score_BJ: jax.Array
    length_BJ: jax.Array
    complete_B: jax.Array


class _State(NamedTuple):
    step: jax.Array
    tokens_BJT: jax.Array  # of running hypotheses
    log_p_BJ: jax.Array
    caches: list[Cache]
    ended_tokens_BJT: jax.Array
    ended_score_BJ: jax.Array
    ended_length_BJ: jax.Array
    n_ended_B: jax.Array


def search(
    weights: dict[str, Any],
    spec: Spec,
    n_beams: int,
    source_BS: jax.Array,
    time_T: jax.Array,
    min_length: jax.Array,
    max_length: jax.Array,
    length_penalty: jax.Array,
) -> Result:
    """Translates a batch.

    Args:
      weights: of `weights.prepare`.
      spec: what they are.
      n_beams: J.
      source_BS: token ids with eos, padded.
      time_T: int32 arange; its length is the longest output that fits, eos included.
      min_length: [], eos is barred until so many tokens stand before it.
      max_length: [], most tokens before eos, which is then forced.
      length_penalty: [].
    """
    b, t, j = source_BS.shape[0], time_T.shape[0], n_beams
    encoded = model.encode(weights, spec, source_BS)
    memory = model.memories(weights, spec, encoded, source_BS)
    real_B = jnp.any(source_BS != PAD_ID, axis=1)  # rows that only fill up the batch end at once

    def running(state: _State) -> jax.Array:
        return (state.step < t) & jnp.any(state.n_ended_B < j)

    def advance(state: _State) -> _State:
        step = state.step
        last_BJ = jnp.where(
            step == 0,
            EOS_ID,
            lax.dynamic_index_in_dim(
                state.tokens_BJT, jnp.maximum(step - 1, 0), axis=2, keepdims=False
            ),
        )
        logits_BJV, caches = model.decode_step(weights, spec, last_BJ, step, state.caches, memory)
        log_z_BJ = jax.nn.logsumexp(logits_BJV, axis=-1)
        v = jnp.arange(logits_BJV.shape[-1])
        barred_V = (v == PAD_ID) | jnp.where(v == EOS_ID, step < min_length, step >= max_length)
        scores_BJV = jnp.where(barred_V, NEVER, logits_BJV)
        # The best C of each beam hold the best C of all.
        each = min(2 * j, v.size)
        best_BJC, token_BJC = lax.top_k(scores_BJV, each)
        total_BJC = jnp.maximum(best_BJC - log_z_BJ[..., None] + state.log_p_BJ[..., None], NEVER)
        log_p_BC, flat_BC = lax.top_k(total_BJC.reshape(b, j * each), 2 * j if j > 1 else each)
        beam_BC = flat_BC // each
        token_BC = jnp.take_along_axis(token_BJC.reshape(b, j * each), flat_BC, axis=1)
        possible_BC = log_p_BC > NEVER / 2
        is_eos_BC = (token_BC == EOS_ID) & possible_BC

        # Ends: eos among the best J, in order, while there is room.
        ends_BJ = is_eos_BC[:, :j] & (state.n_ended_B < j)[:, None]
        slot_BJ = state.n_ended_B[:, None] + jnp.cumsum(ends_BJ, axis=1) - 1
        ends_BJ &= slot_BJ < j
        slot_BJ = jnp.where(ends_BJ, slot_BJ, j)  # out of range: dropped
        sentence_B1 = jnp.arange(b)[:, None]
        parent_BJT = jnp.take_along_axis(state.tokens_BJT, beam_BC[:, :j, None], axis=1)
        with_eos_BJT = jnp.where(time_T == step, EOS_ID, parent_BJT)
        score_BJ = log_p_BC[:, :j] / (step + 1.0) ** length_penalty

        def put(old, new):
            return old.at[sentence_B1, slot_BJ].set(new, mode="drop")

        # Goes on: the best J that are not eos.
        n_candidates = log_p_BC.shape[1]
        rank_BC = jnp.where(is_eos_BC, n_candidates, 0) + jnp.arange(n_candidates)
        _, keep_BJ = lax.top_k(-rank_BC, j)
        beam_BJ = jnp.take_along_axis(beam_BC, keep_BJ, axis=1)
        token_BJ = jnp.take_along_axis(token_BC, keep_BJ, axis=1)
        tokens_BJT = jnp.take_along_axis(state.tokens_BJT, beam_BJ[..., None], axis=1)
        row_R = (sentence_B1 * j + beam_BJ).reshape(b * j)
        return _State(
            step=step + 1,
            tokens_BJT=jnp.where(time_T == step, token_BJ[..., None], tokens_BJT),
            log_p_BJ=jnp.take_along_axis(log_p_BC, keep_BJ, axis=1),
            caches=[Cache(c.key[row_R], c.value[row_R]) for c in caches],
            ended_tokens_BJT=put(state.ended_tokens_BJT, with_eos_BJT),
            ended_score_BJ=put(state.ended_score_BJ, score_BJ),
            ended_length_BJ=put(state.ended_length_BJ, jnp.full_like(slot_BJ, step + 1)),
            n_ended_B=jnp.where(
                step >= max_length, j, state.n_ended_B + jnp.sum(ends_BJ, axis=1, dtype=jnp.int32)
            ),
        )

    pads_BJT = jnp.full((b, j, 1), PAD_ID, jnp.int32) + 0 * time_T
    # At first all beams of a sentence are the same: only one of them may count.
    first_BJ = jnp.zeros((b, 1)) + jnp.where(jnp.arange(j) == 0, 0.0, NEVER)
    state = _State(
        step=jnp.int32(0),
        tokens_BJT=pads_BJT,
        log_p_BJ=first_BJ,
        caches=model.empty_caches(spec, b * j, t),
        ended_tokens_BJT=pads_BJT,
        ended_score_BJ=jnp.full((b, j), NEVER, jnp.float32),
        ended_length_BJ=jnp.zeros((b, j), jnp.int32),
        n_ended_B=jnp.where(real_B, 0, j).astype(jnp.int32),
    )
    state = lax.while_loop(running, advance, state)
    score_BJ, order_BJ = lax.top_k(state.ended_score_BJ, j)
    return Result(
        jnp.take_along_axis(state.ended_tokens_BJT, order_BJ[..., None], axis=1),
        score_BJ,
        jnp.take_along_axis(state.ended_length_BJ, order_BJ, axis=1),
        state.n_ended_B >= j,
    )
