"""What a search knows about latency, and how it measures more."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.prober import Prober
from automoe_jax.latency.records import (
    FINAL,
    LATENCY,
    FinalMeasurement,
    Measured,
    ReplayLog,
    final_of,
    measured_of,
)
from automoe_jax.predictor import estimates
from automoe_jax.predictor.estimates import Estimate, Estimates
from automoe_jax.predictor.model import LatencyModel
from automoe_jax.search.candidates import Scored


@dataclasses.dataclass(frozen=True)
class SearchLatency:
    """Latency of a search's candidates: measured, predicted, or predicted and verified.

    Knowledge is the fold `known` over the records that this process has asked for; every
    measurement is a record first.

    Attributes:
      mode: `search.latency`.
      log: the measurements of this search.
      prober: times subnets; None if the mode measures nothing.
      policy: when and how much to measure.
      smallest, largest: corners of the space; drift is corrected by the smallest.
      limit_ms: upper bound in ms, or infinity.
      limit_ratio: upper bound as a share of the largest subnet's latency, or infinity.
      note: takes a line for the user.
      model: predicts latencies; None where the mode does not, or until `with_model`.
    """

    mode: str
    log: ReplayLog
    prober: Prober | None
    policy: MeasurementPolicy
    smallest: Subnet
    largest: Subnet
    limit_ms: float
    limit_ratio: float
    note: Callable[[str], None]
    model: LatencyModel | None = None
    _folds: dict[int, Estimates] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def predicts(self) -> bool:
        """True if latencies are known without timing each subnet."""
        return self.mode in ("verified", "predicted")

    def with_model(self, model: LatencyModel) -> "SearchLatency":
        """The same knowledge with predictions."""
        return dataclasses.replace(self, model=model, _folds={})

    # --- what is known -----------------------------------------------------------------------

    def known(self) -> Estimates:
        """The fold over all measurements so far."""
        asked = self.log.asked(LATENCY)
        if len(asked) not in self._folds:
            self._folds.clear()
            self._folds[len(asked)] = estimates.fold(
                {subnet: measured_of(line) for subnet, line in asked.items()},
                self.model,
                relative=self.limit_ratio < math.inf,
                min_measured=self.policy.min_measured,
            )
        return self._folds[len(asked)]

    def is_measured(self, subnet: Subnet) -> bool:
        """True if this search has measured the subnet."""
        return subnet in self.log.asked(LATENCY)

    def estimate(self, subnet: Subnet) -> Estimate:
        """The subnet's latency; measured now in a mode that predicts nothing."""
        if not self.predicts and not self.is_measured(subnet):
            self.measure(subnet)
        return self.known().of(subnet)

    def ms(self, subnet: Subnet) -> float:
        """The subnet's latency in ms, as in `estimate`."""
        return self.estimate(subnet).ms

    def how(self, subnet: Subnet) -> str:
        """How the subnet's latency is, or would be, known."""
        if self.predicts or self.is_measured(subnet):
            return self.known().of(subnet).how
        assert self.prober is not None
        return self.prober.how

    def upper_bound(self) -> float:
        """The limit in ms; a ratio follows the estimate of the largest subnet's latency."""
        if self.limit_ratio == math.inf:
            return self.limit_ms
        return min(self.limit_ms, self.limit_ratio * self.ms(self.largest))

    def used(self) -> int:
        """Measurements of this search so far, those before a restart included."""
        finals = self.log.asked(FINAL).values()
        return len(self.log.asked(LATENCY)) + sum(line["tries"] for line in finals)

    def left(self) -> float:
        """Measurements that the budget still allows."""
        return self.policy.budget - self.used()

    # --- measuring ---------------------------------------------------------------------------

    def begin(self):
        """Measures what other latencies are relative to: the smallest subnet, and the largest one
        under a ratio limit.
        """
        if self.prober is not None:
            self.measure(self.smallest)
            if self.limit_ratio < math.inf:
                self.measure(self.largest)

    def measure(self, subnet: Subnet):
        """Times a subnet unless there is a record of it."""
        self.log.get(LATENCY, subnet, lambda: self._probe(subnet).fields())

    def _probe(self, subnet: Subnet) -> Measured:
        assert self.prober is not None
        if subnet == self.smallest:
            m = self.prober.measure_reference(self.limit_ms)
        else:
            # The ratio limit is not known before the largest subnet is measured.
            ratio_known = subnet != self.largest
            limit = self.upper_bound() if ratio_known else self.limit_ms
            m = self.prober.measure(subnet, self._reference_ms(), limit / self.known().scale)
        predicted = None if self.model is None else self.model.predict(subnet)
        return dataclasses.replace(m, predicted=predicted)

    def _reference_ms(self) -> float:
        """The smallest subnet's latency when it was first measured."""
        return self.known().measured[self.smallest].ms

    def measure_parents(
        self, scored: list[Scored], feasible: Callable[[Subnet], bool], count: int, share: int
    ) -> list[Scored]:
        """Measures the best candidates until `count` of them are feasible.

        Args:
          scored: a population, best first.
          feasible: True for a subnet within the limits.
          count: parents wanted.
          share: measurements at most.

        Returns:
          The feasible ones; the best of all if there is none.
        """
        parents: list[Scored] = []
        for s in scored:
            if len(parents) == count:
                break
            if not self.is_measured(s.subnet) and share > 0:
                self.measure(s.subnet)
                share -= 1
            if feasible(s.subnet):
                parents.append(s)
        return parents or scored[:1]

    def measure_spread(self, scored: list[Scored], count: int):
        """Measures up to `count` of those not measured yet, evenly along the list."""
        unknown = [s.subnet for s in scored if not self.is_measured(s.subnet)]
        count = min(len(unknown), max(count, 0))
        for i in np.linspace(0, len(unknown) - 1, count).round().astype(int).tolist():
            self.measure(unknown[i])

    def share(self, reserve: int, rounds: int) -> int:
        """Measurements of one of the `rounds` that are left, with `reserve` kept for the end."""
        spare = self.left() - reserve
        return int(max(0, min(spare, math.ceil(spare / max(1, rounds)))))

    # --- the final measurement ---------------------------------------------------------------

    def verify(self, subnet: Subnet) -> FinalMeasurement:
        """The final measurement, beside the smallest and the largest subnet.

        Under a limit in ms it waits for a machine that is slower than usual, and repeats a
        measurement that was disturbed.
        """
        return final_of(self.log.get(FINAL, subnet, lambda: self._probe_final(subnet)))

    def _probe_final(self, subnet: Subnet) -> dict[str, Any]:
        assert self.prober is not None
        policy, scale = self.policy, self.known().scale
        looks_before = sum(line.get("looks", 0) for line in self.log.asked(FINAL).values())
        tries = looks = 0
        while True:
            looks += self._wait_until_calm(policy.looks - looks_before - looks)
            final = self.prober.verify(subnet, self.largest, self._reference_ms())
            final = dataclasses.replace(final, slowdown=final.slowdown / scale)
            tries += 1
            disturbed = final.slowdown > policy.calm and final.high_ms > self.limit_ms
            if not disturbed or looks_before + looks >= policy.looks:
                break
            if tries == policy.tries or self.left() - tries < 2:
                break
        return {
            "value": final.latency.mean_ms,
            "how": "final measurement",
            "tries": tries,
            "looks": looks,
            "verdict": dataclasses.asdict(final),
        }

    def _wait_until_calm(self, looks_left: int) -> int:
        """Waits while the machine is slower than usual; returns the looks that this took."""
        if self.limit_ms == math.inf:
            return 0
        assert self.prober is not None
        for look in range(looks_left):
            slowdown = self.prober.slowdown(self.largest, self._reference_ms())
            slowdown /= self.known().scale
            if slowdown <= self.policy.calm:
                return look
            if look == 0:
                seconds = (looks_left - 1) * self.policy.look_pause_s
                self.note(
                    f"the machine takes {slowdown:.3g} times as long as during most of the search: "
                    f"waiting for it, up to {seconds:.0f} s, to measure the result"
                )
            time.sleep(self.policy.look_pause_s)
        return looks_left
