"""Target words by which each source word is translated, estimated from the training text.

IBM Model 1 (Brown et al., 1993) by expectation maximisation; the source's eos is its empty word.
Letters: V source words, N target words of each, F frequent target words, O pairs of words in the
same sentence pair (with repetitions), K distinct pairs of words.
"""

from typing import NamedTuple

import numpy as np

from automoe_jax.architecture.ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from automoe_jax.data.tokens import TokenPairs

MAX_PAIRS = 50_000  # more text hardly changes the lists
ROUNDS = 4
COMMON = 256  # frequent target words that every sentence may use


class Lexicon(NamedTuple):
    """`words_VN`: best first, -1 for fewer than N. `common_F`: for every sentence."""

    words_VN: np.ndarray
    common_F: np.ndarray


def build(
    pairs: TokenPairs, n_source: int, n_target: int, per_word: int, common: int = COMMON
) -> Lexicon:
    """Estimates the `per_word` (N) best translations of each of `n_source` (V) source words.

    The `common` most frequent of `n_target` target words get eos and the unknown word added.
    """
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MAX_PAIRS)).astype(np.int64))
    sources, targets, groups = [], [], []
    for i in chosen:
        # Once each: a word's count in its sentence says little about its translation.
        source, target = np.unique(pairs.source[i]), np.unique(pairs.target[i])
        sources.append(np.tile(source, len(target)).astype(np.int64))
        targets.append(np.repeat(target, len(source)).astype(np.int64))
        groups.append(np.full(len(target), len(source)))
    # The possible sources of a target word are adjacent; sizes and offsets of these groups:
    group = np.concatenate(groups)
    starts = np.concatenate([[0], np.cumsum(group)[:-1]])
    source_O = np.concatenate(sources)
    key_O = source_O * n_target + np.concatenate(targets)
    keys, which_O = np.unique(key_O, return_inverse=True)
    source_K = keys // n_target
    p_K = np.ones(len(keys))
    for _ in range(ROUNDS):
        p_O = p_K[which_O]
        share_O = p_O / np.repeat(np.add.reduceat(p_O, starts), group)
        count_K = np.bincount(which_O, share_O)
        p_K = count_K / np.bincount(source_K, count_K, n_source)[source_K]
    order = np.lexsort((-p_K, source_K))
    rank = np.arange(len(keys)) - np.searchsorted(source_K[order], source_K[order])
    best = order[rank < per_word]
    words_VN = np.full((n_source, per_word), -1, np.int32)
    words_VN[source_K[best], rank[rank < per_word]] = keys[best] % n_target
    frequency = np.bincount(pairs.target.ids, minlength=n_target)
    frequency[[BOS_ID, PAD_ID, EOS_ID, UNK_ID]] = 0
    frequent = np.argsort(-frequency, kind="stable")[: min(common, np.count_nonzero(frequency))]
    return Lexicon(words_VN, np.concatenate([[EOS_ID, UNK_ID], frequent]).astype(np.int32))
