"""`phrases`: an endless English-German corpus of sentences around dates, amounts and names.

It needs no download, so the whole system can be tried at once. `phrases.json` holds sentence frames
and words, each in English and German (nouns with article, nominative). A slot of a frame is {kind},
or {kind:2} where a kind occurs twice; its kind is a list of words or a kind of `phrase_values`.
"""

import re
from collections.abc import Iterator

import numpy as np

from automoe_jax.data import phrase_values
from automoe_jax.data.phrase_values import LISTS, SPLITS, Pair

WORDS: dict[str, list[Pair]] = LISTS["words"]
FRAMES: list[Pair] = LISTS["frames"]
_SLOT = re.compile(r"\{(\w+)(?::\d)?\}")


def pair(index: int, split: str, seed: int = 0) -> Pair:
    """Sentence pair `index` of a split: a pure function of its arguments, without end.

    No sentence occurs in two splits: held-out values are drawn from the split's own, and a frame
    without any is drawn again until the whole sentence belongs to the split.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    frame = FRAMES[rng.integers(len(FRAMES))]
    kinds = [m.group(1) for m in _SLOT.finditer(frame[0])]
    held_out = any(phrase_values.KINDS[kind][1] for kind in kinds if kind not in WORDS)
    while True:
        filled = _fill(frame, rng, split)
        if held_out or phrase_values.belongs(filled[0], split):
            return filled


def _fill(frame: Pair, rng: np.random.Generator, split: str) -> Pair:
    values: dict[str, Pair] = {}
    for slot in _SLOT.finditer(frame[0]):
        kind = slot.group(1)
        if kind in WORDS:
            values[slot.group()] = WORDS[kind][rng.integers(len(WORDS[kind]))]
        else:
            values[slot.group()] = phrase_values.draw(kind, rng, split)
    english, german = (
        _SLOT.sub(lambda slot, side=side: values[slot.group()][side], text)
        for side, text in enumerate(frame)
    )
    return english[0].upper() + english[1:], german[0].upper() + german[1:]


def pairs(split: str, count: int, seed: int = 0) -> Iterator[Pair]:
    """The first `count` pairs of a split."""
    return (pair(i, split, seed) for i in range(count))
