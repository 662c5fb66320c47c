"""What a search knows about latency, and how it measures more."""

import dataclasses
import math
from collections.abc import Callable

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.prober import Prober
from automoe_jax.latency.records import FINAL, LATENCY, Measured, ReplayLog, measured_of
from automoe_jax.predictor import estimates
from automoe_jax.predictor.estimates import Estimate, Estimates
from automoe_jax.predictor.model import LatencyModel


@dataclasses.dataclass(frozen=True)
class SearchLatency:
    """Latency of a search's candidates: measured, predicted, or predicted and verified.

    Knowledge is the fold `known` over the records that this process has asked for; every
    measurement is a record first.
    """

    mode: str  # `search.latency`
    log: ReplayLog
    prober: Prober | None  # None if the mode measures nothing
    policy: MeasurementPolicy
    smallest: Subnet  # drift is corrected by it
    largest: Subnet
    limit_ms: float  # infinity for none
    limit_ratio: float  # upper bound as a share of the largest subnet's latency; infinity for none
    note: Callable[[str], None]  # takes a line for the user
    model: LatencyModel | None = None  # None where the mode does not predict, or until `with_model`
    _folds: dict[int, Estimates] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def predicts(self) -> bool:
        """True if latencies are known without timing each subnet."""
        return self.mode in ("verified", "predicted")

    def with_model(self, model: LatencyModel) -> "SearchLatency":
        """The same knowledge with predictions."""
        return dataclasses.replace(self, model=model, _folds={})

    def known(self) -> Estimates:
        """The fold over all measurements so far."""
        asked = self.log.asked(LATENCY)
        if len(asked) not in self._folds:
            self._folds.clear()
            measured = {subnet: measured_of(line) for subnet, line in asked.items()}
            largest = self.largest if self.limit_ratio < math.inf else None
            found = estimates.fold(
                measured, self.model, largest=largest, min_measured=self.policy.min_measured
            )
            self._folds[len(asked)] = found
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

    def begin(self):
        """Measures the smallest subnet and, under a ratio limit, the largest one."""
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
            is_largest, relative = subnet == self.largest, self.limit_ratio < math.inf
            limit = self.limit_ms if is_largest else self.upper_bound()
            m = self.prober.measure(
                subnet,
                self.reference_ms(),
                limit / self.known().scale,
                precise=relative and is_largest,
                largest=self.largest if relative and not is_largest else None,
            )
        predicted = None if self.model is None else self.model.predict(subnet)
        return dataclasses.replace(m, predicted=predicted)

    def reference_ms(self) -> float:
        """The smallest subnet's latency when it was first measured."""
        return self.known().measured[self.smallest].ms
