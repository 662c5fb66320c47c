"""Latency of subnets that still live in a supernet: exported, timed, corrected for drift."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from automoe_jax.latency import Latency, LatencyConfig, Timer, ratio, summarise
from automoe_jax.subnet import Subnet

# Writes an export of a subnet for one beam size.
ExportForTiming = Callable[[Subnet, Path, int], None]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A final measurement: the subnet beside the largest one, in turns."""

    latency: Latency
    largest: Latency
    ratio: float
    ratio_low: float  # 95 % interval
    ratio_high: float


class SubnetTimer:
    """Measures subnets one after the other on a machine whose speed drifts.

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
          runs: timed runs per candidate.
          write: exports a subnet.
          reference: the smallest subnet.
          reference_ms: its latency where that has been measured before (a resumed search).
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
    def how(self) -> str:
        """How `measure` gets its values."""
        c = self._config
        return (
            f"measured ({c.name}): beam {c.beam_size}, {c.source_length} in, "
            f"{c.target_length} out, {self._timer.threads} thread(s), {c.platform}; corrected by "
            "the smallest subnet timed in turns"
        )

    def measure(self, subnet: Subnet) -> float:
        """Latency in ms: the protocol's mean, corrected for drift."""
        if self._reference_ms is None:
            times = self._timer.time([self._reference], self._config)
            self._reference_ms = summarise(times[0]).mean_ms
        if subnet == self._first:
            return self._reference_ms
        candidate = self._export(subnet, "candidate")
        own, reference = self._timer.time([candidate, self._reference], self._config)
        shutil.rmtree(candidate)
        drift = self._reference_ms / summarise(reference).mean_ms
        return summarise(own).mean_ms * drift

    def verify(self, subnet: Subnet, largest: Subnet) -> Verdict:
        """Times a subnet and the largest one in turns, with the protocol's number of runs."""
        if self._largest is None:
            self._largest = self._export(largest, "largest")
        pair = [self._export(subnet, "candidate"), self._largest]
        own, other = self._timer.time(pair, self._final)
        value, low, high = ratio(own, other)
        return Verdict(summarise(own), summarise(other), value, low, high)

    def _export(self, subnet: Subnet, name: str) -> Path:
        path = self._folder / name
        self._write(subnet, path, self._config.beam_size)
        return path

    def close(self):
        """Ends the timing process and removes its files."""
        self._timer.close()
        shutil.rmtree(self._folder, ignore_errors=True)
