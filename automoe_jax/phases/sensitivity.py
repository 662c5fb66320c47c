"""What the choices of a run's space are worth, by many subnets scored with inherited weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.rank import RESULT as RANKING
from automoe_jax.phases.run import LATENCY_MODEL, RANK, Run, claim
from automoe_jax.phases.search_history import HISTORY, ScoreHistory
from automoe_jax.phases.train import SUPERNET_GROUPS
from automoe_jax.phases.weights import supernet_params, target
from automoe_jax.predictor import model as predictor_model
from automoe_jax.report import plots
from automoe_jax.search import sensitivity
from automoe_jax.search.sensitivity import Sensitivity
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.training.population import PopulationScorer, sample_pairs

FOLDER, RESULT, PICTURE = "sensitivity", "sensitivity.json", "sensitivity.png"
_STREAM = 0x5E25  # separates the drawn subnets from others of the seed
_TRIES = 20  # draws for each subnet that is wanted


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is known of a space, and in which unit its costs are."""

    found: Sensitivity
    unit: str  # "ms" or "GFLOPs"
    how: str  # how the costs were got
    ranked: tuple[dict[str, Any], ...]  # effects on inherited and trained losses, of `rank.json`

    def as_json(self) -> dict[str, Any]:
        """The content of the result file."""
        worths = {
            name: [
                {**dataclasses.asdict(w), "gain_per_cost": w.gain_per_cost, "buys": w.buys}
                for w in getattr(self.found, name)
            ]
            for name in ("sides", "layers")
        }
        about = {"unit": self.unit, "how": self.how, "ranked": list(self.ranked)}
        return {"version": 1, **dataclasses.asdict(self.found), **worths, **about}


def analyse(run: Run, count: int, pairs: int) -> Analysis:
    """Scores `count` random subnets on `pairs` validation pairs (0 for all) and analyses them.

    Costs are latencies where the workdir has a latency model, else FLOPs; a ranking in `rank/` is
    shown beside them. Writes scores, result and picture to `sensitivity/`; a killed run continues.
    `UserError` if the subnets are too few.
    """
    data = prepare(run)
    params, step = supernet_params(run, data.tokenizer.vocab_sizes)
    folder = run.path / FOLDER
    settings = {
        **run.config.groups(*SUPERNET_GROUPS),
        "supernet_step": step,
        **run.config.training.weights_for("supernet_weights"),
        "pairs": pairs,
    }
    claim(run, folder, FOLDER, settings, begun=(folder / HISTORY).exists())
    history = ScoreHistory(folder)
    subnets = _draw(run.config.space, count, run.config.seed)
    missing = [s for s in subnets if history.loss(s) is None]
    if missing:
        supernet = target(run.config, data.tokenizer.vocab_sizes)
        scorer = PopulationScorer(supernet, run.config.training, params)
        batches = scorer.prepare(sample_pairs(data.valid, pairs, seed=0))
        task = run.progress.task("scoring", count)
        for start in range(0, len(missing), scorer.at_once):
            group = missing[start : start + scorer.at_once]
            for subnet, loss in zip(group, scorer.losses(batches, group), strict=True):
                history.append(subnet, loss, {})
            task.update(count - len(missing) + start + len(group))
        task.close()
    costs, unit, how = _costs(run.path / LATENCY_MODEL, subnets)
    try:
        found = sensitivity.analyse(subnets, [history.known(s) for s in subnets], costs)
    except ValueError as e:
        raise UserError(f"--subnets is {count}: {e}") from None
    analysis = Analysis(found, unit, how, _ranked(run.path / RANK / RANKING))
    files.write_json(folder / RESULT, analysis.as_json())
    plots.sensitivity_plot(found.sides, unit, *plots.with_svg(folder / PICTURE))
    return analysis


def _ranked(path: Path) -> tuple[dict[str, Any], ...]:
    """The effects that a ranking found; none without one."""
    if not path.exists():
        return ()
    return tuple(files.read_json(path, "ranking").get("effects", ()))


def _draw(space: SearchSpace, count: int, seed: int) -> list[Subnet]:
    """Different random subnets; `UserError` if the space has too few."""
    rng = np.random.default_rng([_STREAM, seed])
    found: dict[Subnet, None] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        found[space.sample(rng)] = None
    if len(found) < count:
        raise UserError(f"--subnets is {count}; only {len(found)} different ones were drawn")
    return list(found)


def _costs(latency_model: Path, subnets: list[Subnet]) -> tuple[list[float], str, str]:
    """Costs, their unit, and how they were got."""
    if latency_model.exists():
        model = predictor_model.load(latency_model)
        return [model.predict(s) for s in subnets], "ms", model.how
    counted = [complexity.count(s).flops / 1e9 for s in subnets]
    how = f"counted, as there is no {latency_model.name}: make it with launch/fit_latency.py"
    return counted, "GFLOPs", how
