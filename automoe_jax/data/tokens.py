"""A tokenised split on disk: flat ids, and the offset of each sentence."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from automoe_jax.data.corpus import Split
from automoe_jax.data.parallel_text import LinePair
from automoe_jax.data.tokenizers.base import Tokenizer
from automoe_jax.system import files

CHUNK = 20_000


@dataclasses.dataclass(frozen=True)
class Side:
    """Source or target side: sentence i is `ids[starts[i]:starts[i + 1]]`, eos included."""

    ids: np.ndarray
    starts: np.ndarray

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """The usable pairs of a split, and how many there were of each kind."""

    source: Side
    target: Side
    counts: dict[str, int]  # kept, empty, too_long, not_utf8

    def __len__(self) -> int:
        return len(self.source.starts) - 1


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A tokenizer, and the training and validation pairs it encoded."""

    tokenizer: Tokenizer
    train: TokenPairs
    valid: TokenPairs


def text_or_none(line: bytes) -> str | None:
    """The line as text without surrounding whitespace, or None if it is not UTF-8."""
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None


def sample_sentences(split: Split, count: int) -> Iterator[str]:
    """Up to `count` sentences of both sides, spread evenly over a split."""
    n_pairs = min(len(split), max(count // 2, 1))
    indices = np.linspace(0, len(split) - 1, n_pairs).astype(np.int64)
    for at in range(0, n_pairs, CHUNK):
        for pair in split.read(indices[at : at + CHUNK].tolist()):
            yield from filter(None, map(text_or_none, pair))


def tokenize(
    split: Split,
    tokenizer: Tokenizer,
    max_length: int,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
):
    """Writes the tokenised split to `folder`.

    Leaves out, and counts, pairs with an empty side, more than `max_length` tokens, or no UTF-8.
    """
    counts: dict[str, int] = dict.fromkeys(("kept", "empty", "too_long", "not_utf8"), 0)
    dtype = np.uint16 if max(tokenizer.vocab_sizes) <= 2**16 else np.uint32
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for start in range(0, len(split), CHUNK):
        stop = min(start + CHUNK, len(split))
        texts = _usable(split.read(range(start, stop)), counts)
        sources = tokenizer.encode([source for source, _ in texts], "source")
        targets = tokenizer.encode([target for _, target in texts], "target")
        for pair in zip(sources, targets, strict=True):
            fits = max(map(len, pair)) <= max_length
            counts["kept" if fits else "too_long"] += 1
            if fits:
                for side, ids in zip(sides, pair, strict=True):
                    side.append(np.array(ids, dtype))
        progress(stop, len(split))
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    for name, side in zip(("source", "target"), sides, strict=True):
        flat = np.concatenate(side) if side else np.zeros(0, dtype)
        np.save(temporary / f"{name}_ids.npy", flat)
        np.save(temporary / f"{name}_starts.npy", np.cumsum([0, *map(len, side)], dtype=np.int64))
    files.write_json(temporary / "counts.json", {"version": 1, **counts})
    os.replace(temporary, folder)


def _usable(pairs: list[LinePair], counts: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs whose sides are both text; counts the others."""
    texts = []
    for pair in pairs:
        source, target = map(text_or_none, pair)
        if source is None or target is None:
            counts["not_utf8"] += 1
        elif not source or not target:
            counts["empty"] += 1
        else:
            texts.append((source, target))
    return texts


def load(folder: Path) -> TokenPairs:
    """Opens a folder that `tokenize` wrote; the ids are memory-mapped."""

    def side(name: str) -> Side:
        ids = np.load(folder / f"{name}_ids.npy", mmap_mode="r")
        return Side(ids, np.load(folder / f"{name}_starts.npy"))

    counts = files.read_json(folder / "counts.json", "token counts")
    counts.pop("version", None)
    return TokenPairs(side("source"), side("target"), counts)
