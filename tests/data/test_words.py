"""Classes of subword tokens, on hand-made cases."""

import numpy as np
import pytest
from bpe_files import ENGLISH, GERMAN, bpe_files

from automoe_jax.architecture.ids import EOS_ID
from automoe_jax.data import words
from automoe_jax.data.tokenizers import fairseq_bpe, sentence_piece
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.data.tokens import Side

WHOLE, FIRST, MIDDLE, LAST = range(4)


def test_bands_follow_the_ranks_of_counts(monkeypatch):
    monkeypatch.setattr(words, "BANDS", {"top": 0, "next": 1, "rest": 3})
    # Token 7 three times, 5 and 6 twice, 4 once, 8 never; eos is no word.
    ids = np.array([7, 7, 7, 5, 5, 6, 6, 4, *[EOS_ID] * 9])
    assert words.bands(Side(ids, np.array([0, len(ids)])), 9)[4:].tolist() == [2, 1, 1, 0, 2]


def test_places():
    never = np.zeros(7, bool)
    starts, ends = never.copy(), never.copy()
    starts[4] = True
    found = words.places(np.array([4, 4, 6, 4, 5, 6, EOS_ID, 4, EOS_ID]), never, starts)
    assert found.tolist() == [WHOLE, FIRST, LAST, FIRST, MIDDLE, LAST, -1, WHOLE, -1]
    ends[[3, 4]] = True
    found = words.places(np.array([4, 5, 3, 6, 5, 6, 3, EOS_ID, 4, EOS_ID]), ends, never)
    assert found.tolist() == [WHOLE, FIRST, LAST, FIRST, MIDDLE, MIDDLE, LAST, -1, WHOLE, -1]


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_borders_are_the_blanks_of_the_text(kind, tmp_path):
    """Pieces between borders, put together, are the words."""
    if kind == "bpe":
        codes, english, german = bpe_files(tmp_path)
        languages = ("en", "de")
        fairseq_bpe.make([english, german], codes, languages, tmp_path / "t", lowercase=False)
        # What was segmented: words apart from their punctuation.
        text = (tmp_path / "bpe.de").read_text(encoding="utf-8").splitlines()
        expected = [line.replace("@@ ", "").split() for line in text]
    else:
        config = TokenizerConfig(vocab_size=70)
        sentence_piece.train([*ENGLISH, *GERMAN] * 3, tmp_path / "t", config)
        expected = [sentence.split() for sentence in GERMAN]
    tokenizer = tokenizers.load(tmp_path / "t")
    borders = tokenizer.word_borders("target")
    assert borders is not None
    n_pieces = 0
    for ids, wanted in zip(tokenizer.encode(GERMAN, "target"), expected, strict=True):
        places = words.places(np.array(ids), *borders)
        assert places[-1] == -1
        found, word = [], []
        for token, place in zip(ids[:-1], places, strict=False):
            assert (place in (WHOLE, FIRST)) == (not word)
            word.append(token)
            if place in (WHOLE, LAST):
                found.append(word)
                word = []
        assert len(found) == len(wanted)
        n_pieces += len(ids) - 1 - len(found)
        if kind == "sentencepiece":
            assert [tokenizer.decode([word])[0] for word in found] == wanted
    assert n_pieces > 0


@pytest.mark.parametrize("eos_first", [False, True])
def test_thirds_of_sentences(eos_first):
    """Of 5 and 2 words, by hand: eos has a place, but no class."""
    first = [EOS_ID, 9, 9, 9, 9, 9] if eos_first else [9, 9, 9, 9, 9, EOS_ID]
    second = [EOS_ID, 9, 9] if eos_first else [9, 9, EOS_ID]
    ids = np.array(first + second)
    assert words.sentences(ids, eos_first=eos_first).tolist() == [0] * 6 + [1] * 3
    expected = [0, 0, 1, 1, 2, 2, 0, 1, 2]
    expected = [-1 if i == EOS_ID else part for i, part in zip(ids, expected, strict=True)]
    assert words.parts(ids, eos_first=eos_first).tolist() == expected
