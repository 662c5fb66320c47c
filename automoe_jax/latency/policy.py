"""Every rule and constant of measuring latencies."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class MeasurementPolicy:
    """How often, how long and under what conditions latencies are measured.

    Attributes:
      budget: measurements of a search, final ones included.
      keep: subnets that a search returns.
      spare: further final measurements, for candidates that fail theirs.
      runs: timed runs of a candidate at most.
      chunk_runs: runs between two checks whether a candidate is clear of the limit.
      stop_confidence: confidence of that check; higher than that of the reported interval, since a
        candidate is checked several times.
      group: exports that are timed in turns with each other.
      reference_retries: how often a reference above the limit is timed again.
      reference_pause_s: seconds before each of these.
      glance_runs: runs that tell whether the machine is slow at the moment.
      calm: slowdown of the machine up to which a final measurement under a limit in ms is made.
      looks: checks for that in a search, `look_pause_s` seconds apart; then it measures anyway.
      tries: final measurements of one subnet at most, if the machine slows down during one.
      min_measured: measurements from which on their median corrects predictions.
    """

    budget: float = math.inf
    keep: int = 1
    spare: int = 5
    runs: int = 100
    chunk_runs: int = 10
    stop_confidence: float = 0.995
    group: int = 4
    reference_retries: int = 3
    reference_pause_s: float = 2.0
    glance_runs: int = 30
    calm: float = 1.1
    looks: int = 24
    look_pause_s: float = 5.0
    tries: int = 3
    min_measured: int = 4

    @property
    def reserve(self) -> int:
        """Measurements kept for the result: two for each returned subnet, and the spare ones."""
        return 2 * self.keep + self.spare

    @property
    def final_attempts(self) -> int:
        """Final measurements of a search at most, unless none has passed yet."""
        return self.keep + self.spare
