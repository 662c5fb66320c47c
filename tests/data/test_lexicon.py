"""The lexicon of a shortlist."""

import numpy as np

from automoe_jax.architecture.ids import EOS_ID, UNK_ID
from automoe_jax.data import lexicon
from automoe_jax.data.tokens import Side, TokenPairs

SHIFT, WORDS = 20, 60


def text(n=300, seed=0) -> TokenPairs:
    """Each source word i is translated by i + SHIFT, in another order; 50 is in every target."""
    rng = np.random.default_rng(seed)
    sides: list[list[np.ndarray]] = [[], []]
    for _ in range(n):
        source = rng.integers(4, 4 + SHIFT, rng.integers(2, 6))
        sides[0].append(np.array([*source, EOS_ID], np.uint16))
        target = rng.permutation(source + SHIFT)
        sides[1].append(np.array([*target, 50, EOS_ID], np.uint16))
    both = [Side(np.concatenate(s), np.cumsum([0, *map(len, s)])) for s in sides]
    return TokenPairs(*both, {})


def test_the_best_translation_of_each_word_is_found():
    found = lexicon.build(text(), WORDS, WORDS, per_word=3, common=2)
    words = np.arange(4, 4 + SHIFT)
    np.testing.assert_array_equal(found.words_VN[words, 0], words + SHIFT)
    # What is in every sentence is explained by the source's end.
    assert set(found.words_VN[EOS_ID, :2]) == {50, EOS_ID}
    assert (found.words_VN[4 + SHIFT :] == -1).all()
    assert set(found.common_F[:3]) == {EOS_ID, UNK_ID, 50}
    assert len(found.common_F) == 4


def test_fewer_words_than_asked_for():
    one = Side(np.array([5, EOS_ID], np.uint16), np.array([0, 2]))
    found = lexicon.build(TokenPairs(one, one, {}), 8, 8, per_word=4)
    np.testing.assert_array_equal(np.sort(found.words_VN[5]), [-1, -1, EOS_ID, 5])
    assert set(found.common_F) == {EOS_ID, UNK_ID, 5}
