"""Assigns sentence pairs to batches: a pure function of seed, epoch and lengths.

Pairs are grouped into a few length buckets. All batches of a bucket have one shape, so a step
compiles once per bucket. The batches of one step are all of one bucket.
"""

import collections
import dataclasses
import functools
import itertools

import numpy as np

from automoe_jax.system.errors import UserError

# Most steps between the first ones of two batch shapes: meanwhile the next shape is compiled.
JOIN_EVERY = 200


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A batch shape: rows, source time and target time."""

    rows: int
    source: int
    target: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.source}/{self.target}"


@dataclasses.dataclass(frozen=True)
class Step:
    """One step. `pairs` (batches, rows) are indices of pairs, -1 for an empty row."""

    bucket: Bucket
    pairs: np.ndarray


def choose_buckets(
    source_lengths: np.ndarray, target_lengths: np.ndarray, count: int, tokens_per_batch: int
) -> list[Bucket]:
    """Up to `count` shapes that hold all pairs with little padding, smallest first.

    Greedy: starts with the shape that holds every pair, and adds the shape of a grid of length
    quantiles that saves the most padding, up to `count` shapes. Then replaces one shape at a time
    while that saves more. `tokens_per_batch` bounds rows times the longer side, so raises
    `UserError` if the longest pair exceeds it.
    """
    longest = int(max(source_lengths.max(), target_lengths.max()))
    if tokens_per_batch < longest:
        raise UserError(
            f"training.tokens_per_batch is {tokens_per_batch}, but the longest pair has {longest} "
            "tokens on a side; raise it or lower data.max_length"
        )
    grid, padded_GC, n_pairs_C = _padded_lengths(source_lengths, target_lengths)

    def best_addition(chosen: list[int]) -> tuple[int, int]:
        """(padded tokens in all, index of the shape), with the best shape added to `chosen`."""
        totals = np.minimum(padded_GC, padded_GC[chosen].min(axis=0)) @ n_pairs_C
        return int(totals.min()), int(totals.argmin())

    chosen = [len(grid) - 1]
    total = int(padded_GC[-1] @ n_pairs_C)
    while len(chosen) < count:
        better, shape = best_addition(chosen)
        if better == total:
            break
        chosen, total = [*chosen, shape], better
    improved = True
    while improved:
        improved = False
        for old in chosen[1:]:
            rest = [c for c in chosen if c != old]
            better, shape = best_addition(rest)
            if better < total:
                chosen, total, improved = [*rest, shape], better, True
    shapes = [(int(a), int(b)) for a, b in grid[chosen]]
    return [Bucket(tokens_per_batch // max(a, b), a, b) for a, b in sorted(shapes, key=sum)]


def _padded_lengths(source_lengths: np.ndarray, target_lengths: np.ndarray):
    """Padded tokens of all C combinations of lengths that occur under all G shapes of a grid.

    Returns the grid (G, 2) of quantiles of the lengths, whose last shape holds every pair; source
    plus target tokens after padding (G, C), for the last shape where a shape is too small; and the
    number of pairs (C).
    """
    lengths = source_lengths, target_lengths
    quantiles = (np.quantile(x, np.linspace(0, 1, 33)[1:], method="higher") for x in lengths)
    grid = np.array(list(itertools.product(*map(np.unique, quantiles))))
    n_pairs = np.zeros([x.max() + 1 for x in lengths], np.int64)
    np.add.at(n_pairs, lengths, 1)
    source_C, target_C = np.nonzero(n_pairs)
    fits_GC = (source_C <= grid[:, :1]) & (target_C <= grid[:, 1:])
    tokens_G = grid.sum(axis=1)
    padded_GC = np.where(fits_GC, tokens_G[:, None], tokens_G[-1])
    return grid, padded_GC, n_pairs[source_C, target_C]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The batches of every step of a training run, `batches_per_step` over all devices.

    The last of the buckets holds every pair. Without a seed, pairs keep their order (evaluation).
    """

    source_lengths: np.ndarray
    target_lengths: np.ndarray
    buckets: list[Bucket]
    batches_per_step: int
    seed: int | None

    @functools.cached_property
    def _bucket_of_pair(self) -> np.ndarray:
        """Index of the first bucket that holds each pair."""
        source, target = self.source_lengths, self.target_lengths
        fits = [(source <= b.source) & (target <= b.target) for b in self.buckets]
        return np.argmax(np.stack(fits), axis=0)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Steps of any epoch: the number depends on the lengths alone."""
        return len(self.epoch(0))

    @property
    def padding(self) -> float:
        """Share of an epoch's token positions, source and target, that are padding."""
        real = int(self.source_lengths.sum() + self.target_lengths.sum())
        total = sum(s.pairs.size * (s.bucket.source + s.bucket.target) for s in self.epoch(0))
        return 1 - real / total

    def step(self, step: int) -> Step:
        """The batches of step `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[index]

    def epoch(self, epoch: int) -> list[Step]:
        """The steps of an epoch."""
        return _epoch(self, epoch)

    def shapes(self, start: int, stop: int) -> list[Bucket]:
        """The shapes of the steps from `start` up to `stop`, in the order of their first step."""
        found: dict[Bucket, None] = {}
        for step in range(start, stop):
            if len(found) == len(self.buckets):
                break
            found[self.step(step).bucket] = None
        return list(found)


@functools.lru_cache(maxsize=4)
def _epoch(plan: Plan, epoch: int) -> list[Step]:
    rng = None if plan.seed is None else np.random.default_rng([plan.seed, epoch])
    n = len(plan.source_lengths)
    order = np.arange(n) if rng is None else rng.permutation(n)
    bucket_of = plan._bucket_of_pair[order]
    pairs_of = [order[bucket_of == k] for k in range(len(plan.buckets))]
    steps = []
    for k, bucket in enumerate(plan.buckets):
        pairs = pairs_of[k]
        per_step = bucket.rows * plan.batches_per_step
        rest = len(pairs) % per_step
        larger = [
            j
            for j, b in enumerate(plan.buckets[k + 1 :], k + 1)
            if b.source >= bucket.source and b.target >= bucket.target
        ]
        if rest and larger:  # pairs that do not fill a step go into a larger bucket
            pairs_of[larger[0]] = np.concatenate([pairs_of[larger[0]], pairs[-rest:]])
            pairs = pairs[:-rest]
        elif rest:
            pairs = np.concatenate([pairs, np.full(per_step - rest, -1)])
        batches = pairs.reshape(-1, plan.batches_per_step, bucket.rows)
        steps += [Step(bucket, chunk) for chunk in batches]
    if rng is None:
        return steps
    if epoch == 0:
        return _one_by_one(steps, rng)
    return [steps[i] for i in rng.permutation(len(steps))]


def _one_by_one(steps: list[Step], rng: np.random.Generator) -> list[Step]:
    """The steps in random order, but one more shape every few, the most frequent first.

    All are there after half of the epoch at most.
    """
    of_shape = collections.defaultdict(list)
    for step in steps:
        of_shape[step.bucket].append(step)
    joining = sorted(of_shape.values(), key=len)
    every = min(JOIN_EVERY, len(steps) // (2 * len(of_shape)))
    ready, found = joining.pop(), []
    while joining:
        for _ in range(min(every, len(ready))):
            found.append(ready.pop(rng.integers(len(ready))))
        ready += joining.pop()
    return found + [ready[i] for i in rng.permutation(len(ready))]
