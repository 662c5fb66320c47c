"""Compares the supernet's ranking of subnets with that of subnets trained from scratch."""

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet, short_name, to_json
from automoe_jax.data.tokens import PreparedData
from automoe_jax.decoding import evaluation
from automoe_jax.model.extract import Params
from automoe_jax.phases.export import SupernetExporter, export_params, with_export
from automoe_jax.phases.objectives import scored
from automoe_jax.phases.prepare import corpus_split, prepare
from automoe_jax.phases.report import beam_size
from automoe_jax.phases.run import EXPORT, Run, claim, each_part
from automoe_jax.phases.train import SUBNET_GROUPS, train_subnet
from automoe_jax.phases.weights import subnet_params, target
from automoe_jax.predictor import scores
from automoe_jax.report import plots
from automoe_jax.search import calibration
from automoe_jax.search.sensitivity import effects
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.training import parallel
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.population import PopulationScorer

RESULT = "rank.json"
_INHERITED = "inherited_bleu.jsonl"
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


def _corrected(
    subnets: list[Subnet], inherited: Sequence[float], trained: Sequence[float]
) -> dict[str, float]:
    """How well the others correct each subnet's inherited loss: what a search gains by them.

    Kendall's tau with the trained losses, and standard deviations of the differences from them
    with and without the correction. Empty for too few subnets, or losses that are not finite.
    """
    truth, uncorrected = np.array(trained), np.array(inherited)
    if len(subnets) <= calibration.FEWEST or not np.isfinite([truth, uncorrected]).all():
        return {}
    corrected = np.array(calibration.left_out(subnets, inherited, trained))
    return {
        "tau": _or_zero(scores.kendall(corrected, truth)),
        "error": float((corrected - truth).std()),
        "error_inherited": float((uncorrected - truth).std()),
    }


def _or_zero(correlation: float) -> float:
    """Rank correlation is undefined (NaN) if all values are equal."""
    return 0.0 if np.isnan(correlation) else correlation


@dataclasses.dataclass(frozen=True)
class RankingSettings:
    """How supernet and subnets are compared.

    Attributes:
      count: subnets that are trained.
      sentences: of validation text that each translates, with both weights; 0 for losses alone.
      trained_in: folder of a finished ranking whose trained subnets are taken; empty to train.
    """

    count: int
    sentences: int = 0
    trained_in: str = ""


def rank(
    run: Run, out: str, data: PreparedData, params: Params, step: int, settings: RankingSettings
) -> dict[str, Any]:
    """Trains subnets from scratch and compares their losses, and BLEU, with inherited ones.

    The inherited weights are the supernet's `params` of training step `step`. Writes `rank.json`,
    whose content it returns, and `rank.png` into the folder `out` of the workdir. A killed run
    continues with the subnet that it was at. The trained weights are not kept.
    """
    config, folder = run.config, run.path / out
    _claim(run, out, step, settings)
    if (folder / RESULT).exists():
        return files.read_json(folder / RESULT, "ranking")
    subnets = spread(config.space, settings.count, config.seed)
    supernet = target(config, data.tokenizer.vocab_sizes)
    scorer = PopulationScorer(supernet, config.training, params)
    inherited = scorer.losses(scorer.prepare(data.valid), subnets)
    text, bleu = None, {}
    if settings.sentences:
        text = evaluation.read_split(corpus_split(run, "valid"), settings.sentences)
        exporter = SupernetExporter(run, params, "inherited, for comparison")
        bleu["inherited"] = _inherited_bleu(exporter, folder, subnets, text)
    results = _trained(run, settings.trained_in or out, subnets, text)
    trained = [result["loss"] for result in results]
    if text is not None:
        bleu["trained"] = [result["bleu"] for result in results]
    found = trust(np.array(inherited), np.array(trained))
    title = (
        f"Kendall's tau {found.tau:.2f} [{found.tau_low:.2f}, {found.tau_high:.2f}], Spearman "
        f"{found.spearman:.2f}"
    )
    plots.rank_plot(inherited, trained, title, folder / "rank.png")
    rows = [
        {
            "inherited": inherited[i],
            "trained": trained[i],
            **{f"bleu_{kind}": values[i] for kind, values in bleu.items()},
            "gflops": complexity.count(subnet).flops / 1e9,
            "subnet": to_json(subnet),
        }
        for i, subnet in enumerate(subnets)
    ]
    result = {
        "version": 1,
        **dataclasses.asdict(found),
        "supernet_step": step,
        "subnet_steps": config.subnet_training.steps,
        "bleu": {} if text is None else _agreement(**bleu, sentences=len(text[0])),
        "corrected": _corrected(subnets, inherited, trained),
        "effects": [dataclasses.asdict(e) for e in effects(subnets, inherited, trained)],
        "subnets": rows,
    }
    files.write_json(folder / RESULT, result)
    return result


def _claim(run: Run, out: str, step: int, settings: RankingSettings):
    """Claims the folder of a ranking, and checks the one whose trained subnets it takes."""
    config, folder = run.config, run.path / out
    trained = {
        **config.groups(*SUBNET_GROUPS),
        "subnets": settings.count,
        **config.subnet_training.weights_for("subnet_weights"),
    }
    if settings.sentences:
        how = {"sentences": settings.sentences, "beam_size": beam_size(config)}
        trained |= {"bleu": how, **config.groups("export")}
    if settings.trained_in:
        other = run.path / settings.trained_in
        if not (other / RESULT).exists():
            raise UserError(
                f"--trained_in={settings.trained_in}: {other} has no finished ranking; finish it "
                "first, by the command that began it, or leave --trained_in out"
            )
        free = {"supernet_step", "supernet_weights"}
        if not settings.sentences:
            free |= {"bleu", "export"}
        advice = "give --subnets, --bleu and the settings of subnets as there"
        workdir.check(other, "ranking", trained, free, f"{advice}, or leave --trained_in out")
    begun = [RESULT, _INHERITED, "[0-9]*"]
    content = {
        **trained,
        "supernet_step": step,
        **config.training.weights_for("supernet_weights"),
    }
    claim(run, out, "ranking", content, begun=any(any(folder.glob(x)) for x in begun))


Text = tuple[Sequence[str], Sequence[str]]  # sources and references


def _inherited_bleu(
    exporter: SupernetExporter, folder: Path, subnets: list[Subnet], text: Text
) -> list[float]:
    """BLEU of subnets with inherited weights: lines of a file in the ranking's folder."""
    run, path = exporter.run, folder / _INHERITED
    beam, export = beam_size(run.config), folder / f".{EXPORT}"
    known = [line["bleu"] for line in files.read_json_lines(path)]
    for i, subnet in enumerate(subnets[len(known) :], len(known) + 1):
        exporter.export(subnet, export, (beam,))
        known.append(scored(export, *text, beam).bleu)
        files.append_json_line(path, {"subnet": i, "bleu": known[-1]})
        run.progress.note(f"subnet {i}: inherited BLEU {known[-1]:.2f}")
    return known


def _agreement(inherited: list[float], trained: list[float], sentences: int) -> dict[str, float]:
    """How far inherited BLEU is from trained, and how alike both rank the subnets."""
    one, other = np.array(inherited), np.array(trained)
    return {
        "sentences": sentences,
        "mean_difference": float(np.abs(one - other).mean()),
        "tau": _or_zero(scores.kendall(one, other)),
    }


def _trained(
    run: Run, out: str, subnets: list[Subnet], text: Text | None
) -> list[dict[str, float]]:
    """Loss, and BLEU on a text, of subnets trained from scratch: files N.json in `out`."""
    done = [run.path / out / f"{i}.json" for i in range(1, len(subnets) + 1)]
    missing = [i for i, path in enumerate(done) if not path.exists()]
    parts = ((f"{out}/{i + 1}", subnets[i]) for i in _noted(run, missing, subnets))
    for nth, found in each_part(run, functools.partial(_train_one, text), parts):
        i = missing[nth]
        files.write_json(done[i], {"version": 1, **found})
        shutil.rmtree(run.path / out / str(i + 1))
        bleu = f", BLEU {found['bleu']:.2f}" if "bleu" in found else ""
        run.progress.note(f"subnet {i + 1}: trained {found['loss']:.4f}{bleu}")
    return [files.read_json(path, "loss") for path in done]


def _noted(run: Run, missing: list[int], subnets: list[Subnet]) -> Iterator[int]:
    for i in missing:
        run.progress.note(f"subnet {i + 1} of {len(subnets)}: {short_name(subnets[i])}")
        yield i


def _train_one(text: Text | None, run: Run, part: tuple[str, Subnet]) -> dict[str, float]:
    out, subnet = part
    train_subnet(run, subnet, None, out)
    found = {"loss": trained_loss(run, out)}
    if text is not None:
        params, _, _ = subnet_params(run, out)
        export, beam = run.path / out / EXPORT, beam_size(run.config)
        own = with_export(run, beam_sizes=(beam,))
        origin = "trained from scratch, for comparison"
        export_params(own, params, subnet, export, origin, programs=False)
        found["bleu"] = scored(export, *text, beam).bleu
    return found


def trained_loss(run: Run, out: str) -> float:
    """Validation loss of the trained subnet in the folder `out` of the workdir."""
    data = prepare(run)
    params, subnet, _ = subnet_params(run, out)
    own = target(run.config, data.tokenizer.vocab_sizes, subnet)
    evaluator = Evaluator(own, data.valid, run.config.subnet_training, 0)
    return evaluator.loss(parallel.replicate(params), subnet)
