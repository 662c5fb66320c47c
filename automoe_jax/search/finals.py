"""Which candidates are worth a final measurement."""

import statistics
from collections.abc import Callable


class Finals:
    """Chooses among candidates, best first, on a machine whose speed changes.

    A final measurement ends higher or lower than the candidate's own one did, by a factor that is
    partly common to all: the machine has become slower, the latency that a ratio is of was timed
    too low. A candidate is likely to pass if the upper end of its own interval times the median
    factor so far is within the limit. The median counts a factor of one, for what was seen before
    any final measurement, so that one noisy measurement rules out little; it changes with every
    measurement, so that what was passed over is returned to.
    """

    def __init__(self, keep: int, most: int):
        """Nothing is measured yet.

        Args:
          keep: candidates to find.
          most: final measurements, unless nothing has passed yet.
        """
        self._keep, self._most = keep, most
        self._factors: list[float] = []
        self._tried: set[int] = set()
        self._passed: list[int] = []

    @property
    def factor(self) -> float:
        """What a final measurement is expected to find, over the candidate's own one."""
        return statistics.median([1.0, *self._factors])

    def next(self, count: int, upper: Callable[[int], float]) -> int | None:
        """The best candidate that is likely to pass; none where there is nothing left to gain.

        Args:
          count: candidates.
          upper: upper end of a candidate's own interval over the limit.
        """
        if self._passed and len(self._tried) >= self._most:
            return None
        if len(self._passed) >= self._keep:
            count = sorted(self._passed)[self._keep - 1]  # the others are worse than what is found
        for i in range(count):
            if i not in self._tried and upper(i) * self.factor <= 1:
                return i
        return None

    def made(self, index: int, upper: float, final: float):
        """Takes note of a final measurement.

        Args:
          index: of the candidate.
          upper: upper end of its own interval over the limit.
          final: the same of the final measurement; it passes if that is at most one.
        """
        self._tried.add(index)
        self._factors.append(final / upper)
        if final <= 1:
            self._passed.append(index)
