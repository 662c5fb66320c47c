"""The search phase: supernet and limits in; subnet files, history and pictures out.

A search is `explore` (algorithm, scores, measured parents), `verify` (final measurements) and
`summarise` (a frozen `SearchResult`, which `search_result.write` puts into files).
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.config import RunConfig
from automoe_jax.data.tokens import PreparedData
from automoe_jax.latency.records import MEASUREMENTS
from automoe_jax.model.extract import Params
from automoe_jax.phases import search_result, search_scoring, trained_subnets
from automoe_jax.phases.objectives import objective_beam
from automoe_jax.phases.run import SEARCH, Run
from automoe_jax.phases.search_context import SearchContext, begin, limits_of, open_search
from automoe_jax.phases.search_history import HISTORY
from automoe_jax.phases.search_probing import measure_parents, measure_spread, round_share
from automoe_jax.phases.search_result import Found, SearchResult
from automoe_jax.phases.search_verify import verify
from automoe_jax.predictor.estimates import predicted_and_measured
from automoe_jax.search import algorithms
from automoe_jax.search.candidates import Scored, best_first
from automoe_jax.search.limits import Limits
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError


def search(
    run: Run, folder: Path, data: PreparedData, params: Params, step: int | None
) -> dict[str, Any]:
    """Starts or continues a search in `folder`; returns the content of its result file.

    `params` are the supernet's, as NumPy, of training step `step`; None for random weights.
    """
    claim_search(run, folder, step)
    if not (folder / search_result.RESULT).exists():
        run_search(run, folder, data, params)
    return files.read_json(folder / search_result.RESULT, "search result")


def claim_search(run: Run, folder: Path, step: int | None):
    """Starts or continues a search; refuses another config or another supernet.

    `step` is the supernet's; None for random weights.
    """
    config = run.config
    groups = ("seed", "data", "tokenizer", "space", "search", "predictor", "latency")
    # Latency and size follow from these.
    export: dict[str, Any] = {
        "quantize": config.export.quantize,
        "shortlist": config.export.shortlist,
    }
    if config.search.objective != "loss":
        export["objective_beam"] = objective_beam(config.export)
    weights = config.training.weights_for("supernet_weights")
    about = {**config.groups(*groups), **export, "supernet_step": step, **weights}
    about |= _calibrated_by(config, folder)
    scored, measured = ((folder / name).exists() for name in (HISTORY, MEASUREMENTS))
    if not scored:  # nothing was corrected yet, and the next claim may be another's
        (folder / trained_subnets.STORED).unlink(missing_ok=True)
    try:
        workdir.claim(folder, SEARCH, about, begun=scored or measured, added=["objective_beam"])
    except UserError:
        if scored:
            raise
        workdir.read(folder, SEARCH)  # refuses the measurements of anything else
        (folder / MEASUREMENTS).unlink()  # of a search that scored nothing
        workdir.claim(folder, SEARCH, about, begun=False)


def _calibrated_by(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What a manifest says of `search.calibration`: the content of its file, not where it is.

    A finished search does not need the file.
    """
    path = config.search.calibration
    if not path:
        return {}
    if (folder / search_result.RESULT).exists() and not Path(path).exists():
        digest = workdir.settings(folder, SEARCH).get("calibration")
    else:
        digest = trained_subnets.read(path, config).digest
    return {"search": dataclasses.replace(config.search, calibration=""), "calibration": digest}


def run_search(run: Run, folder: Path, data: PreparedData, params: Params) -> SearchResult:
    """Searches with inherited weights.

    Writes into `folder`: `best_1.json` and so on, `history.jsonl`, `measurements.jsonl`,
    `front.json`, pictures, `result.json`. A search that was killed continues. `params` are the
    supernet's, as NumPy.

    Raises:
      UserError: no limit is given.
      InfeasibleError: nothing is within the limits.
    """
    search = open_search(run, folder, data, params)
    try:
        search = begin(search)
        limits = limits_of(search)
        for limit in limits.all:
            how = limit.how(run.config.space.largest())
            run.progress.note(f"limit: {limit.name} <= {limit.upper_bound():.4g} ({how})")
        scored = candidates = explore(search, limits)
        if search.config.algorithm == "nsga2":
            candidates = _front(search, limits, scored, [], search.reserve())
        finalists = search_scoring.rescored(search, limits.within, candidates)
        found, scored = verify(search, limits, finalists, scored)
        result = summarise(search, limits, scored, found)
        search_result.write(result, folder)
        return result
    finally:
        if search.latency is not None and search.latency.prober is not None:
            search.latency.prober.close()


def explore(search: SearchContext, limits: Limits) -> list[Scored]:
    """Runs the algorithm; returns every scored candidate, best first.

    `InfeasibleError` if the algorithm finds nothing within the limits.
    """
    config = search.config
    draws = search.draws(limits.within)
    algorithm = algorithms.make(config, draws, search.front_costs)
    task = search.run.progress.task("searching", config.samples)
    seen: dict[Subnet, Scored] = {}
    iteration = 0
    try:
        while population := algorithm.ask():
            new = [c for c in population if c.subnet not in seen]
            for s in search_scoring.score(search, limits, new, len(seen), task):
                seen[s.subnet] = s
            scored = best_first([seen[c.subnet] for c in population])
            _note_iteration(search, iteration, scored)
            _tell(search, limits, algorithm, scored, config.iterations + 1 - iteration)
            iteration += 1
    finally:
        task.close()
    return best_first(list(seen.values()))


def _note_iteration(search: SearchContext, iteration: int, scored: list[Scored]):
    median = statistics.median(s.loss for s in scored)
    latency = search.latency
    measured = "" if latency is None else f", {latency.used()} latencies measured"
    search.run.progress.note(
        f"iteration {iteration}: {len(scored)} subnets, best {scored[0].loss:.4f}, "
        f"median {median:.4f}{measured}"
    )


def _tell(
    search: SearchContext,
    limits: Limits,
    algorithm: algorithms.Algorithm,
    scored: list[Scored],
    rounds: int,
):
    """Tells the algorithm the scores.

    A verified search spends this round's share of the measurements (of `rounds` that are left) on
    the parents of an evolution, or along the front of NSGA-II.
    """
    latency = search.verified_latency
    share = 0 if latency is None else round_share(latency, search.reserve(), rounds)
    evolves = isinstance(algorithm, algorithms.Evolution)
    if latency is not None and evolves and search.config.limits_latency:
        scored = measure_parents(latency, scored, limits.within, search.config.parents, share)
    algorithm.tell(scored)
    if latency is not None and isinstance(algorithm, algorithms.NSGA2):
        on_front = algorithms.front_of(algorithm.survivors, search.front_costs)
        measure_spread(latency, on_front, share)


def _front(
    search: SearchContext, limits: Limits, scored: list[Scored], found: list[Subnet], reserve: int
) -> list[Scored]:
    """The front of the candidates within the limits.

    A verified NSGA-II measures it, but for `reserve` measurements. Subnets in `found` count as
    within the limits.
    """
    latency = search.verified_latency if search.config.algorithm == "nsga2" else None
    while True:
        members = [s for s in scored if s.subnet in found or limits.within(s.subnet)]
        on_front = algorithms.front_of(members, search.front_costs)
        if latency is None:
            return on_front
        room = int(latency.left()) - reserve
        if room <= 0 or all(latency.is_measured(s.subnet) for s in on_front):
            return on_front
        measure_spread(latency, on_front, room)


def summarise(
    search: SearchContext, limits: Limits, scored: list[Scored], found: list[Found]
) -> SearchResult:
    """Everything that the files of a finished search show."""
    space, latency, history = search.run.config.space, search.latency, search.history
    on_front = _front(search, limits, scored, [f.subnet for f in found], 0)
    order = {from_json(line["subnet"]): i for i, line in enumerate(history.lines)}
    # Some were drawn before measurements told that they are not within the limits.
    samples = [
        s
        for s in scored
        if (s.candidate.iteration, s.candidate.origin) == (0, "sample") and limits.within(s.subnet)
    ]
    corners = {"smallest": space.smallest(), "largest": space.largest()}
    corner_losses = search.objective.sample(list(corners.values()))
    known = None if latency is None else latency.known()
    return SearchResult(
        algorithm=search.config.algorithm,
        objective=search.config.objective,
        label=search.objective.label,
        over=search.front_names(),
        limits={x.name: (x.upper_bound(), x.how(found[0].subnet)) for x in limits.all},
        found=tuple(found),
        # In the order of drawing: the random baseline is the first one, not the best.
        samples=tuple(sorted(samples, key=lambda s: order[s.subnet])),
        front=tuple((s.subnet, s.loss, search.costs(s.subnet)) for s in on_front),
        corners={
            name: Found(subnet, search.full_score(subnet), loss, search.costs(subnet), None)
            for (name, subnet), loss in zip(corners.items(), corner_losses, strict=True)
        },
        scored=len(scored),
        recompilations=search.scorer.recompilations,
        measurements=None if latency is None else latency.used(),
        # Costs as known at the end: predictions are corrected while a search runs.
        lines=tuple(
            {**line, "costs": search.costs(from_json(line["subnet"]))} for line in history.lines
        ),
        predicted_and_measured=tuple([] if known is None else predicted_and_measured(known)),
    )
