"""Compares the supernet's ranking of subnets with that of subnets trained from scratch."""

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet, short_name, to_json
from automoe_jax.data.tokens import PreparedData
from automoe_jax.model.extract import Params
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import Run, claim, each_part
from automoe_jax.phases.train import SUBNET_GROUPS, train_subnet
from automoe_jax.phases.weights import subnet_params, target
from automoe_jax.predictor import scores
from automoe_jax.report import plots
from automoe_jax.search.sensitivity import effects
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.training import parallel
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.population import PopulationScorer

RESULT = "rank.json"
FEWEST = 4
DRAWS = 40  # random subnets drawn for each one that is trained
RESAMPLES = 2000  # of the bootstrap
# Least Kendall's tau for a search and for a coarse search; its interval must be above 0 too.
FIT, FIT_COARSE = 0.6, 0.3


@dataclasses.dataclass(frozen=True)
class Trust:
    """Agreement of inherited losses with those of training from scratch."""

    tau: float  # Kendall's rank correlation, and its 95 % interval (bootstrap)
    tau_low: float
    tau_high: float
    spearman: float  # Spearman's rank correlation
    offset: float  # mean of inherited less trained loss, nats a token
    regret: float  # trained loss of the subnet that the supernet ranks first, less the lowest
    verdict: str  # whether the supernet is fit for a search


def spread(space: SearchSpace, count: int, seed: int) -> list[Subnet]:
    """Random subnets, spread evenly over the range of FLOPs of `DRAWS * count` random subnets.

    `UserError` if `count` is below `FEWEST`, or the space has fewer subnets.
    """
    if count < FEWEST:
        raise UserError(f"--subnets is {count}; at least {FEWEST} are needed to compare ranks")
    rng = np.random.default_rng([0x4A4C, seed])
    drawn = list(dict.fromkeys(space.sample(rng) for _ in range(DRAWS * count)))
    if len(drawn) < count:
        raise UserError(f"--subnets is {count}; the space has only {len(drawn)} subnets")
    flops = np.array([complexity.count(s).flops for s in drawn])
    chosen: list[int] = []
    for wanted in np.linspace(flops.min(), flops.max(), count):
        order = np.argsort(np.abs(flops - wanted), kind="stable")
        chosen.append(next(int(i) for i in order if int(i) not in chosen))
    return [drawn[i] for i in chosen]


def trust(inherited: np.ndarray, trained: np.ndarray, seed: int = 0) -> Trust:
    """Compares inherited and trained losses of the same subnets."""
    tau = _or_zero(scores.kendall(inherited, trained))
    rows = np.random.default_rng(seed).integers(len(trained), size=(RESAMPLES, len(trained)))
    resampled = [
        _or_zero(scores.kendall(inherited[r], trained[r])) for r in rows if len(set(r.tolist())) > 2
    ]
    low, high = map(float, np.quantile(resampled, [0.025, 0.975]))
    regret = float(trained[inherited.argmin()] - trained.min())
    if tau >= FIT and low > 0:
        verdict = "fit for the search: better subnets have better inherited losses"
    elif tau >= FIT_COARSE and low > 0:
        verdict = (
            "fit for a coarse search only: train the supernet longer, or train several finalists"
        )
    else:
        verdict = "not fit for the search: inherited losses do not tell which subnet is better"
    spearman = _or_zero(scores.spearman(inherited, trained))
    offset = float((inherited - trained).mean())
    return Trust(tau, low, high, spearman, offset, regret, verdict)


def _or_zero(correlation: float) -> float:
    """Rank correlation is undefined (NaN) if all values are equal."""
    return 0.0 if np.isnan(correlation) else correlation


def rank(
    run: Run, out: str, data: PreparedData, params: Params, step: int, count: int
) -> dict[str, Any]:
    """Trains `count` subnets from scratch and compares their losses with inherited ones.

    The inherited weights are the supernet's `params` of training step `step`. Writes `rank.json`,
    whose content it returns, and `rank.png` into the folder `out` of the workdir. A killed run
    continues with the subnet that it was at. The trained weights are not kept.
    """
    config, folder = run.config, run.path / out
    settings = {
        **config.groups(*SUBNET_GROUPS), "supernet_step": step, "subnets": count,
        **config.training.weights_for("supernet_weights"),
        **config.subnet_training.weights_for("subnet_weights"),
    }  # fmt: skip
    claim(run, out, "ranking", settings, begun=any(folder.glob("[0-9]*")))
    if (folder / RESULT).exists():
        return files.read_json(folder / RESULT, "ranking")
    subnets = spread(config.space, count, config.seed)
    supernet = target(config, data.tokenizer.vocab_sizes)
    scorer = PopulationScorer(supernet, config.training, params)
    inherited = scorer.losses(scorer.prepare(data.valid), subnets)
    trained = _train_all(run, out, subnets)
    found = trust(np.array(inherited), np.array(trained))
    rows = [
        {"inherited": a, "trained": b, "gflops": complexity.count(s).flops / 1e9,
         "subnet": to_json(s)}
        for a, b, s in zip(inherited, trained, subnets, strict=True)
    ]  # fmt: skip
    title = (
        f"Kendall's tau {found.tau:.2f} [{found.tau_low:.2f}, {found.tau_high:.2f}], Spearman "
        f"{found.spearman:.2f}"
    )
    plots.rank_plot(inherited, trained, title, folder / "rank.png")
    steps = {"supernet_step": step, "subnet_steps": config.subnet_training.steps}
    changes = [dataclasses.asdict(e) for e in effects(subnets, inherited, trained)]
    result = {
        "version": 1, **dataclasses.asdict(found), **steps, "effects": changes, "subnets": rows
    }  # fmt: skip
    files.write_json(folder / RESULT, result)
    return result


def _train_all(run: Run, out: str, subnets: list[Subnet]) -> list[float]:
    """The losses of subnets trained from scratch: files N.json in the folder `out`."""
    done = [run.path / out / f"{i}.json" for i in range(1, len(subnets) + 1)]
    missing = [i for i, path in enumerate(done) if not path.exists()]
    parts = ((f"{out}/{i + 1}", subnets[i]) for i in _noted(run, missing, subnets))
    for nth, loss in each_part(run, _train_one, parts):
        i = missing[nth]
        files.write_json(done[i], {"version": 1, "loss": loss})
        shutil.rmtree(run.path / out / str(i + 1))
        run.progress.note(f"subnet {i + 1}: trained {loss:.4f}")
    return [files.read_json(path, "loss")["loss"] for path in done]


def _noted(run: Run, missing: list[int], subnets: list[Subnet]) -> Iterator[int]:
    for i in missing:
        run.progress.note(f"subnet {i + 1} of {len(subnets)}: {short_name(subnets[i])}")
        yield i


def _train_one(run: Run, part: tuple[str, Subnet]) -> float:
    out, subnet = part
    train_subnet(run, subnet, None, out)
    return trained_loss(run, out)


def trained_loss(run: Run, out: str) -> float:
    """Validation loss of the trained subnet in the folder `out` of the workdir."""
    data = prepare(run)
    params, subnet, _ = subnet_params(run, out)
    own = target(run.config, data.tokenizer.vocab_sizes, subnet)
    evaluator = Evaluator(own, data.valid, run.config.subnet_training, 0)
    return evaluator.loss(parallel.replicate(params), subnet)
