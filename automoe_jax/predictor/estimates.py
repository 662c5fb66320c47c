"""What is known of latencies: a pure fold over measurements and a latency model."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping

from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.latency.records import Measured
from automoe_jax.latency.statistics import reference_scale
from automoe_jax.predictor.model import LatencyModel


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A subnet's latency in ms, measured or predicted."""

    ms: float
    upper_ms: float  # upper end of the 95 % interval; equal to `ms` for a prediction
    how: str  # how it is known, in words


@dataclasses.dataclass(frozen=True)
class Estimates:
    """The result of `fold`."""

    measured: Mapping[Subnet, Measured]  # the reference first
    model: LatencyModel | None  # None where nothing is predicted
    scale: float  # factor of measured latencies, see `reference_scale`
    correction: float  # factor of predicted latencies

    def of(self, subnet: Subnet) -> Estimate:
        """The estimate of one subnet; `KeyError` if it is not measured and there is no model."""
        if subnet in self.measured or self.model is None:
            m = self.measured[subnet]
            return Estimate(m.ms * self.scale, m.high * self.scale, m.how)
        ms, how = self.model.predict(subnet) * self.correction, self.model.how
        if self.correction != 1:
            how = f"{how}; times {self.correction:.3f}, as measured in this search"
        return Estimate(ms, ms, how)


def fold(
    measured: Mapping[Subnet, Measured],
    model: LatencyModel | None,
    *,
    largest: Subnet | None,
    min_measured: int,
) -> Estimates:
    """Combines measurements and a model.

    Predictions are corrected by the median of measured over predicted latency. With fewer than
    `min_measured` measurements, by the reference's latency over the one it had when the model was
    made; under a limit in ms that factor is at most one, because the machine may be slow for a
    moment, and little would seem to meet the limit.

    `measured` starts with the reference. Without `model` nothing is predicted. `largest` is given
    if the limit is a share of its latency. How many times the smallest subnet's that is, depends on
    what else the machine does: the median of its own measurement and those in turns with the other
    subnets counts.
    """
    if not measured:
        return Estimates(measured, model, 1.0, 1.0)
    if largest is not None and largest in measured:
        measured = {**measured, largest: _pooled(measured[largest], measured.values())}
    (reference, first), *others = measured.items()
    scale = reference_scale(first.ms, [m.reference for _, m in others])
    if model is None:
        return Estimates(measured, model, scale, 1.0)
    few, made = len(measured) < min_measured, model.reference
    if few and made is not None and from_json(made["subnet"]) == reference:
        correction = first.ms * scale / made["ms"]
    else:
        correction = statistics.median(
            m.ms * scale / model.predict(subnet) for subnet, m in measured.items()
        )
    if few and largest is None:
        correction = min(correction, 1.0)
    return Estimates(measured, model, scale, correction)


def _pooled(own: Measured, all_measured: Iterable[Measured]) -> Measured:
    """The largest subnet's measurement, at the median of its latencies."""
    beside = [m.largest for m in all_measured if m.largest is not None]
    factor = statistics.median([own.ms, *beside]) / own.ms
    return dataclasses.replace(
        own, ms=factor * own.ms, low=factor * own.low, high=factor * own.high
    )


def predicted_and_measured(estimates: Estimates) -> list[tuple[float, float, float, float]]:
    """(predicted, measured, low, high) in ms of each subnet that was predicted, then measured."""
    scale = estimates.scale
    return [
        (m.predicted, scale * m.ms, scale * m.low, scale * m.high)
        for m in estimates.measured.values()
        if m.predicted is not None
    ]
