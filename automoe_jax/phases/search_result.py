"""Writes what a search has found: subnet files, the front, `result.json`, pictures."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

from automoe_jax.architecture.subnet import from_json, to_json
from automoe_jax.published import subnet_files
from automoe_jax.report import architecture, plots
from automoe_jax.search.evolution import Scored
from automoe_jax.search.limits import Limits
from automoe_jax.system import files

if TYPE_CHECKING:
    from automoe_jax.phases.search import Found, Search

RESULT, FRONT = "result.json", "front.json"


def write(
    search: Search,
    limits: Limits,
    scored: list[Scored],
    on_front: list[Scored],
    found: list[Found],
) -> list[Found]:
    """Writes all files of a finished search into its folder; returns `found`."""
    folder, history = search.folder, search.history
    for i, f in enumerate(found, 1):
        subnet_files.save(f.subnet, folder / f"best_{i}.json")
    first = [s for s in scored if s.candidate.iteration == 0 and s.candidate.origin == "sample"]
    # The random baseline is the first one drawn, not the best of them.
    order = {from_json(line["subnet"]): i for i, line in enumerate(history.lines)}
    first.sort(key=lambda s: order[s.candidate.subnet])
    losses = [s.loss for s in first]
    smallest, largest = search.space.smallest(), search.space.largest()
    corners = {
        "smallest": (search.costs(smallest), search.full(smallest)),
        "largest": (search.costs(largest), search.full(largest)),
    }
    sampled = {s.candidate.subnet: s.loss for s in scored}
    members = [
        {
            "loss": s.loss,
            "costs": search.costs(s.candidate.subnet),
            "subnet": to_json(s.candidate.subnet),
        }
        for s in on_front
    ]
    names = search.front_names
    files.write_json(folder / FRONT, {"version": 1, "over": ["loss", *names], "subnets": members})
    result = {
        "version": 1,
        "algorithm": search.search.algorithm,
        "over": list(names),
        "objective": {"name": search.search.objective, "label": search.objective.label},
        "limits": {x.name: {"most": x.most, "how": x.how(found[0].subnet)} for x in limits.all},
        "best": [
            {
                "file": f"best_{i}.json",
                "loss": f.loss,
                "sample_loss": sampled[f.subnet],
                "costs": f.costs,
                "verified": None if f.verdict is None else dataclasses.asdict(f.verdict),
            }
            for i, f in enumerate(found, 1)
        ],
        "scored": len(scored),
        "recompilations": search.scorer.recompilations,
        "measurements": None if search.latency is None else search.latency.used,
        "random": {
            "count": len(first),
            "median_loss": statistics.median(losses) if losses else None,
            "best_loss": min(losses) if losses else None,
            "first": to_json(first[0].candidate.subnet) if first else None,
        },
        "front": len(members),
        "largest_loss": corners["largest"][1],
        "smallest_loss": corners["smallest"][1],
    }
    marked = {"found": (found[0].costs[names[0]], sampled[found[0].subnet])}
    for (name, (costs, _)), loss in zip(
        corners.items(), search.objective.crowd([smallest, largest]), strict=True
    ):
        marked[name] = (costs[names[0]], loss)
    _pictures(search, limits, found, members, marked)
    files.write_json(folder / RESULT, result)
    return found


def _pictures(search: Search, limits: Limits, found, members, marked):
    folder, x_name = search.folder, search.front_names[0]
    most = next((x.most for x in limits.all if x.name == x_name), None)
    label = search.objective.label
    # Costs as they are known now: as a search goes on, predictions are corrected.
    lines = [
        {**line, "costs": search.costs(from_json(line["subnet"]))} for line in search.history.lines
    ]
    on_front = [(m["costs"][x_name], m["loss"]) for m in members]
    plots.search_plot(lines, x_name, folder / "search.png", most, marked, label, on_front)
    plots.progress_plot(lines, folder / "progress.png", label)
    for i, f in enumerate(found, 1):
        architecture.architecture_card(to_json(f.subnet), f.costs, f.loss, folder / f"best_{i}.png")
    architecture.front_statistics(members, x_name, folder / "front.png", label)
    pairs = [] if search.latency is None else search.latency.predicted_and_measured()
    if len(pairs) > 1:
        plots.predicted_plot(pairs, folder / "latency.png")
