"""The search phase: supernet and limits in, subnet files, history and plot out."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax import complexity, files, phases, subnet_files
from automoe_jax.config import RunConfig
from automoe_jax.errors import UserError
from automoe_jax.extract import Params
from automoe_jax.prepare import Prepared
from automoe_jax.progress import Progress
from automoe_jax.report.plots import search_plot
from automoe_jax.search.evolution import Candidate, InfeasibleError, Scored, search
from automoe_jax.search.history import History
from automoe_jax.search.limits import Limit, Limits
from automoe_jax.subnet import Subnet, from_json, short_name, to_json
from automoe_jax.timing import SubnetTimer, Verdict
from automoe_jax.training import loop, parallel

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Found:
    """A subnet that the search returns."""

    subnet: Subnet
    loss: float
    costs: dict[str, float]
    verdict: Verdict | None  # where latency is limited


def run_search(
    config: RunConfig,
    run: Path,
    folder: Path,
    data: Prepared,
    params: Params,
    progress: Progress,
) -> list[Found]:
    """Searches with inherited weights; best first.

    Writes into `folder`: `best_1.json` and on, `history.jsonl`, `measurements.jsonl`, `search.png`,
    `result.json`. A search that was killed goes on where it was.

    Args:
      config: groups `search`, `constraint`, `latency`.
      run: workdir.
      folder: of this search, `search/` in the workdir by default.
      data: validation pairs to score on.
      params: of the supernet, as NumPy.
      progress: told of it.

    Raises:
      UserError: no limit is given.
      InfeasibleError: nothing within the limits.
    """
    constraint = config.constraint
    if not (constraint.latency_ms or constraint.latency_ratio or constraint.gflops):
        raise UserError(
            "no limit for the search: set constraint.latency_ms, constraint.latency_ratio or "
            "constraint.gflops"
        )
    history = History(folder)
    space = config.space
    timer = None
    try:
        if constraint.latency_ms or constraint.latency_ratio:
            inherited = phases.Inherited(config, run, params, "supernet")
            known = history.value("latency_ms", space.smallest())
            timer = SubnetTimer(
                config.latency,
                config.search.latency_runs,
                inherited.export_for_timing,
                space.smallest(),
                known[0] if known else None,
                folder / ".timing",
            )
        return _search(config, folder, history, timer, data, params, progress)
    finally:
        if timer is not None:
            timer.close()


def _gflops(subnet: Subnet) -> float:
    return complexity.count(subnet).flops / 1e9


def _limits(config: RunConfig, history: History, timer: SubnetTimer | None) -> list[Limit]:
    """The limits of the config; a ratio becomes a number of ms here."""
    constraint = config.constraint
    limits = []
    if constraint.gflops:
        how = "counted: 30 tokens in and out, uniform routing"
        limits.append(Limit("gflops", constraint.gflops, _gflops, how, "gflops"))
    if timer is not None:
        most, field = constraint.latency_ms, "latency_ms"
        limit = Limit("latency_ms", most, timer.measure, timer.how, field)
        if constraint.latency_ratio:
            largest = Limits([limit], history).value(limit, config.space.largest())
            limit = dataclasses.replace(
                limit, most=constraint.latency_ratio * largest, field="latency_ratio"
            )
        limits.append(limit)
    return limits


def _search(
    config: RunConfig,
    folder: Path,
    history: History,
    timer: SubnetTimer | None,
    data: Prepared,
    params: Params,
    progress: Progress,
) -> list[Found]:
    space = config.space
    limits_list = _limits(config, history, timer)
    limits = Limits(limits_list, history)
    for limit in limits_list:
        progress.note(f"limit: {limit.name} <= {limit.most:.4g} ({limit.how})")
    limits.require(space.smallest())

    what = phases.trained(config, data.tokenizer.vocab_sizes)
    evaluator = loop.Evaluator(what, data.valid, config.training, config.search.eval_pairs)
    replicated = parallel.replicate(params)

    def loss_of(subnet: Subnet) -> float:
        return evaluator.loss(replicated, subnet)

    task = progress.task("searching", config.search.samples)
    counts = {"drawn": 0, "within": 0, "best": float("inf")}

    def score(candidates: list[Candidate]) -> list[float]:
        losses = []
        for candidate in candidates:
            loss = history.loss(candidate.subnet)
            if loss is None:
                loss = loss_of(candidate.subnet)
                history.scored(candidate.subnet, loss, **_about(candidate, limits))
            counts["best"] = min(counts["best"], loss)
            losses.append(loss)
            task.update(counts["within"], best=f"{counts['best']:.4f}")
        return losses

    def told(iteration: int, scored: list[Scored]):
        median = statistics.median(s.loss for s in scored)
        progress.note(
            f"iteration {iteration}: {len(scored)} subnets, best loss {scored[0].loss:.4f}, "
            f"median {median:.4f}"
        )

    def within(subnet: Subnet) -> bool:
        inside = limits.within(subnet)
        counts["drawn"] += 1
        counts["within"] += inside
        task.update(counts["within"], drawn=counts["drawn"])
        return inside

    rng = np.random.default_rng([0x5EA2C4, config.seed])
    try:
        scored = search(space, config.search, rng, within, score, told)
    finally:
        task.close()
    found = _verify(config, scored, limits, timer, progress)
    _write(config, folder, found, scored, history, limits_list, loss_of)
    return found


def _about(candidate: Candidate, limits: Limits) -> dict[str, Any]:
    """What the history says of a candidate besides its loss."""
    return {
        "iteration": candidate.iteration,
        "origin": candidate.origin,
        "parents": [to_json(p) for p in candidate.parents],
        "constraints": limits.about(candidate.subnet),
        "costs": _costs(candidate.subnet, limits),
    }


def _costs(subnet: Subnet, limits: Limits) -> dict[str, float]:
    """FLOPs and whatever else is limited, by name."""
    return {
        "gflops": _gflops(subnet),
        **{name: about["value"] for name, about in limits.about(subnet).items()},
    }


def _verify(
    config: RunConfig,
    scored: list[Scored],
    limits: Limits,
    timer: SubnetTimer | None,
    progress: Progress,
) -> list[Found]:
    """The best `keep` that also pass a final measurement beside the largest subnet."""
    found: list[Found] = []
    constraint, space = config.constraint, config.space
    for s in scored:
        if len(found) == config.search.keep:
            break
        subnet = s.candidate.subnet
        verdict = None
        if timer is not None:
            verdict = timer.verify(subnet, space.largest())
            value, most, unit = verdict.latency.mean_ms, constraint.latency_ms, "ms"
            if constraint.latency_ratio:
                # The upper end of its interval: so that it also holds when measured again.
                value, most = verdict.ratio_high, constraint.latency_ratio
                unit = "of the largest subnet's latency at the upper end of its interval"
            if value > most:
                progress.note(
                    f"{short_name(subnet)} (loss {s.loss:.4f}) fails the final measurement: "
                    f"{value:.3g} {unit}, limit {most:.3g}; going on to the next"
                )
                continue
        found.append(Found(subnet, s.loss, _costs(subnet, limits), verdict))
    if not found:
        raise InfeasibleError(
            f"none of the {len(scored)} candidates passed the final latency measurement; raise "
            "the limit a little or search longer"
        )
    return found


def _write(config, folder, found, scored, history, limits_list, loss_of):
    for i, f in enumerate(found, 1):
        subnet_files.save(f.subnet, folder / f"best_{i}.json")
    space = config.space
    first = [s for s in scored if s.candidate.iteration == 0 and s.candidate.origin == "sample"]
    # The random baseline is the first one drawn, not the best of them.
    order = {from_json(line["subnet"]): i for i, line in enumerate(history.lines)}
    first.sort(key=lambda s: order[s.candidate.subnet])
    losses = [s.loss for s in first]
    result = {
        "version": 1,
        "limits": {x.name: {"most": x.most, "how": x.how} for x in limits_list},
        "best": [
            {
                "file": f"best_{i}.json",
                "loss": f.loss,
                "costs": f.costs,
                "verified": None if f.verdict is None else dataclasses.asdict(f.verdict),
            }
            for i, f in enumerate(found, 1)
        ],
        "scored": len(scored),
        "random": {
            "count": len(first),
            "median_loss": statistics.median(losses) if losses else None,
            "best_loss": min(losses) if losses else None,
            "first": to_json(first[0].candidate.subnet) if first else None,
        },
        "largest_loss": loss_of(space.largest()),
        "smallest_loss": loss_of(space.smallest()),
    }
    x_name = "latency_ms" if any(x.name == "latency_ms" for x in limits_list) else "gflops"
    most = next((x.most for x in limits_list if x.name == x_name), None)
    marked = {"found": (found[0].costs[x_name], found[0].loss)}
    search_plot(history.lines, x_name, folder / "search.png", most, marked)
    files.write_json(folder / RESULT, result)
