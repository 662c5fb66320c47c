"""Latency of subnets that still live in a supernet: exported, timed, corrected for drift."""

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.process import Timer
from automoe_jax.latency.statistics import Latency, interval, ratio, summarise

# Writes an export of a subnet for one beam size.
ExportForTiming = Callable[[Subnet, Path, int], None]
# Runs after which it is looked whether more are needed, from the second time on; exports timed in
# turns.
CHUNK, GROUP = 10, 4
# Runs that tell whether the machine is slow at the moment.
GLANCE = 30
# It is looked several times, so that each look has to be surer than the interval that is told.
SURE = 0.995
# Times that a reference above the limit is timed again, and seconds before each.
AGAIN, PAUSE = 3, 2.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """One subnet's latency in ms: the protocol's mean, corrected for drift, its 95 % interval."""

    ms: float
    low: float
    high: float
    runs: int
    reference: float  # what the reference took in the same turns


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A final measurement: the subnet beside the smallest and the largest one, in turns."""

    latency: Latency
    largest: Latency
    low_ms: float  # 95 % interval of the latency
    high_ms: float
    ratio: float  # of the largest's latency
    ratio_low: float  # 95 % interval
    ratio_high: float
    slowdown: float  # the smallest's latency over what it takes at other times


class SubnetTimer:
    """Measures subnets on a machine whose speed drifts.

    Each is timed in turns with a reference, the smallest subnet, and its latency is what it would
    have been had the reference run as fast as when it was first measured.
    """

    def __init__(
        self,
        config: LatencyConfig,
        runs: int,
        write: ExportForTiming,
        reference: Subnet,
        reference_ms: float | None,
        folder: Path,
    ):
        """Starts the timing process.

        Args:
          config: the protocol.
          runs: timed runs per candidate at most.
          write: exports a subnet.
          reference: the smallest subnet.
          reference_ms: its latency where that has been measured before (a resumed search, a
            latency model).
          folder: for exports that are only timed; removed by `close`.
        """
        self._config = dataclasses.replace(config, runs=runs)
        self._final = config
        self._write, self._folder = write, folder
        self._timer = Timer(config.threads, config.platform)
        self._reference_ms = reference_ms
        shutil.rmtree(folder, ignore_errors=True)
        self._reference = self._export(reference, "reference")
        self._first = reference
        self._largest: Path | None = None

    @property
    def threads(self) -> int:
        """CPU cores used."""
        return self._timer.threads

    @property
    def how(self) -> str:
        """How `measure` gets its values."""
        c = self._config
        return (
            f"measured ({c.name}): beam {c.beam_size}, {c.source_length} in, "
            f"{c.target_length} out, {self._timer.threads} thread(s), {c.platform}; corrected by "
            "the smallest subnet timed in turns"
        )

    @property
    def reference_ms(self) -> float:
        """The reference's latency, by which drift is corrected."""
        if self._reference_ms is None:
            self._reference_ms = self._alone()
        return self._reference_ms

    def _alone(self) -> float:
        """The reference's latency, timed with nothing beside it."""
        return self._time_reference(max(self._config.runs, self._final.runs))

    def _time_reference(self, runs: int, *beside: Path) -> float:
        config = dataclasses.replace(self._config, runs=runs)
        return summarise(self._timer.time([self._reference, *beside], config)[0]).mean_ms

    def slowdown(self, largest: Subnet) -> float:
        """What the reference takes at the moment, beside the largest subnet, over what it took when
        first measured.
        """
        base = self.reference_ms
        return self._time_reference(GLANCE, self._export_largest(largest)) / base

    def measure(self, subnet: Subnet, limit: float = math.inf) -> Measured:
        """Latency of one subnet.

        Args:
          subnet: which.
          limit: ms; the runs end as soon as the latency is surely below or above it. The reference
            is timed again after a pause where it is above, as nothing else would be below.
        """
        base = self.reference_ms
        if subnet == self._first:
            for _ in range(AGAIN):
                if base <= limit:
                    break
                time.sleep(PAUSE)
                base = self._reference_ms = min(base, self._alone())
            return Measured(base, base, base, 0, base)
        candidate = self._export(subnet, "candidate")
        own: list[float] = []
        reference: list[float] = []
        while True:
            left = self._config.runs - len(own)
            stops = limit < math.inf and left > CHUNK
            warmup = 0 if own else self._config.warmup
            config = dataclasses.replace(self._config, runs=CHUNK if stops else left, warmup=warmup)
            # The reference first: the process keeps compiled programs in what it loads first.
            times = self._timer.time([self._reference, candidate], config)
            reference += times[0]
            own += times[1]
            if len(own) < self._config.runs:
                _, low, high = ratio(own, reference, confidence=SURE)
                clear = base * high < limit or base * low > limit
                if len(own) < 2 * CHUNK or not clear:
                    continue
            shutil.rmtree(candidate)
            return _measured(own, reference, base)

    def measure_all(self, subnets: Sequence[Subnet]) -> list[Measured]:
        """Latency of up to `GROUP` subnets, timed in turns with each other."""
        base = self.reference_ms
        paths = [self._export(s, f"candidate_{i}") for i, s in enumerate(subnets)]
        reference, *own = self._timer.time([self._reference, *paths], self._config)
        for path in paths:
            shutil.rmtree(path)
        return [_measured(times, reference, base) for times in own]

    def verify(self, subnet: Subnet, largest: Subnet) -> Verdict:
        """Times a subnet, the smallest and the largest one in turns, with the protocol's number of
        runs. Nothing is corrected for drift; `slowdown` is from when the reference was first
        measured.
        """
        base = self.reference_ms
        candidate = self._export(subnet, "candidate")
        exports = [self._reference, candidate, self._export_largest(largest)]
        reference, own, other = self._timer.time(exports, self._final)
        shutil.rmtree(candidate)
        slowdown = summarise(reference).mean_ms / base
        return Verdict(
            summarise(own), summarise(other), *interval(own), *ratio(own, other), slowdown
        )

    def _export_largest(self, largest: Subnet) -> Path:
        """Exports it once."""
        if self._largest is None:
            self._largest = self._export(largest, "largest")
        return self._largest

    def _export(self, subnet: Subnet, name: str) -> Path:
        path = self._folder / name
        self._write(subnet, path, self._config.beam_size)
        return path

    def close(self):
        """Ends the timing process and removes its files."""
        self._timer.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def speed(first_ms: float, references_ms: Sequence[float]) -> float:
    """How long the reference usually takes over what it took at first.

    The first measurement takes seconds, in which the machine may have been slower than it is most
    of the time; and alone the reference finds its weights in the caches. Whatever was corrected to
    it has to be multiplied by this.

    Args:
      first_ms: by which drift was corrected.
      references_ms: what it took beside each of the subnets timed.
    """
    return statistics.median(references_ms or [first_ms]) / first_ms


def _measured(own: list[float], reference: list[float], reference_ms: float) -> Measured:
    value, low, high = ratio(own, reference, resamples=300)
    return Measured(
        reference_ms * value,
        reference_ms * low,
        reference_ms * high,
        len(own),
        summarise(reference).mean_ms,
    )
