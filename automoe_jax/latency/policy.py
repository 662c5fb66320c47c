"""Every rule and constant of measuring latencies."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class MeasurementPolicy:
    """How often, how long and under what conditions latencies are measured."""

    budget: float = math.inf  # measurements of a search, final ones included
    keep: int = 1  # subnets that a search returns
    spare: int = 5  # further final measurements, for candidates that fail theirs
    runs: int = 100  # timed runs of a candidate at most
    chunk_runs: int = 10  # runs between two checks whether a candidate is clear of the limit
    # Of that check; above that of the reported interval: a candidate is checked several times.
    stop_confidence: float = 0.995
    group: int = 4  # exports that are timed in turns with each other
    reference_retries: int = 3  # how often a reference above the limit is timed again
    reference_pause_s: float = 2.0  # before each of these
    glance_runs: int = 30  # runs that tell whether the machine is slow at the moment
    # Slowdown up to which a final measurement under a limit in ms is made, and up to which one that
    # fails is taken as it is.
    calm: float = 1.1
    looks: int = 24  # checks for that in a search, `look_pause_s` apart; then it measures anyway
    look_pause_s: float = 5.0
    tries: int = 3  # final measurements of one subnet at most, if the machine slows down during one
    min_measured: int = 4  # measurements from which on their median corrects predictions

    @property
    def reserve(self) -> int:
        """Measurements kept for the result: two for each returned subnet, and the spare ones."""
        return 2 * self.keep + self.spare

    @property
    def final_attempts(self) -> int:
        """Final measurements of a search at most, unless none has passed yet."""
        return self.keep + self.spare
