"""Groups sentences into batches of few shapes, because each shape is compiled.

Sentences are sorted by length into buckets; the batches of a bucket have the same number of rows.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from automoe_jax.architecture.ids import PAD_ID

# Longest source in tokens; longer ones are cut.
MAX_SOURCE = 1024
SOURCE_BUCKETS = (16, 32, 64, 128, 256, 512, MAX_SOURCE)
# Among many sentences, a bucket of at most this many gets no shape of its own.
FEW = 8
# In the last round, at most this many share a bucket: padding costs less than another compilation.
FEW_LAST = 256
# Source positions of a batch; more gains nothing on a few cores.
BATCH_TOKENS = 512
# Bytes of a batch's self-attention caches; 16 MB cost up to a fifth of the speed, 128 gain nothing.
# The last round takes half of it, because it compiles on top of the memory that translating keeps.
CACHE_BYTES = 28 << 20


class Batch(NamedTuple):
    """`rows`: indices of its sentences. `source_BS`: padded ids. `time`: steps of its caches."""

    rows: list[int]
    source_BS: np.ndarray
    time: int


def batches(
    sources: Sequence[Sequence[int]],
    chosen: Sequence[int],
    max_time: int,
    step_bytes: int,
    batch_tokens: int = BATCH_TOKENS,
    *,
    last: bool,
) -> Iterator[Batch]:
    """Batches of the sentences with the indices `chosen`.

    max_time: steps of the longest translation. step_bytes: bytes of the caches, for each sentence
    and step. last: every batch has caches for `max_time` steps, and few sentences share a bucket.
    """
    by_bucket: dict[int, list[int]] = {}
    for i in sorted(chosen, key=lambda i: len(sources[i])):
        by_bucket.setdefault(bucket(len(sources[i]), SOURCE_BUCKETS), []).append(i)
    if last and 0 < len(chosen) <= FEW_LAST:
        by_bucket = {max(by_bucket): [i for own in by_bucket.values() for i in own]}
    for length, own in by_bucket.items():
        time = max_time if last else min(3 * length // 2, max_time)
        # Batches of a bucket have one shape. Rows of padding fill the last one; they end at once.
        cache_bytes = CACHE_BYTES // 2 if last else CACHE_BYTES
        room = min(batch_tokens // length, cache_bytes // (step_bytes * time))
        max_rows = room // 8 * 8 if room > 8 else 1 << (max(room, 1).bit_length() - 1)
        n_rows = min(1 << (len(own) - 1).bit_length(), max_rows)
        for at in range(0, len(own), n_rows):
            rows = own[at : at + n_rows]
            yield Batch(rows, pad([sources[i] for i in rows], n_rows, length), time)


def stragglers(sources: Sequence[Sequence[int]]) -> list[int]:
    """Sentences of buckets that are too small for a shape of their own; they run last."""
    own = [bucket(len(source), SOURCE_BUCKETS) for source in sources]
    few = {b for b, n in collections.Counter(own).items() if n <= FEW < len(sources) / 16}
    return [i for i, b in enumerate(own) if b in few]


def pad(sources: Sequence[Sequence[int]], rows: int, time: int) -> np.ndarray:
    """Token ids (rows, time), int32, padded on the right."""
    out = np.full((rows, time), PAD_ID, np.int32)
    for row, ids in zip(out, sources, strict=False):
        row[: len(ids)] = ids
    return out


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds a length, or the largest."""
    return next((b for b in buckets if b >= length), buckets[-1])
