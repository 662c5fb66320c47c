"""How far a supernet's ranking of subnets is that of subnets trained on their own."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet, short_name, to_json
from automoe_jax.config import RunConfig
from automoe_jax.data.prepared import PreparedData
from automoe_jax.model.extract import Params
from automoe_jax.phases import run as phases
from automoe_jax.predictor import scores
from automoe_jax.report import plots
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress
from automoe_jax.training import loop, parallel
from automoe_jax.training.population import PopulationScorer

KIND, RESULT = "ranking", "rank.json"
FEWEST = 4
# Draws for each subnet that is taken, so that they spread over the range.
DRAWS = 40
RESAMPLES = 2000
# Kendall's tau from which on a search may believe a supernet, if its interval is above 0 too.
FIT, SOME = 0.6, 0.3
Correlation = Callable[[np.ndarray, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Trust:
    """Inherited scores against those of training from scratch.

    Attributes:
      tau, tau_low, tau_high: Kendall's rank correlation and its 95 % interval (bootstrap).
      spearman: Spearman's rank correlation.
      offset: mean of inherited less trained loss, nats a token.
      regret: trained loss of the subnet that the supernet ranks first, less the lowest.
      verdict: what follows, in words.
    """

    tau: float
    tau_low: float
    tau_high: float
    spearman: float
    offset: float
    regret: float
    verdict: str


def spread(space: SearchSpace, count: int, seed: int) -> list[Subnet]:
    """Random subnets, evenly over the range of FLOPs that random subnets have.

    Raises:
      UserError: fewer than `FEWEST` are asked for, or the space has fewer than `count`.
    """
    if count < FEWEST:
        raise UserError(f"--subnets is {count}; at least {FEWEST} are needed to compare ranks")
    rng = np.random.default_rng([0x4A4C, seed])
    drawn = list(dict.fromkeys(space.sample(rng) for _ in range(DRAWS * count)))
    if len(drawn) < count:
        raise UserError(f"--subnets is {count}; the space has only {len(drawn)} subnets")
    flops = np.array([complexity.count(s).flops for s in drawn])
    chosen: list[int] = []
    for target in np.linspace(flops.min(), flops.max(), count):
        order = np.argsort(np.abs(flops - target), kind="stable")
        chosen.append(next(int(i) for i in order if int(i) not in chosen))
    return [drawn[i] for i in chosen]


def trust(inherited: np.ndarray, trained: np.ndarray, seed: int = 0) -> Trust:
    """Compares two lists of losses of the same subnets."""
    tau = _ranked(scores.kendall, inherited, trained)
    rows = np.random.default_rng(seed).integers(len(trained), size=(RESAMPLES, len(trained)))
    taus = np.array(
        [
            _ranked(scores.kendall, inherited[r], trained[r])
            for r in rows
            if len(set(r.tolist())) > 2
        ]
    )
    low, high = np.quantile(taus, [0.025, 0.975])
    regret = float(trained[inherited.argmin()] - trained.min())
    if tau >= FIT and low > 0:
        verdict = "fit for the search: better subnets have better inherited losses"
    elif tau >= SOME and low > 0:
        verdict = (
            "fit for a coarse search only: train the supernet longer, or train several finalists"
        )
    else:
        verdict = "not fit for the search: inherited losses do not tell which subnet is better"
    return Trust(
        tau=tau,
        tau_low=float(low),
        tau_high=float(high),
        spearman=_ranked(scores.spearman, inherited, trained),
        offset=float((inherited - trained).mean()),
        regret=regret,
        verdict=verdict,
    )


def _ranked(correlation: Correlation, a: np.ndarray, b: np.ndarray) -> float:
    value = correlation(a, b)
    return 0.0 if np.isnan(value) else value  # all of one value: nothing is ranked


def rank(
    config: RunConfig,
    run: Path,
    out: str,
    data: PreparedData,
    params: Params,
    step: int,
    count: int,
    progress: Progress,
) -> dict[str, Any]:
    """Trains `count` subnets from scratch (group `subnet_training`) and compares.

    Writes `rank.json` and `rank.png` into the folder `out` of the run; a run that was killed goes
    on with the subnet that it was at. The weights of the trained subnets are not kept.
    """
    folder = run / out
    groups = ("seed", "data", "tokenizer", "space", "model", "subnet_training")
    about = {**config.groups(*groups), "supernet_step": step, "subnets": count}
    workdir.claim(folder, KIND, about, any(folder.glob("[0-9]*")))
    if (folder / RESULT).exists():
        return files.read_json(folder / RESULT, "ranking")
    subnets = spread(config.space, count, config.seed)
    scorer = PopulationScorer(
        phases.trained(config, data.tokenizer.vocab_sizes), config.training, params
    )
    inherited = scorer.losses(scorer.prepare(data.valid), subnets)
    trained = []
    for i, subnet in enumerate(subnets, 1):
        done = folder / f"{i}.json"
        if not done.exists():
            progress.note(f"subnet {i} of {count}: {short_name(subnet)}")
            own = f"{out}/{i}"
            phases.train_subnet(config, run, subnet, progress, None, own)
            files.write_json(done, {"version": 1, "loss": _loss(config, run, own, data)})
            shutil.rmtree(run / own)
        trained.append(files.read_json(done, "loss")["loss"])
        progress.note(f"subnet {i}: inherited {inherited[i - 1]:.4f}, trained {trained[-1]:.4f}")
    found = trust(np.array(inherited), np.array(trained))
    result = {
        "version": 1,
        **dataclasses.asdict(found),
        "supernet_step": step,
        "subnet_steps": config.subnet_training.steps,
        "subnets": [
            {
                "inherited": a,
                "trained": b,
                "gflops": complexity.count(s).flops / 1e9,
                "subnet": to_json(s),
            }
            for a, b, s in zip(inherited, trained, subnets, strict=True)
        ],
    }
    title = (
        f"Kendall's tau {found.tau:.2f} [{found.tau_low:.2f}, {found.tau_high:.2f}], Spearman "
        f"{found.spearman:.2f}"
    )
    plots.rank_plot(inherited, trained, title, folder / "rank.png")
    files.write_json(folder / RESULT, result)
    return result


def _loss(config: RunConfig, run: Path, out: str, data: PreparedData) -> float:
    params, subnet, _ = phases.subnet_params(config, run, out)
    what = phases.trained(config, data.tokenizer.vocab_sizes, subnet)
    evaluator = loop.Evaluator(what, data.valid, config.subnet_training, 0)
    return evaluator.loss(parallel.replicate(params), subnet)
