"""The final measurements of a search: which of its candidates it returns."""

import dataclasses

from automoe_jax.architecture.subnet import short_name
from automoe_jax.latency.records import FinalMeasurement
from automoe_jax.phases import search_probing
from automoe_jax.phases.search_context import SearchContext, describe
from automoe_jax.phases.search_latency import SearchLatency
from automoe_jax.phases.search_result import Found
from automoe_jax.search.candidates import Candidate, InfeasibleError, Scored
from automoe_jax.search.config import ConstraintConfig
from automoe_jax.search.finals import FinalAttempt, next_candidate
from automoe_jax.search.limits import Limits

NOTICEABLE = 1.03  # slowdown from which on a failed final measurement mentions it


def verify(
    search: SearchContext, limits: Limits, finalists: list[Scored], scored: list[Scored]
) -> tuple[list[Found], list[Scored]]:
    """The best `keep` candidates that pass a final measurement, and all scored candidates.

    `finalists` are tried first, then the others of `scored` (best first). If none passes, the
    smallest subnet is tried too, drawn or not; it then joins the scored ones. `InfeasibleError` if
    nothing passes.
    """
    latency, keep = search.latency, search.config.keep
    if latency is None or latency.prober is None or not search.config.limits_latency:
        return [_found(search, s, None) for s in finalists[:keep]], scored
    subnets = {s.subnet for s in finalists}
    within = [s for s in scored if limits.within(s.subnet)]
    order = finalists + [s for s in within if s.subnet not in subnets]
    measured = _measure_finals(search, latency, order)
    if not any(m.passed for m in measured):
        resort, scored = _last_resort(search, limits, scored)
        tried = {m.scored.subnet for m in measured}
        if resort.subnet not in tried and latency.left() >= 1:
            measured.append(_measure_final(search, latency, resort))
    found = [_found(search, m.scored, m.final) for m in measured if m.passed]
    if not found:
        raise InfeasibleError(_nothing_passed(search, latency, scored, measured))
    return sorted(found, key=lambda f: f.loss)[:keep], scored


@dataclasses.dataclass(frozen=True)
class _MeasuredFinal:
    """A candidate's final measurement."""

    scored: Scored
    final: FinalMeasurement
    over_limit: float  # upper end of its interval divided by the limit, the largest of all limits
    failure: str  # why it fails; "" if it passes

    @property
    def passed(self) -> bool:
        return not self.failure


def _measure_finals(
    search: SearchContext, latency: SearchLatency, order: list[Scored]
) -> list[_MeasuredFinal]:
    """Final measurements of the candidates that are expected to pass, as far as the budget goes."""
    measured: list[_MeasuredFinal] = []
    attempts: list[FinalAttempt] = []

    def upper(i: int) -> float:
        return latency.estimate(order[i].subnet).upper_ms / latency.upper_bound()

    keep, max_attempts = search.config.keep, latency.policy.final_attempts
    while True:
        at = next_candidate(attempts, len(order), upper, keep=keep, max_attempts=max_attempts)
        if at is None:
            return measured
        known = latency.is_measured(order[at].subnet)
        last_resort = 0 if any(m.passed for m in measured) else 1
        if latency.left() < (1 if known else 2) + last_resort:
            search.run.progress.note(
                f"{latency.used()} of {search.config.measurements} measurements are made "
                "(search.measurements); no more candidates are tried"
            )
            return measured
        if not known:
            latency.measure(order[at].subnet)  # and decide again whether it is expected to pass
            continue
        before = upper(at)
        measured.append(_measure_final(search, latency, order[at]))
        attempts.append(FinalAttempt(at, before, measured[-1].over_limit))


def _measure_final(search: SearchContext, latency: SearchLatency, s: Scored) -> _MeasuredFinal:
    final = search_probing.verify(latency, s.subnet)
    over_limit, failure = _compare(final, search.config.constraint)
    if failure:
        search.run.progress.note(
            f"{short_name(s.subnet)} (score {s.loss:.4f}) fails the final measurement: "
            f"{failure}; going on to the next"
        )
    return _MeasuredFinal(s, final, over_limit, failure)


def _compare(final: FinalMeasurement, constraint: ConstraintConfig) -> tuple[float, str]:
    """Upper end of the interval over the limit, the largest of all limits, and the failure in
    words ("" if it is within the limits).

    A ratio is of two subnets timed in turns: a machine that has become slower does not matter.
    """
    slower = ""
    if final.slowdown > NOTICEABLE:
        times = f"{final.slowdown:.3g} times as long"
        slower = f" (the machine takes {times} as during most of the search)"
    bounds = [
        (final.high_ms, constraint.latency_ms, "ms", slower),
        (final.ratio_high, constraint.latency_ratio, "of the largest's latency", ""),
    ]
    over_limit, words = max(
        (high / bound, f"{high:.4g} {unit} at the upper end of its interval, limit {bound:.4g}{w}")
        for high, bound, unit, w in bounds
        if bound
    )
    return over_limit, words if over_limit > 1 else ""


def _nothing_passed(
    search: SearchContext,
    latency: SearchLatency,
    scored: list[Scored],
    measured: list[_MeasuredFinal],
) -> str:
    """The error text, which names the subnet that came nearest to the limit."""
    if measured:
        best = min(measured, key=lambda m: m.over_limit)
        nearest = best.scored.subnet
        how = f"{best.failure}; it took {latency.ms(nearest):.4g} ms when it was drawn"
    else:
        known = [s.subnet for s in scored if latency.is_measured(s.subnet)]
        nearest = min(known, key=latency.ms, default=search.run.config.space.smallest())
        bound = latency.upper_bound()
        how = f"{latency.ms(nearest):.4g} ms when it was drawn, limit {bound:.4g}"
    return (
        f"none of {len(measured)} candidates passed the final latency measurement; the nearest "
        f"was {short_name(nearest)}: {how}; raise the limit or search.measurements, or search "
        "again, with another --out, while the machine has less to do"
    )


def _last_resort(
    search: SearchContext, limits: Limits, scored: list[Scored]
) -> tuple[Scored, list[Scored]]:
    """The smallest subnet, scored as the others are, and all scored candidates with it."""
    smallest = search.run.config.space.smallest()
    for s in scored:
        if s.subnet == smallest:
            return s, scored
    candidate = Candidate(smallest, "last resort", search.config.iterations)
    loss = search.history.loss(smallest)
    if loss is None:
        loss = search.objective.sample([smallest])[0]
        search.history.append(smallest, loss, describe(search, limits, candidate))
    resort = Scored(candidate, loss)
    return resort, [*scored, resort]


def _found(search: SearchContext, s: Scored, final: FinalMeasurement | None) -> Found:
    sample_loss = search.history.loss(s.subnet)
    assert sample_loss is not None
    return Found(s.subnet, search.full_score(s.subnet), sample_loss, search.costs(s.subnet), final)
