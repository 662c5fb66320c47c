"""Classes of subword tokens: how frequent they are, and where in word and sentence they stand.

Letters: N tokens of a text in order, eos of each sentence included, V vocabulary.
"""

import numpy as np

from automoe_jax.architecture.ids import BOS_ID, EOS_ID, PAD_ID
from automoe_jax.data.tokens import Side

# Names, and the rank from which each begins, of classes by frequency.
BANDS = {"100 most frequent": 0, "to 1,000": 100, "rarer": 1000}
PLACES = ("whole word", "first piece", "middle piece", "last piece")
PARTS = ("beginning", "middle", "end")  # thirds of a sentence
_SPECIAL = (BOS_ID, PAD_ID, EOS_ID)


def bands(side: Side, vocab_size: int) -> np.ndarray:
    """(V,): the class in `BANDS` of each token by its count on a side of a text."""
    count_V = np.bincount(side.ids, minlength=vocab_size)
    count_V[list(_SPECIAL)] = 0  # not words
    rank_V = np.empty(vocab_size, np.int64)
    rank_V[np.argsort(-count_V, kind="stable")] = np.arange(vocab_size)
    return np.searchsorted(list(BANDS.values()), rank_V, side="right") - 1


def places(ids_N: np.ndarray, ends_V: np.ndarray, starts_V: np.ndarray) -> np.ndarray:
    """(N,): the class in `PLACES` of each token; -1 for special ones.

    A word ends after a token of `ends_V` and before one of `starts_V`; special tokens are no words.
    """
    special_V = np.zeros(len(ends_V), bool)
    special_V[list(_SPECIAL)] = True
    border_N = (ends_V | special_V)[ids_N[:-1]] | (starts_V | special_V)[ids_N[1:]]
    begins_N = np.concatenate([[True], border_N])
    finishes_N = np.concatenate([border_N, [True]])
    place_N = np.select([begins_N & finishes_N, begins_N, finishes_N], [0, 1, 3], 2)
    return np.where(special_V[ids_N], -1, place_N)


def sentences(ids_N: np.ndarray, *, eos_first: bool) -> np.ndarray:
    """(N,): the number of each token's sentence, which eos begins or ends."""
    is_eos_N = ids_N == EOS_ID
    return np.cumsum(is_eos_N) - np.where(eos_first, 1, is_eos_N)


def parts(ids_N: np.ndarray, *, eos_first: bool) -> np.ndarray:
    """(N,): the class in `PARTS` of each token; -1 for special ones, which count as a place."""
    sentence_N = sentences(ids_N, eos_first=eos_first)
    first_S, length_S = np.unique(sentence_N, return_index=True, return_counts=True)[1:]
    nth_N = np.arange(len(ids_N)) - first_S[sentence_N]
    part_N = len(PARTS) * nth_N // length_S[sentence_N]
    return np.where(np.isin(ids_N, _SPECIAL), -1, part_N)
