"""Which pairs make which batch: a pure function of seed, epoch and lengths.

Pairs are put into a handful of length buckets; a bucket's batches all have one shape, so a step
compiles once per bucket. A step is some number of batches of one bucket.
"""

import dataclasses
import functools

import numpy as np

from automoe_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A batch shape: rows, source and target time."""

    rows: int
    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: indices of pairs (batches, rows), -1 where a row is empty."""

    bucket: Bucket
    pairs: np.ndarray


def choose_buckets(
    source_lengths: np.ndarray, target_lengths: np.ndarray, count: int, tokens_per_batch: int
) -> list[Bucket]:
    """Up to `count` shapes that cover all pairs with little padding, smallest first.

    Out of a grid of length quantiles, the shape that saves the most padding is added to the one
    that holds every pair, and again; then shapes are exchanged while that saves more.

    Args:
      source_lengths, target_lengths: tokens of each pair.
      count: most buckets.
      tokens_per_batch: rows times the longer side is at most this.

    Raises:
      UserError: not even one pair of the longest shape fits into a batch.
    """
    longest = int(max(source_lengths.max(), target_lengths.max()))
    if tokens_per_batch < longest:
        raise UserError(
            f"training.tokens_per_batch is {tokens_per_batch}, but the longest pair has {longest} "
            "tokens on a side; raise it or lower data.max_length"
        )
    cells = np.zeros((source_lengths.max() + 1, target_lengths.max() + 1), np.int64)
    np.add.at(cells, (source_lengths, target_lengths), 1)
    s, t = np.nonzero(cells)
    n = cells[s, t]
    quantiles = np.linspace(0, 1, 33)[1:]
    grid = np.array(
        [
            (a, b)
            for a in np.unique(np.quantile(source_lengths, quantiles, method="higher"))
            for b in np.unique(np.quantile(target_lengths, quantiles, method="higher"))
        ]
    )
    fits = (s <= grid[:, :1]) & (t <= grid[:, 1:])  # (shapes of the grid, cells)
    size = grid.sum(axis=1)
    whole = len(grid) - 1  # the shape that holds every pair
    price = np.where(fits, size[:, None], size[whole])  # of each cell under each shape

    def best_addition(chosen: list[int]) -> tuple[int, int]:
        """(padded tokens, index of the shape that is best added)."""
        cost = price[chosen].min(axis=0)
        totals = np.minimum(price, cost) @ n
        return int(totals.min()), int(totals.argmin())

    chosen = [whole]
    total = int(price[whole] @ n)
    while len(chosen) < count:
        better, shape = best_addition(chosen)
        if better == total:
            break
        chosen, total = [*chosen, shape], better
    improved = True
    while improved:  # exchange one shape at a time for a better one
        improved = False
        for old in chosen[1:]:
            rest = [c for c in chosen if c != old]
            better, shape = best_addition(rest)
            if better < total:
                chosen, total, improved = [*rest, shape], better, True
    shapes = [(int(a), int(b)) for a, b in grid[chosen]]
    return [Bucket(tokens_per_batch // max(a, b), a, b) for a, b in sorted(shapes, key=sum)]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The batches of every step of a training run.

    Attributes:
      source_lengths, target_lengths: tokens of each pair.
      buckets: shapes, by rising size; the last holds every pair.
      batches_per_step: batches of a step, over all devices and micro-batches.
      seed: of the shuffling; None keeps the order (evaluation).
    """

    source_lengths: np.ndarray
    target_lengths: np.ndarray
    buckets: list[Bucket]
    batches_per_step: int
    seed: int | None

    @functools.cached_property
    def _bucket_of_pair(self) -> np.ndarray:
        """For each pair the first bucket that holds it."""
        fits = [
            (self.source_lengths <= b.source) & (self.target_lengths <= b.target)
            for b in self.buckets
        ]
        return np.argmax(np.stack(fits), axis=0)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """The same in every epoch: it depends on lengths alone."""
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
        if rest and larger:  # what does not fill a step goes into a larger bucket
            pairs_of[larger[0]] = np.concatenate([pairs_of[larger[0]], pairs[-rest:]])
            pairs = pairs[:-rest]
        elif rest:
            pairs = np.concatenate([pairs, np.full(per_step - rest, -1)])
        steps += [
            Step(bucket, chunk) for chunk in pairs.reshape(-1, plan.batches_per_step, bucket.rows)
        ]
    if rng is not None:
        steps = [steps[i] for i in rng.permutation(len(steps))]
    return steps
