"""The search phase: supernet and limits in, subnet files, history and pictures out."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet, short_name, to_json
from automoe_jax.data.prepared import PreparedData
from automoe_jax.decoding import evaluation as evaluate
from automoe_jax.latency.config import GOLD_RUNS
from automoe_jax.latency.records import HISTORY, MEASUREMENTS, History
from automoe_jax.latency.subnet_timer import SubnetTimer, Verdict
from automoe_jax.model.extract import Params
from automoe_jax.phases import search_result
from automoe_jax.phases.costs import HOW, Counted
from automoe_jax.phases.export import SupernetExporter
from automoe_jax.phases.latency_model import latency_model
from automoe_jax.phases.objectives import Loss, Objective, Text
from automoe_jax.phases.prepare import corpus_split
from automoe_jax.phases.run import SEARCH, Run, claim
from automoe_jax.phases.train import target
from automoe_jax.predictor.latency_source import NAME, LatencySource
from automoe_jax.predictor.model import LatencyModel
from automoe_jax.published import subnet_files
from automoe_jax.search.config import ConstraintConfig
from automoe_jax.search.evolution import Candidate, InfeasibleError, Scored, front_of, search
from automoe_jax.search.finals import Finals
from automoe_jax.search.limits import Limit, Limits
from automoe_jax.system.errors import UserError
from automoe_jax.training.population import PopulationScorer

FULL = "full_score"
SPARE = 5  # measurements
NOTICED = 1.03  # a slowdown from which on it is told
LAST_RESORT = "last resort"  # where a candidate comes from


@dataclasses.dataclass(frozen=True)
class Found:
    """A subnet that the search returns."""

    subnet: Subnet
    loss: float  # on the whole validation set
    costs: dict[str, float]
    verdict: Verdict | None  # where latency is limited and measured


def claim_search(run: Run, folder: Path, step: int | None):
    """Starts or continues a search; refuses another config or another supernet.

    Args:
      run: its groups `search`, `predictor`, `latency` and some of `export` must stay the same.
      folder: of the search.
      step: of the supernet; None for random weights.
    """
    config = run.config
    settings = {
        **config.groups("seed", "data", "tokenizer", "space", "search", "predictor", "latency"),
        # They decide size and latency.
        "quantize": config.export.quantize,
        "shortlist": config.export.shortlist,
        "supernet_step": step,
    }
    scored, measured = ((folder / name).exists() for name in (HISTORY, MEASUREMENTS))
    try:
        claim(run, folder, SEARCH, settings, begun=scored or measured)
    except UserError:
        if scored:
            raise
        (folder / MEASUREMENTS).unlink()  # of a search that scored nothing
        claim(run, folder, SEARCH, settings, begun=False)


def run_search(run: Run, folder: Path, data: PreparedData, params: Params) -> list[Found]:
    """Searches with inherited weights; best first.

    Writes into `folder`: `best_1.json` and on, `history.jsonl`, `measurements.jsonl`,
    `front.json`, pictures, `result.json`. A search that was killed goes on where it was.

    Args:
      run: groups `search`, `predictor` and `latency` are used.
      folder: of this search, `search/` in the workdir by default.
      data: validation pairs to score on.
      params: of the supernet, as NumPy.

    Raises:
      UserError: no limit is given.
      InfeasibleError: nothing within the limits.
    """
    search = run.config.search
    if not (search.constraint.any or search.algorithm == "nsga2"):
        raise UserError(
            "no limit for the search: set one of search.constraint, as "
            "--config.search.constraint.latency_ratio=0.5 (latency_ms, gflops, active_params_m, "
            "params_m and size_mb are the others), or draw a front with "
            "--config.search.algorithm=nsga2"
        )
    return Search(run, folder, data, params).run()


class Search:
    """One search: what its steps share."""

    def __init__(self, run: Run, folder: Path, data: PreparedData, params: Params):
        config = run.config
        self.config, self.folder, self.progress = config, folder, run.progress
        self.space, self.search = config.space, config.search
        self.history = History(folder)
        self.start = subnet_files.load(self.search.start) if self.search.start else None
        if self.start is not None:
            self.space.validate(self.start)
        self.counted = Counted(self.space, config.export, data.tokenizer.vocab_sizes)
        supernet = target(config, data.tokenizer.vocab_sizes)
        self.scorer = PopulationScorer(supernet, config.training, params)
        inherited = SupernetExporter(run, params, "supernet")
        self.objective = self._objective(inherited, run, data)
        self.latency = self._latency(inherited, run, data) if self.search.needs_latency else None

    def _objective(self, inherited: SupernetExporter, run: Run, data: PreparedData) -> Objective:
        if self.search.objective == "loss":
            return Loss(self.scorer, data.valid, self.search.eval_pairs)
        valid = corpus_split(run, "valid")
        sources, references = evaluate.read_split(valid)
        beam = min(self.config.export.beam_sizes)
        return Text(
            self.search.objective,
            lambda subnet, folder: inherited.export(subnet, folder, (beam,)),
            self.folder / ".objective",
            sources,
            references,
            self.search.objective_sentences,
            beam,
        )

    def _latency(self, inherited: SupernetExporter, run: Run, data: PreparedData) -> LatencySource:
        mode = self.search.latency

        def make_model() -> LatencyModel:
            return latency_model(run, inherited, data.tokenizer.vocab_sizes)

        runs = GOLD_RUNS if mode == "gold" else self.search.latency_runs

        def start_timer(reference_ms: float | None) -> SubnetTimer:
            return SubnetTimer(
                self.config.latency,
                runs,
                inherited.export_for_timing,
                self.space.smallest(),
                reference_ms,
                self.folder / ".timing",
            )

        budget = self.search.measurements if mode == "verified" else float("inf")
        smallest = self.space.smallest()
        note = self.progress.note
        return LatencySource(mode, self.history, start_timer, make_model, smallest, budget, note)

    # --- limits and costs --------------------------------------------------------------------

    def _limits(self) -> Limits:
        """The limits of the config; a ratio becomes ms."""
        constraint = self.search.constraint
        limits = []
        for name, how in HOW.items():
            most = getattr(constraint, name)
            if most:
                value = self._counter(name)
                limits.append(Limit(name, lambda m=most: m, value, lambda _, h=how: h, name))
        if self.latency is not None:
            latency = self.latency
            if not self.search.limits_latency:
                latency.begin()
            else:
                ms = constraint.latency_ms or math.inf
                latency.limit(ms, constraint.latency_ratio or math.inf, self.space.largest())
                field = "latency_ms" if latency.most == ms else "latency_ratio"
                limits.append(Limit(NAME, lambda: latency.most, latency.value, latency.how, field))
        return Limits(limits)

    def _counter(self, name: str) -> Callable[[Subnet], float]:
        return lambda subnet: self.counted(subnet)[name]

    def costs(self, subnet: Subnet) -> dict[str, float]:
        """Everything known of what a subnet costs, by name."""
        found = dict(self.counted(subnet))
        if self.latency is not None:
            found[NAME] = self.latency.value(subnet)
        return found

    def _front_costs(self, subnet: Subnet) -> tuple[float, ...]:
        known = self.costs(subnet)
        return tuple(known[name] for name in self.front_names)

    # --- the search --------------------------------------------------------------------------

    def run(self) -> list[Found]:
        """All of it."""
        try:
            limits = self._limits()
            limits.require(self.space.smallest())
            for limit in limits.all:
                how = limit.how(self.space.largest())
                self.progress.note(f"limit: {limit.name} <= {limit.most:.4g} ({how})")
            scored = self._run(limits)
            candidates = scored
            if self.search.algorithm == "nsga2":
                candidates = self._front(scored, limits, set(), self._reserved)
            finalists = self._rescored(candidates, limits)
            found = self._verify(finalists, scored, limits)
            on_front = self._front(scored, limits, {f.subnet for f in found}, 0)
            return search_result.write(self, limits, scored, on_front, found)
        finally:
            if self.latency is not None:
                self.latency.close()

    def _run(self, limits: Limits) -> list[Scored]:
        task = self.progress.task("searching", self.search.samples)
        counts = {"scored": 0, "best": float("inf")}

        def score(candidates: list[Candidate]) -> list[float]:
            losses: list[float] = []
            at_once = self.objective.at_once
            missing = [c for c in candidates if self.history.loss(c.subnet) is None]
            for start in range(0, len(missing), at_once):
                group = missing[start : start + at_once]
                values = self.objective.crowd([c.subnet for c in group])
                for candidate, loss in zip(group, values, strict=True):
                    self.history.scored(candidate.subnet, loss, **self._about(candidate, limits))
                    counts["best"] = min(counts["best"], loss)
                task.update(counts["scored"] + start + len(group), best=f"{counts['best']:.4f}")
            for candidate in candidates:
                loss = self.history.loss(candidate.subnet)
                assert loss is not None
                losses.append(loss)
            counts["scored"] += len(candidates)
            counts["best"] = min([counts["best"], *losses])
            task.update(counts["scored"], best=f"{counts['best']:.4f}")
            return losses

        def told(iteration: int, scored: list[Scored]):
            median = statistics.median(s.loss for s in scored)
            measured = "" if self.latency is None else f", {self.latency.used} latencies measured"
            self.progress.note(
                f"iteration {iteration}: {len(scored)} subnets, best {scored[0].loss:.4f}, "
                f"median {median:.4f}{measured}"
            )

        choose: dict[str, Any] = {}
        if self.latency is not None:
            # Where every subnet that is looked at is timed, fewer are looked at.
            choose["by_shape"] = self.latency.predicts
            rounds = self.search.iterations + 1
            choose["watch"] = self.latency.probe(self._reserved, rounds)
            if self.search.limits_latency:
                choose["select"] = self.latency.select(limits.within, self._reserved, rounds)
        rng = np.random.default_rng([0x5EA2C4, self.config.seed, self.search.seed])
        try:
            return search(
                self.space, self.search, rng, limits.within, score, told,
                costs=self._front_costs, start=self.start, **choose,
            )  # fmt: skip
        finally:
            task.close()

    def _about(self, candidate: Candidate, limits: Limits) -> dict[str, Any]:
        """What the history says of a candidate besides its score."""
        about = {
            "iteration": candidate.iteration,
            "origin": candidate.origin,
            "parents": [to_json(p) for p in candidate.parents],
            "constraints": limits.about(candidate.subnet),
            "costs": self.costs(candidate.subnet),
        }
        if self.search.objective != "loss":
            about["objective"] = self.search.objective
        return about

    def full(self, subnet: Subnet) -> float:
        """The score on the whole validation set."""
        known = self.history.value(FULL, subnet)
        if known is None:
            known = (self.objective.full(subnet), self.objective.label)
            self.history.measured(FULL, subnet, *known)
        return known[0]

    def _rescored(self, scored: list[Scored], limits: Limits) -> list[Scored]:
        """The best that are still within the limits, by their score on all validation pairs."""
        most = max(self.search.parents, 2 * self.search.keep)
        best = [s for s in scored if limits.within(s.candidate.subnet)][:most]
        self.progress.note(f"scoring the last {len(best)} on the whole validation set")
        again = [Scored(s.candidate, self.full(s.candidate.subnet)) for s in best]
        return sorted(again, key=lambda s: s.loss)

    @property
    def _reserved(self) -> int:
        """Measurements of the budget that are left for the result: for each subnet to return one of
        its own and a final one, and some for those that fail.
        """
        return 2 * self.search.keep + SPARE if self.search.limits_latency else 0

    def _front(
        self, scored: list[Scored], limits: Limits, found: set[Subnet], reserved: int
    ) -> list[Scored]:
        """What nothing else within the limits beats in score and cost.

        A verified nsga2 measures it, but for `reserved` measurements; what it has `found` counts as
        within the limits.
        """
        measures = self.search.algorithm == "nsga2"
        while True:
            own = [
                s
                for s in scored
                if s.candidate.subnet in found or limits.within(s.candidate.subnet)
            ]
            on_front = front_of(own, self._front_costs)
            if not measures or self.latency is None or self.latency.mode != "verified":
                return on_front
            room = int(self.latency.left) - reserved
            if room <= 0 or all(self.latency.knows(s.candidate.subnet) for s in on_front):
                return on_front
            self.latency.measure_some(on_front, room)

    @property
    def front_names(self) -> tuple[str, ...]:
        """Costs that the front is over, beside the score."""
        if self.search.algorithm == "nsga2":
            return self.search.front
        constraint = self.search.constraint
        if self.latency is not None:
            return (NAME,)
        return (next(name for name in HOW if getattr(constraint, name)),)

    def _verify(self, finalists: list[Scored], scored: list[Scored], limits: Limits) -> list[Found]:
        """The best `keep` that also pass a final measurement beside the largest subnet.

        Where none does, the smallest subnet is tried too, whether it was drawn or not.
        """
        latency, keep = self.latency, self.search.keep
        if latency is None or not latency.measures or not self.search.limits_latency:
            return [self._found(s, None) for s in finalists[:keep]]
        again = {s.candidate.subnet for s in finalists}
        within = [s for s in scored if limits.within(s.candidate.subnet)]
        order = finalists + [s for s in within if s.candidate.subnet not in again]
        subnets = [s.candidate.subnet for s in order]
        found: list[Found] = []
        failures: list[tuple[float, Subnet, str]] = []
        finals = Finals(keep, keep + SPARE)

        def final(s: Scored) -> float:
            """Makes the final measurement: how many times the limit its upper end is."""
            subnet = s.candidate.subnet
            verdict = latency.verify(subnet, self.space.largest())
            beyond, failed = _failed(verdict, self.search.constraint)
            if failed:
                failures.append((beyond, subnet, failed))
                self.progress.note(
                    f"{short_name(subnet)} (score {s.loss:.4f}) fails the final measurement: "
                    f"{failed}; going on to the next"
                )
            else:
                found.append(self._found(s, verdict))
            return beyond

        def upper(i: int) -> float:
            return latency.upper(subnets[i]) / latency.most

        while (at := finals.next(len(order), upper)) is not None:
            known = latency.knows(subnets[at])
            kept = 0 if found else 1  # for the last resort
            if latency.left < (1 if known else 2) + kept:
                self.progress.note(
                    f"{latency.used} of {self.search.measurements} measurements are made "
                    "(search.measurements); no more candidates are tried"
                )
                break
            if known:
                finals.made(at, upper(at), final(order[at]))
            else:
                latency.measure(subnets[at])  # and whether it is likely to pass is asked again
        if not found:
            resort = self._last_resort(scored, limits)
            if resort.candidate.subnet not in {f[1] for f in failures} and latency.left >= 1:
                final(resort)
        if not found:
            raise InfeasibleError(self._nothing_passed(scored, failures))
        return sorted(found, key=lambda f: f.loss)[:keep]

    def _nothing_passed(
        self, scored: list[Scored], failures: list[tuple[float, Subnet, str]]
    ) -> str:
        """Says what came nearest to the limit."""
        latency = self.latency
        assert latency is not None
        if failures:
            _, nearest, failed = min(failures, key=lambda f: f[0])
            how = f"{failed}; it took {latency.value(nearest):.4g} ms when it was drawn"
        else:
            known = [s.candidate.subnet for s in scored if latency.knows(s.candidate.subnet)]
            nearest = min(known, key=latency.value, default=self.space.smallest())
            how = f"{latency.value(nearest):.4g} ms when it was drawn, limit {latency.most:.4g}"
        return (
            f"none of {len(failures)} candidates passed the final latency measurement; the nearest "
            f"was {short_name(nearest)}: {how}; raise the limit or search.measurements, or search "
            "again, with another --out, while the machine has less to do"
        )

    def _last_resort(self, scored: list[Scored], limits: Limits) -> Scored:
        """The smallest subnet, scored as the others are. It joins `scored`."""
        smallest = self.space.smallest()
        known = next((s for s in scored if s.candidate.subnet == smallest), None)
        if known is None:
            candidate = Candidate(smallest, LAST_RESORT, self.search.iterations)
            loss = self.history.loss(smallest)
            if loss is None:
                loss = self.objective.crowd([smallest])[0]
                self.history.scored(smallest, loss, **self._about(candidate, limits))
            known = Scored(candidate, loss)
            scored.append(known)
        return known

    def _found(self, s: Scored, verdict: Verdict | None) -> Found:
        subnet = s.candidate.subnet
        return Found(subnet, self.full(subnet), self.costs(subnet), verdict)


def _failed(verdict: Verdict, limit: ConstraintConfig) -> tuple[float, str]:
    """How many times a limit the upper end of a final measurement's interval is, the worst of the
    limits, and which in words; none where it is within.

    A ratio is of two subnets timed in turns: that the machine has become slower does not matter.
    """
    slower = ""
    if verdict.slowdown > NOTICED:
        times = f"{verdict.slowdown:.3g} times as long"
        slower = f" (the machine takes {times} as during most of the search)"
    bounds = [
        (verdict.high_ms, limit.latency_ms, "ms", slower),
        (verdict.ratio_high, limit.latency_ratio, "of the largest's latency", ""),
    ]
    beyond, words = max(
        (high / most, f"{high:.4g} {unit} at the upper end of its interval, limit {most:.4g}{why}")
        for high, most, unit, why in bounds
        if most
    )
    return beyond, words if beyond > 1 else ""
