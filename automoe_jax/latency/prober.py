"""All input and output of timing: exports subnets, times them, corrects for drift."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.process import Timer, thread_count
from automoe_jax.latency.records import FinalMeasurement, Measured
from automoe_jax.latency.statistics import interval, ratio, summarise
from automoe_jax.system import programs

# Writes an export of a subnet for one beam size.
ExportForTiming = Callable[[Subnet, Path, int], None]


class Prober:
    """Measures subnets on a machine whose speed drifts.

    Each subnet is timed in turns with a reference, the smallest subnet. Its latency is the one it
    would have if the reference took `reference_ms`, its latency when it was first measured. The
    child process starts, and the reference is exported, at the first measurement.
    """

    def __init__(
        self,
        protocol: LatencyConfig,
        policy: MeasurementPolicy,
        write: ExportForTiming,
        reference: Subnet,
        folder: Path,
    ):
        """Measures nothing yet.

        `protocol` has the lengths, the beam size and the runs of a final measurement, `policy` the
        rest. `folder` is for exports that are only timed; `close` removes it.
        """
        self._final, self._policy = protocol, policy
        self._config = c = dataclasses.replace(protocol, runs=policy.runs)
        self._write, self._folder, self._reference = write, folder, reference
        self._timer: Timer | None = None
        self.how = (
            f"measured ({c.name}): beam {c.beam_size}, {c.source_length} in, {c.target_length} "
            f"out, {thread_count(c.threads)} thread(s), {c.platform}; corrected by the smallest "
            "subnet timed in turns"
        )

    def measure_reference(self, limit: float = math.inf) -> Measured:
        """Latency of the reference alone.

        Above the limit in ms it is timed again after a pause and the lowest mean counts: if the
        smallest subnet exceeds a limit, every subnet does.
        """
        ms = self._time_reference()
        for _ in range(self._policy.reference_retries):
            if ms <= limit:
                break
            time.sleep(self._policy.reference_pause_s)
            ms = min(ms, self._time_reference())
        return Measured(ms, ms, ms, ms, self.how)

    def measure(
        self,
        subnet: Subnet,
        reference_ms: float,
        limit: float = math.inf,
        *,
        precise: bool = False,
        largest: Subnet | None = None,
    ) -> Measured:
        """Latency of one subnet, any but the reference.

        `reference_ms` is the reference's latency when it was first measured. The runs end early if
        the latency is clearly below or above the limit in ms. With `precise` there are as many as
        of a final measurement. `largest` is a further subnet, timed in turns with the first of
        these runs.
        """
        policy = self._policy
        runs_at_most = max(policy.runs, self._final.runs) if precise else policy.runs
        candidate = self._export(subnet, "candidate")
        beside = [] if largest is None else [self._export(largest, "largest", once=True)]
        own: list[float] = []
        reference: list[float] = []
        largest_ms = None
        while True:
            left = runs_at_most - len(own)
            stops = limit < math.inf and left > policy.chunk_runs
            runs, warmup = policy.chunk_runs if stops else left, 0 if own else self._config.warmup
            config = dataclasses.replace(self._config, runs=runs, warmup=warmup)
            times = self._time(candidate, *beside, config=config)
            reference += times[0]
            own += times[1]
            if beside:
                means = [summarise(times[i]).mean_ms for i in (0, 2)]
                largest_ms, beside = reference_ms * means[1] / means[0], []
            if len(own) < runs_at_most:
                _, low, high = ratio(own, reference, confidence=policy.stop_confidence)
                clear = reference_ms * high < limit or reference_ms * low > limit
                if len(own) < 2 * policy.chunk_runs or not clear:
                    continue
            shutil.rmtree(candidate)
            found = self._corrected(own, reference, reference_ms)
            return dataclasses.replace(found, largest=largest_ms)

    def measure_group(self, subnets: Sequence[Subnet], reference_ms: float) -> list[Measured]:
        """Latency of up to `policy.group` subnets, timed in turns with each other."""
        paths = [self._export(s, f"candidate_{i}") for i, s in enumerate(subnets)]
        reference, *own = self._time(*paths)
        for path in paths:
            shutil.rmtree(path)
        return [self._corrected(times, reference, reference_ms) for times in own]

    def verify(self, subnet: Subnet, largest: Subnet, reference_ms: float) -> FinalMeasurement:
        """Times a subnet, the smallest and the largest one in turns, with the protocol's runs."""
        candidate = self._export(subnet, "candidate")
        beside = self._export(largest, "largest", once=True)
        reference, own, other = self._time(candidate, beside, config=self._final)
        shutil.rmtree(candidate)
        slowdown = summarise(reference).mean_ms / reference_ms
        return FinalMeasurement(
            summarise(own), summarise(other), *interval(own), *ratio(own, other), slowdown
        )

    def slowdown(self, largest: Subnet, reference_ms: float) -> float:
        """The reference's latency now, in turns with the largest subnet, over `reference_ms`."""
        config = dataclasses.replace(self._config, runs=self._policy.glance_runs)
        times = self._time(self._export(largest, "largest", once=True), config=config)
        return summarise(times[0]).mean_ms / reference_ms

    def close(self):
        """Ends the child process and removes the exports."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _time_reference(self) -> float:
        runs = max(self._config.runs, self._final.runs)
        return summarise(self._time(config=dataclasses.replace(self._config, runs=runs))[0]).mean_ms

    def _time(self, *exports: Path, config: LatencyConfig | None = None) -> list[list[float]]:
        """Times in ms of the reference and of the exports, in turns."""
        # The reference comes first: the process keeps compiled programs in the export that it
        # loads first, and the others are removed.
        reference = self._export(self._reference, "reference", once=True)
        programs.wait()  # those that will score candidates, for example
        return self._started().time([reference, *exports], config or self._config)

    def _started(self) -> Timer:
        if self._timer is None:
            shutil.rmtree(self._folder, ignore_errors=True)  # what a killed process left
            self._timer = Timer(self._config.threads, self._config.platform)
        return self._timer

    def _export(self, subnet: Subnet, name: str, *, once: bool = False) -> Path:
        """The folder of an export, written anew unless `once` and it exists."""
        self._started()
        path = self._folder / name
        if not (once and path.exists()):
            self._write(subnet, path, self._config.beam_size)
        return path

    def _corrected(self, own: list[float], reference: list[float], reference_ms: float) -> Measured:
        value, low, high = (reference_ms * x for x in ratio(own, reference, resamples=300))
        mean = summarise(reference).mean_ms
        return Measured(value, low, high, mean, f"{self.how}; {len(own)} runs")
