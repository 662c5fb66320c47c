"""The inputs of one search, and its limits."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet, to_json
from automoe_jax.config import RunConfig
from automoe_jax.data.tokens import PreparedData
from automoe_jax.decoding.manifest import device
from automoe_jax.latency.config import GOLD_RUNS, LatencyConfig
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.prober import Prober
from automoe_jax.latency.process import thread_count
from automoe_jax.latency.records import LATENCY, MEASUREMENTS, ReplayLog
from automoe_jax.model.extract import Params
from automoe_jax.phases import latency_model, trained_subnets
from automoe_jax.phases.costs import HOW, CountedCosts
from automoe_jax.phases.export import RandomExporter, SupernetExporter
from automoe_jax.phases.objectives import Objective, make_objective
from automoe_jax.phases.run import Run
from automoe_jax.phases.search_history import ScoreHistory
from automoe_jax.phases.search_latency import SearchLatency
from automoe_jax.phases.weights import target
from automoe_jax.published import subnet_files
from automoe_jax.search.candidates import Candidate, InfeasibleError
from automoe_jax.search.config import ConstraintConfig, SearchConfig
from automoe_jax.search.drawing import Draws
from automoe_jax.search.limits import Limit, Limits
from automoe_jax.system.errors import UserError
from automoe_jax.training.population import PopulationScorer

FULL_SCORE = "full_score"


@dataclasses.dataclass(frozen=True)
class SearchContext:
    """Immutable inputs shared by all steps of one search, and the files that it appends to."""

    run: Run
    folder: Path
    history: ScoreHistory
    log: ReplayLog
    counted: CountedCosts
    exporter: SupernetExporter
    scorer: PopulationScorer
    objective: Objective
    latency: SearchLatency | None
    start: Subnet | None

    @property
    def config(self) -> SearchConfig:
        return self.run.config.search

    def costs(self, subnet: Subnet) -> dict[str, float]:
        """Every known cost of a subnet, by name."""
        costs = dict(self.counted(subnet))
        if self.latency is not None:
            costs[LATENCY] = self.latency.ms(subnet)
        return costs

    def front_costs(self, subnet: Subnet) -> tuple[float, ...]:
        """The costs that the front trades off against the score."""
        costs = self.costs(subnet)
        return tuple(costs[name] for name in self.front_names())

    def front_names(self) -> tuple[str, ...]:
        if self.config.algorithm == "nsga2":
            return self.config.front
        if self.latency is not None:
            return (LATENCY,)
        return (next(name for name in HOW if getattr(self.config.constraint, name)),)

    def draws(self, feasible: Callable[[Subnet], bool], *stream: int) -> Draws:
        """Random draws of feasible candidates; another `stream` of numbers draws others."""
        seeds = [0x5EA2C4, self.run.config.seed, self.config.seed, *stream]
        return Draws(
            self.run.config.space,
            np.random.default_rng(seeds),
            self.config,
            feasible,
            # Stratified draws ask for the feasibility of subnets that are never scored.
            stratified=self.latency is None or self.latency.predicts,
            start=self.start,
        )

    def full_score(self, subnet: Subnet) -> float:
        """The score on the whole validation set."""
        full, how = self.objective.full, self.objective.label
        record = self.log.get(FULL_SCORE, subnet, lambda: {"value": full(subnet), "how": how})
        return record["value"]

    @property
    def verified_latency(self) -> SearchLatency | None:
        """`latency` in a search that verifies predictions by measurements, else None."""
        return self.latency if self.config.latency == "verified" else None

    def reserve(self) -> int:
        """Measurements kept for the result."""
        if self.latency is None or not self.config.limits_latency:
            return 0
        return self.latency.policy.reserve


def check(config: RunConfig, vocab_sizes: tuple[int, int]):
    """Checks all of a search that is known before a supernet is trained.

    Raises:
      UserError: no limit is given, or a file that the config names cannot be used, or latency
        cannot be measured here as it says.
      InfeasibleError: the smallest subnet exceeds a limit that is counted.
    """
    search = config.search
    if not (search.constraint.any or search.algorithm == "nsga2"):
        raise UserError(
            "no limit for the search: set one of search.constraint, as "
            "--config.search.constraint.latency_ratio=0.5 (latency_ms, gflops, active_params_m, "
            "params_m and size_mb are the others), or draw a front with "
            "--config.search.algorithm=nsga2"
        )
    _start(config)
    if search.calibration:
        trained_subnets.read(search.calibration, config)
    if search.needs_latency:
        if search.latency_model and search.latency in ("verified", "predicted"):
            latency_model.read(Path(search.latency_model), config, vocab_sizes)
        if search.latency != "predicted":
            check_timing(config.latency)
    counted = CountedCosts(config.space, config.export, vocab_sizes)
    Limits(_counted_limits(config, counted)).require(config.space.smallest())


def check_timing(config: LatencyConfig):
    """`UserError` if this machine lacks the CPUs or the platform to measure on."""
    thread_count(config.threads)
    device(config.platform)


def check_latency(run: Run, vocab_sizes: tuple[int, int]):
    """Times the smallest subnet, with random weights, under a limit in ms that a search verifies.

    `InfeasibleError` where it exceeds the limit: no training would change that.
    """
    search = run.config.search
    if not search.constraint.latency_ms or search.latency == "predicted":
        return
    run.progress.note("timing the smallest subnet")
    exporter, folder = RandomExporter(run.config, vocab_sizes), run.path / ".timing"
    prober, smallest = _prober(run.config, exporter, folder), run.config.space.smallest()
    limit = search.constraint.latency_ms
    try:
        ms = prober.measure_reference(limit).ms
    finally:
        prober.close()
    how = prober.how
    bound = Limit(LATENCY, "latency_ms", lambda: limit, lambda _: ms, lambda _: how)
    _require_latency(Limits((bound,)), smallest)


def _require_latency(limits: Limits, smallest: Subnet):
    """`InfeasibleError` if the smallest subnet, which was timed, exceeds a limit."""
    try:
        limits.require(smallest)
    except InfeasibleError as e:
        busy = "if other programs ran beside it, the same command measures again"
        raise InfeasibleError(f"{e}; {busy}") from None


def _prober(config: RunConfig, exporter: RandomExporter | SupernetExporter, folder: Path) -> Prober:
    write, reference = exporter.export_for_timing, config.space.smallest()
    return Prober(config.latency, _policy(config.search), write, reference, folder)


def _policy(search: SearchConfig) -> MeasurementPolicy:
    return MeasurementPolicy(
        budget=search.measurements if search.latency == "verified" else math.inf,
        keep=search.keep,
        runs=GOLD_RUNS if search.latency == "gold" else search.latency_runs,
    )


def _start(config: RunConfig) -> Subnet | None:
    """The subnet that a local search starts from."""
    if not config.search.start:
        return None
    start = subnet_files.load(config.search.start, config.space.qkv_dim)
    config.space.validate(start)
    return start


def open_search(run: Run, folder: Path, data: PreparedData, params: Params) -> SearchContext:
    """Reads what the search starts from, and times nothing; `UserError` as `check` says."""
    config = run.config
    search, vocab_sizes = config.search, data.tokenizer.vocab_sizes
    check(config, vocab_sizes)
    exporter = SupernetExporter(run, params, "supernet")
    scorer = PopulationScorer(target(config, vocab_sizes), config.training, params)
    log = ReplayLog(folder / MEASUREMENTS)
    latency = _search_latency(run, folder, exporter, log) if search.needs_latency else None
    history, counted = ScoreHistory(folder), CountedCosts(config.space, config.export, vocab_sizes)
    objective = make_objective(run, folder, scorer, exporter, data.valid)
    return SearchContext(
        run, folder, history, log, counted, exporter, scorer, objective, latency, _start(config)
    )


def _search_latency(
    run: Run, folder: Path, exporter: SupernetExporter, log: ReplayLog
) -> SearchLatency:
    config, search, space = run.config, run.config.search, run.config.space
    measures = search.latency != "predicted"
    prober = _prober(config, exporter, folder / ".timing") if measures else None
    limited = search.constraint if search.limits_latency else ConstraintConfig()
    return SearchLatency(
        mode=search.latency,
        log=log,
        prober=prober,
        policy=_policy(search),
        smallest=space.smallest(),
        largest=space.largest(),
        limit_ms=limited.latency_ms or math.inf,
        limit_ratio=limited.latency_ratio or math.inf,
        note=run.progress.note,
    )


def begin(search: SearchContext) -> SearchContext:
    """Measures the subnets that latencies are compared with, then loads or fits the latency model.

    `InfeasibleError` if the smallest subnet exceeds a limit.
    """
    latency, smallest = search.latency, search.run.config.space.smallest()
    if latency is not None:
        latency.begin()
        if latency.prober is not None:  # known without the model, which may take minutes
            try:
                _require_latency(limits_of(search), smallest)
            except InfeasibleError:
                latency.log.clear()
                raise
        if latency.predicts:
            vocab_sizes = search.counted.vocab_sizes
            model = latency_model.latency_model(search.run, search.exporter, vocab_sizes)
            search = dataclasses.replace(search, latency=latency.with_model(model))
    limits_of(search).require(smallest)
    return search


def limits_of(search: SearchContext) -> Limits:
    """The limits of the config: counted costs first, since what they reject is never timed."""
    limits = list(_counted_limits(search.run.config, search.counted))
    latency = search.latency
    if latency is not None and search.config.limits_latency:
        in_ms = latency.upper_bound() == latency.limit_ms
        field = "latency_ms" if in_ms else "latency_ratio"
        limits.append(Limit(LATENCY, field, latency.upper_bound, latency.ms, latency.how))
    return Limits(tuple(limits))


def _counted_limits(config: RunConfig, counted: CountedCosts) -> tuple[Limit, ...]:
    constraint = config.search.constraint

    def limit(name: str, how: str) -> Limit:
        bound = getattr(constraint, name)
        return Limit(name, name, lambda: bound, lambda s: counted(s)[name], lambda _: how)

    return tuple(limit(name, how) for name, how in HOW.items() if getattr(constraint, name))


def describe(search: SearchContext, limits: Limits, candidate: Candidate) -> dict[str, Any]:
    """What the history says of a candidate besides its score."""
    about = {
        "iteration": candidate.iteration,
        "origin": candidate.origin,
        "parents": [to_json(p) for p in candidate.parents],
        "constraints": limits.record(candidate.subnet),
        "costs": search.costs(candidate.subnet),
    }
    objective = search.config.objective
    return about if objective == "loss" else {**about, "objective": objective}
