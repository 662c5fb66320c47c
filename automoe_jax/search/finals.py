"""The order of final latency measurements.

A final measurement differs from the candidate's earlier one by a factor that is partly common to
all candidates: the machine has become slower, or the latency behind a ratio limit was timed too
low. A candidate is expected to pass if its upper end times the median factor so far is within the
limit. The median includes a factor of one, for the time before any final measurement, so one noisy
measurement rules out little. It is recomputed after each final measurement, so skipped candidates
may be retried.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class FinalAttempt:
    """One final measurement."""

    index: int  # of the candidate
    factor: float  # upper end of the latency's interval as measured, divided by the one expected
    passed: bool  # whether it is within the limit


def factor_of(factors: Iterable[float]) -> float:
    """How many times as long as expected a candidate is likely to take in its final measurement.

    `factors` are those of the final measurements so far.
    """
    return statistics.median([1.0, *factors])


def next_candidate(
    attempts: Sequence[FinalAttempt],
    count: int,
    upper: Callable[[int], float],
    *,
    keep: int,
    max_attempts: int,
) -> int | None:
    """The best candidate that is expected to pass, or None if none can improve the result.

    Candidates 0 to `count` - 1 are ordered best first; `upper` gives the upper end of a candidate's
    latency over the limit, as known now. `keep` are to be found; with at most `max_attempts` final
    measurements, unless none has passed yet.
    """
    passed = sorted(a.index for a in attempts if a.passed)
    if passed and len(attempts) >= max_attempts:
        return None
    if len(passed) >= keep:
        count = passed[keep - 1]  # the candidates after it are worse
    factor = factor_of(a.factor for a in attempts)
    tried = {a.index for a in attempts}
    return next((i for i in range(count) if i not in tried and upper(i) * factor <= 1), None)
