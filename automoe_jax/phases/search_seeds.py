"""How far searches with different seeds differ (the paper's Table 8)."""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import Run, each_part
from automoe_jax.phases.search import search
from automoe_jax.phases.search_result import FRONT, RESULT
from automoe_jax.phases.weights import searched_params
from automoe_jax.report import plots
from automoe_jax.search.front import hypervolume
from automoe_jax.system import files
from automoe_jax.system.errors import UserError


def search_seeds(
    run: Run, out: str, seeds: Sequence[int], *, untrained: bool = False
) -> dict[str, Any]:
    """Searches once per seed, each in `seed_N` under the folder `out`, and compares the fronts.

    The run's workers search; `UserError` if they are remote and the search measures latencies.
    With `untrained`, the supernet has random weights.
    """
    if run.workers.remote and run.config.search.needs_latency:
        raise UserError(
            "--ray: this search measures latencies, which must be those of this machine; leave "
            "--ray out, or limit FLOPs or parameters"
        )
    for i, _ in each_part(run, functools.partial(_search, out, untrained), seeds):
        run.progress.note(f"seed {seeds[i]} is done")
    return compare(run.path / out, seeds)


def _search(out: str, untrained: bool, run: Run, seed: int):
    settings = dataclasses.replace(run.config.search, seed=seed)
    own = dataclasses.replace(run, config=dataclasses.replace(run.config, search=settings))
    data = prepare(own)
    params, step = searched_params(own, data.tokenizer.vocab_sizes, untrained=untrained)
    search(own, run.path / out / f"seed_{seed}", data, params, step)


def compare(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Reads the results in `seed_N` under a folder; writes `seeds.json` and `seeds.png` there.

    Returns per seed the best score, its cost, the size of its front and the front's hypervolume as
    a share of that of all fronts together, up to the worst point of any; mean and standard
    deviation of the best scores.
    """
    fronts: dict[int, list[tuple[float, float]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    cost, label = "", ""
    for seed in seeds:
        own = folder / f"seed_{seed}"
        result = files.read_json(own / RESULT, "search result")
        front = files.read_json(own / FRONT, "front")
        cost, label = front["over"][1], result["objective"]["label"]
        fronts[seed] = [(x["costs"][cost], x["loss"]) for x in front["subnets"]]
        best = result["best"][0]
        row = {"best": best["loss"], "cost_of_best": best["costs"][cost]}
        rows[str(seed)] = {**row, "front": len(front["subnets"])}
    points = [p for front in fronts.values() for p in front]
    corner = (1.01 * max(p[0] for p in points), 1.01 * max(p[1] for p in points))
    whole = hypervolume(points, corner)
    for seed, front in fronts.items():
        rows[str(seed)]["hypervolume_share"] = hypervolume(front, corner) / whole
    bests = [row["best"] for row in rows.values()]
    compared = {
        "version": 1,
        "cost": cost,
        "objective": label,
        "seeds": rows,
        "best_mean": statistics.mean(bests),
        "best_std": statistics.stdev(bests) if len(bests) > 1 else 0.0,
    }
    files.write_json(folder / "seeds.json", compared)
    named = {f"seed {seed}": front for seed, front in fronts.items()}
    plots.fronts_plot(named, cost, folder / "seeds.png", label)
    return compared
