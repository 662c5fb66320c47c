"""Compares the supernet's ranking of subnets with that of subnets trained from scratch."""

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet, short_name, to_json
from automoe_jax.data.tokens import PreparedData
from automoe_jax.decoding import evaluation
from automoe_jax.decoding.translator import Translator
from automoe_jax.model.extract import Params
from automoe_jax.phases.export import SupernetExporter, export_params
from automoe_jax.phases.prepare import corpus_split, prepare
from automoe_jax.phases.report import beam_size
from automoe_jax.phases.run import EXPORT, Run, claim, each_part
from automoe_jax.phases.train import SUBNET_GROUPS, train_subnet
from automoe_jax.phases.weights import subnet_params, target
from automoe_jax.predictor import scores
from automoe_jax.report import plots
from automoe_jax.search.sensitivity import effects
from automoe_jax.system import files, workdir
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


@dataclasses.dataclass(frozen=True)
class Compared:
    """What a ranking compares.

    Attributes:
      count: subnets that are trained.
      sentences: of validation text that each translates, with both weights; 0 for losses alone.
      trained_in: folder of another ranking, whose trained subnets are taken; empty to train.
    """

    count: int
    sentences: int = 0
    trained_in: str = ""


def rank(
    run: Run, out: str, data: PreparedData, params: Params, step: int, compared: Compared
) -> dict[str, Any]:
    """Trains subnets from scratch and compares their losses, and BLEU, with inherited ones.

    The inherited weights are the supernet's `params` of training step `step`. Writes `rank.json`,
    whose content it returns, and `rank.png` into the folder `out` of the workdir. A killed run
    continues with the subnet that it was at. The trained weights are not kept.
    """
    config, folder = run.config, run.path / out
    home = compared.trained_in or out
    _claim(run, out, step, compared)
    if (folder / RESULT).exists():
        return files.read_json(folder / RESULT, "ranking")
    subnets = spread(config.space, compared.count, config.seed)
    supernet = target(config, data.tokenizer.vocab_sizes)
    scorer = PopulationScorer(supernet, config.training, params)
    inherited = scorer.losses(scorer.prepare(data.valid), subnets)
    done = _train_all(run, home, subnets, compared.sentences)
    trained = [own["loss"] for own in done]
    found = trust(np.array(inherited), np.array(trained))
    rows = [
        {"inherited": a, "trained": b, "gflops": complexity.count(s).flops / 1e9,
         "subnet": to_json(s)}
        for a, b, s in zip(inherited, trained, subnets, strict=True)
    ]  # fmt: skip
    bleu = {}
    if compared.sentences:
        exporter = SupernetExporter(run, params, "for comparison")
        own = _inherited_bleu(exporter, folder / f".{EXPORT}", subnets, compared.sentences)
        for row, a, b in zip(rows, own, done, strict=True):
            row |= {"bleu_inherited": a, "bleu_trained": b["bleu"]}
        bleu = _bleu_of(own, [b["bleu"] for b in done], compared.sentences)
    title = (
        f"Kendall's tau {found.tau:.2f} [{found.tau_low:.2f}, {found.tau_high:.2f}], Spearman "
        f"{found.spearman:.2f}"
    )
    plots.rank_plot(inherited, trained, title, folder / "rank.png")
    steps = {"supernet_step": step, "subnet_steps": config.subnet_training.steps}
    changes = [dataclasses.asdict(e) for e in effects(subnets, inherited, trained)]
    result = {
        "version": 1, **dataclasses.asdict(found), **steps, "bleu": bleu, "effects": changes,
        "subnets": rows,
    }  # fmt: skip
    files.write_json(folder / RESULT, result)
    return result


def _claim(run: Run, out: str, step: int, compared: Compared):
    """Claims the folder of a ranking, and checks the one whose trained subnets it takes."""
    config = run.config
    trained = {
        **config.groups(*SUBNET_GROUPS), "subnets": compared.count,
        **config.subnet_training.weights_for("subnet_weights"),
        **({"sentences": compared.sentences} if compared.sentences else {}),
    }  # fmt: skip
    if compared.trained_in:
        advice = "give the same settings of subnets, or leave --trained_in out"
        workdir.check(run.path / compared.trained_in, "ranking", trained, advice)
    settings = {
        **trained, "supernet_step": step, **config.training.weights_for("supernet_weights")
    }  # fmt: skip
    begun = any((run.path / out).glob("[0-9]*")) or (run.path / out / RESULT).exists()
    claim(run, out, "ranking", settings, begun=begun)


def _inherited_bleu(
    exporter: SupernetExporter, folder: Path, subnets: list[Subnet], sentences: int
) -> list[float]:
    """Validation BLEU of subnets with inherited weights, each exported into `folder`."""
    run = exporter.run
    found = []
    for i, subnet in enumerate(subnets, 1):
        exporter.export(subnet, folder, (beam_size(run.config),))
        found.append(_bleu(run, folder, sentences))
        run.progress.note(f"subnet {i}: inherited BLEU {found[-1]:.2f}")
    return found


def _bleu(run: Run, export: Path, sentences: int) -> float:
    """BLEU of an export on validation text; removes the export."""
    texts = evaluation.read_split(corpus_split(run, "valid"), sentences)
    found, _ = evaluation.evaluate(Translator.load(export), *texts, beam_size(run.config))
    shutil.rmtree(export)
    return found.bleu


def _bleu_of(inherited: list[float], trained: list[float], sentences: int) -> dict[str, float]:
    """How far inherited BLEU is from trained, and how alike both rank the subnets."""
    one, other = np.array(inherited), np.array(trained)
    return {
        "sentences": sentences,
        "mean_difference": float(np.abs(one - other).mean()),
        "tau": _or_zero(scores.kendall(one, other)),
    }


def _train_all(run: Run, out: str, subnets: list[Subnet], sentences: int) -> list[dict[str, float]]:
    """Loss, and BLEU, of subnets trained from scratch: files N.json in the folder `out`."""
    done = [run.path / out / f"{i}.json" for i in range(1, len(subnets) + 1)]
    missing = [i for i, path in enumerate(done) if not path.exists()]
    parts = ((f"{out}/{i + 1}", subnets[i]) for i in _noted(run, missing, subnets))
    work = functools.partial(_train_one, sentences)
    for nth, found in each_part(run, work, parts):
        i = missing[nth]
        files.write_json(done[i], {"version": 1, **found})
        shutil.rmtree(run.path / out / str(i + 1))
        bleu = f", BLEU {found['bleu']:.2f}" if sentences else ""
        run.progress.note(f"subnet {i + 1}: trained {found['loss']:.4f}{bleu}")
    return [files.read_json(path, "loss") for path in done]


def _noted(run: Run, missing: list[int], subnets: list[Subnet]) -> Iterator[int]:
    for i in missing:
        run.progress.note(f"subnet {i + 1} of {len(subnets)}: {short_name(subnets[i])}")
        yield i


def _train_one(sentences: int, run: Run, part: tuple[str, Subnet]) -> dict[str, float]:
    out, subnet = part
    train_subnet(run, subnet, None, out)
    found = {"loss": trained_loss(run, out)}
    if sentences:
        params, _, _ = subnet_params(run, out)
        export = run.path / out / EXPORT
        export_params(run, params, subnet, export, "for comparison")
        found["bleu"] = _bleu(run, export, sentences)
    return found


def trained_loss(run: Run, out: str) -> float:
    """Validation loss of the trained subnet in the folder `out` of the workdir."""
    data = prepare(run)
    params, subnet, _ = subnet_params(run, out)
    own = target(run.config, data.tokenizer.vocab_sizes, subnet)
    evaluator = Evaluator(own, data.valid, run.config.subnet_training, 0)
    return evaluator.loss(parallel.replicate(params), subnet)
