"""The final measurements of a search: which of its candidates it returns."""

import dataclasses
import statistics

from automoe_jax.architecture.subnet import Subnet, short_name
from automoe_jax.latency.records import LATENCY, FinalMeasurement
from automoe_jax.phases import search_probing, search_scoring
from automoe_jax.phases.search_context import SearchContext, describe
from automoe_jax.phases.search_latency import SearchLatency
from automoe_jax.phases.search_result import Found
from automoe_jax.search.candidates import Candidate, InfeasibleError, Scored, best_first
from automoe_jax.search.config import ConstraintConfig
from automoe_jax.search.finals import FinalAttempt, factor_of, next_candidate
from automoe_jax.search.limits import Limits

NOTICEABLE = 1.03  # slowdown from which on a failed final measurement mentions it
ROOM = 1.03  # limit over latency, as final measurements find them, from which on that room is used


def verify(
    search: SearchContext, limits: Limits, finalists: list[Scored], scored: list[Scored]
) -> tuple[list[Found], list[Scored]]:
    """The best `keep` candidates that pass a final measurement, and all scored candidates.

    `finalists` are tried first, then the others of `scored` (best first). If the best fail, or take
    less than was expected of them, an evolution scores more candidates just below the limit as it
    is known then, which join. If none passes, the smallest subnet is tried too, drawn or not; it
    then joins the scored ones. `InfeasibleError` if nothing passes.
    """
    latency, keep = search.latency, search.config.keep
    if latency is None or latency.prober is None or not search.config.limits_latency:
        return [_found(search, s, None) for s in finalists[:keep]], scored
    finals, subnets = _Finals(search, limits, latency, scored), {s.subnet for s in finalists}
    within = [s for s in scored if limits.within(s.subnet)]
    finals.run(finalists, [s for s in within if s.subnet not in subnets])
    scored = best_first([*scored, *finals.more])
    if not finals.passed:
        resort, scored = _last_resort(search, limits, scored)
        tried = {m.scored.subnet for m in finals.measured}
        if resort.subnet not in tried and latency.left() >= 1:
            finals.measure(resort)
    found = [_found(search, m.scored, m.final) for m in finals.passed]
    if not found:
        raise InfeasibleError(_nothing_passed(search, latency, scored, finals.measured))
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


class _Finals:
    """Final measurements of the candidates that are expected to pass, as far as the budget goes."""

    def __init__(
        self, search: SearchContext, limits: Limits, latency: SearchLatency, scored: list[Scored]
    ):
        """`scored` are all candidates, within the limits or not."""
        self._search, self._limits, self._latency = search, limits, latency
        self._scored = scored
        self.measured: list[_MeasuredFinal] = []
        self.more: list[Scored] = []  # what was scored on the way
        self._finalists: list[Scored] = []  # scored on the whole validation set
        self._retreats: list[int] = []  # for each, how many had failed
        self._used_room = False

    @property
    def passed(self) -> list[_MeasuredFinal]:
        """Those that are within the limits."""
        return [m for m in self.measured if m.passed]

    def run(self, finalists: list[Scored], others: list[Scored]):
        """Tries the finalists, then the others, both best first."""
        self._finalists = list(finalists)
        order = finalists + others
        while True:
            at = self._next(order)
            if why := self._correction(at):
                order = self._corrected(order, why)
                continue
            if at is None or self._out_of_budget(order[at].subnet):
                return
            if not self._latency.is_measured(order[at].subnet):
                # And decide again whether it is expected to pass.
                self._latency.measure(order[at].subnet)
                continue
            self.measure(order[at])

    def measure(self, s: Scored):
        """Measures one, whatever is expected of it."""
        final = search_probing.verify(self._latency, s.subnet)
        over_limit, failure = _compare(final, self._search.config.constraint)
        if failure:
            self._search.run.progress.note(
                f"{short_name(s.subnet)} (score {s.loss:.4f}) fails the final measurement: "
                f"{failure}; going on to the next"
            )
        self.measured.append(_MeasuredFinal(s, final, over_limit, failure))

    def _upper(self, s: Scored) -> float:
        return self._latency.estimate(s.subnet).upper_ms / self._latency.upper_bound()

    def _next(self, order: list[Scored]) -> int | None:
        places = {s.subnet: place for place, s in enumerate(order)}
        return next_candidate(
            [
                FinalAttempt(places[m.scored.subnet], self._own_factor(m), m.passed)
                for m in self.measured
            ],
            len(order),
            lambda i: self._upper(order[i]),
            keep=self._search.config.keep,
            max_attempts=self._latency.policy.final_attempts,
        )

    def _own_factor(self, m: _MeasuredFinal) -> float:
        """How many times as long as expected one takes."""
        expected = self._upper(m.scored)
        if m.final.high_ms / self._latency.limit_ms == m.over_limit:
            # In ms, of a machine that is faster for a moment; that it will stay so is not likely.
            expected *= min(m.final.slowdown, 1.0)
        return m.over_limit / expected

    def _has_budget(self, *, known: bool) -> bool:
        """Whether another candidate can be measured, and the last resort if none has passed."""
        last_resort = 0 if self.passed else 1
        return self._latency.left() >= (1 if known else 2) + last_resort

    def _out_of_budget(self, subnet: Subnet) -> bool:
        latency, search = self._latency, self._search
        if self._has_budget(known=latency.is_measured(subnet)):
            return False
        search.run.progress.note(
            f"{latency.used()} of {search.config.measurements} measurements are made "
            "(search.measurements); no more candidates are tried"
        )
        return True

    def _correction(self, at: int | None) -> str:
        """Why more candidates must be made, in words for the user; "" if they need not.

        `at` is the next candidate. As long as all that were measured failed, once after each. Once
        where one has passed and nothing that is known is better, but what was measured took less
        than expected.
        """
        config = self._search.config
        if config.algorithm not in ("evolution", "local", "nsga2"):
            return ""  # random searches have candidates everywhere below the limit
        if not self.measured or not self._has_budget(known=False):
            return ""
        if self.passed:
            left = len(self.measured) < self._latency.policy.final_attempts
            room = at is None and left and self._factor() < 1 / ROOM
            return "use the room" if room and config.retreats and not self._used_room else ""
        another = len(self.measured) > max(self._retreats, default=0)
        return "leave room for it" if another and len(self._retreats) < config.retreats else ""

    def _factor(self) -> float:
        """How many times as long as expected others are likely to take."""
        factors = [self._own_factor(m) for m in self.measured]
        return factor_of(factors) if self.passed else statistics.median(factors)

    def _corrected(self, order: list[Scored], why: str) -> list[Scored]:
        """The order with new candidates, for the limit as final measurements have corrected it.

        Evolution has refined what lies just within the limit as it was known, and little else.
        """
        search, factor = self._search, self._factor()
        tried = {m.scored.subnet for m in self.measured}
        if self.passed:
            self._used_room = True
        else:
            self._retreats.append(len(tried))
        counted = self._limits.without(LATENCY)

        def within(subnet: Subnet) -> bool:
            bound = self._latency.upper_bound() / factor
            return counted.within(subnet) and self._latency.estimate(subnet).upper_ms <= bound

        turn, count = len(self._retreats) + self._used_room, search.config.parents
        known = best_first([*self._scored, *self.more])  # all by their score on the sample
        near = [s for s in known if s.subnet not in tried and within(s.subnet)]
        parents = [s.candidate for s in [*order[:count], *near[:count]]]
        draws = search.draws(within, turn)
        children = draws.children(
            parents, search.config.iterations + turn, [s.candidate for s in known]
        )
        search.run.progress.note(
            f"the best take {factor:.3g} times as long as expected: scoring {len(children)} more "
            f"subnets that {why}"
        )
        task = search.run.progress.task("searching", len(children))
        try:
            found = search_scoring.score(search, self._limits, children, 0, task)
        finally:
            task.close()
        self.more += found
        full = {s.subnet: s for s in self._finalists}
        for m in self.measured:
            candidate = m.scored.candidate
            full[m.scored.subnet] = Scored(candidate, search.full_score(m.scored.subnet))
        sample = [s for s in best_first([*near, *found]) if s.subnet not in full]
        self._finalists = [*full.values(), *search_scoring.rescored(search, within, sample)]
        first = {s.subnet for s in self._finalists}
        rest = [s for s in best_first([*known, *found]) if s.subnet not in first]
        return [*best_first(self._finalists), *rest]


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
