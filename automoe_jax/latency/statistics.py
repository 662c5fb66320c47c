"""Statistics of timed runs: trimmed means, intervals and ratios."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Latency:
    """Summary of one export's timed runs, in ms."""

    mean_ms: float  # of the runs between the 10 % tails
    std_ms: float  # of the same runs
    median_ms: float
    min_ms: float
    runs: int


def trim(times: npt.ArrayLike) -> np.ndarray:
    """The times without the lowest and highest 10 %, sorted."""
    ordered = np.sort(np.asarray(times, float))
    cut = len(ordered) // 10
    return ordered[cut : len(ordered) - cut]


def summarise(times_ms: Sequence[float]) -> Latency:
    """The protocol's mean, with measures of its spread."""
    kept = trim(times_ms)
    median, minimum = float(np.median(times_ms)), float(np.min(times_ms))
    return Latency(float(kept.mean()), float(kept.std()), median, minimum, len(times_ms))


def ratio(
    times_ms: npt.ArrayLike,
    base_ms: npt.ArrayLike,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Ratio of trimmed means, and its interval (low, high).

    The two lists are interleaved runs; rounds are resampled in pairs (bootstrap), so a slow moment
    of the machine cancels.
    """
    a, b = np.asarray(times_ms, float), np.asarray(base_ms, float)
    rounds = _resampled(len(a), seed, resamples)
    ratios = _trimmed_means(a[rounds]) / _trimmed_means(b[rounds])
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(trim(a).mean() / trim(b).mean()), float(low), float(high)


def added(
    programs_ms: Sequence[Sequence[float]], seed: int = 0, resamples: int = 1000
) -> list[tuple[float, float, float]]:
    """What each of several programs takes beyond the one before it, the first beyond nothing.

    Differences of trimmed means in ms, with their 95 % intervals; rounds are resampled as in
    `ratio`.
    """
    times = [np.asarray(own, float) for own in programs_ms]
    rounds = _resampled(len(times[0]), seed, resamples)
    means = [np.zeros(resamples), *(_trimmed_means(own[rounds]) for own in times)]
    whole = [0.0, *(float(trim(own).mean()) for own in times)]
    found = []
    for i in range(1, len(means)):
        low, high = np.quantile(means[i] - means[i - 1], [0.025, 0.975])
        found.append((whole[i] - whole[i - 1], float(low), float(high)))
    return found


def interval(times_ms: npt.ArrayLike, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the protocol's mean, by bootstrap."""
    times = np.asarray(times_ms, float)
    means = _trimmed_means(times[_resampled(len(times), seed, resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resampled(n: int, seed: int, resamples: int) -> np.ndarray:
    """Indices of a block bootstrap (resamples, n): neighbouring runs are not independent."""
    block = round(n ** (1 / 3))  # longer blocks would be too few
    rng = np.random.default_rng(seed)
    starts = rng.integers(n, size=(resamples, -(-n // block)))
    rows = (starts[:, :, None] + np.arange(block)) % n
    return rows.reshape(resamples, -1)[:, :n]


def _trimmed_means(times_RN: np.ndarray) -> np.ndarray:
    """`trim(row).mean()` of each row."""
    cut = times_RN.shape[1] // 10
    return np.sort(times_RN, axis=1)[:, cut : times_RN.shape[1] - cut].mean(axis=1)


def reference_scale(first_ms: float, references_ms: Sequence[float]) -> float:
    """The factor from latencies corrected to the reference's first measurement to usual ones.

    The first measurement takes seconds, in which the machine may have been slower than usual; and
    a reference that is timed alone finds its weights in the caches.

    `references_ms` are the reference's latencies in turns with each of the other subnets.
    """
    return statistics.median(references_ms or [first_ms]) / first_ms
