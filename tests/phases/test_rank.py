"""How far a supernet's ranking is believed, and the scorer that a search and a ranking share."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy.stats import kendalltau
from tiny import KillAt, Killed, tiny_config

from automoe_jax.architecture import counts as complexity
from automoe_jax.decoding import evaluation
from automoe_jax.model.extract import inherited
from automoe_jax.phases import rank as ranking
from automoe_jax.phases import sensitivity
from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training import parallel
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.population import PopulationScorer, sample_pairs


def test_a_population_is_scored_as_each_alone(prepared, compilations):
    """A subnet on each device, one compilation a batch shape, the losses of training's own step."""
    _, data, trained, params = prepared
    config = tiny_config()
    scorer = PopulationScorer(trained, config.training, params)
    assert scorer.at_once == jax.local_device_count() == 4
    rng = np.random.default_rng(3)
    subnets = [config.space.sample(rng) for _ in range(6)]  # more than devices, no multiple
    batches = scorer.prepare(data.valid)
    shapes = {tuple(x.shape for x in jax.tree.leaves(batch)) for batch in batches}
    losses = scorer.losses(batches, subnets[:1])
    before = compilations()
    losses += scorer.losses(batches, subnets[1:])
    assert compilations() == before
    assert scorer.recompilations == 0
    assert len(shapes) <= 3
    evaluator = Evaluator(trained, data.valid, config.training, 0)
    replicated = parallel.replicate(params)
    alone = [evaluator.loss(replicated, s) for s in subnets]
    assert losses == pytest.approx(alone, rel=1e-5)
    assert len(set(np.round(losses, 6))) == len(set(subnets))


def test_sample_of_pairs(prepared):
    _, data, _, _ = prepared
    sample = sample_pairs(data.valid, 7, seed=0)
    again = sample_pairs(data.valid, 7, seed=0)
    assert len(sample) == 7
    whole = [tuple(data.valid.target[i]) for i in range(len(data.valid))]
    drawn = [tuple(sample.target[i]) for i in range(7)]
    assert drawn == [tuple(again.target[i]) for i in range(7)]
    at = [whole.index(x) for x in drawn]
    assert at == sorted(at)  # their order is kept
    assert [tuple(sample.source[i]) for i in range(7)] == [tuple(data.valid.source[i]) for i in at]
    assert sample_pairs(data.valid, 0, seed=0) is data.valid


def test_trust_by_hand():
    trained = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    same = ranking.trust(trained + 0.5, trained)
    assert (same.tau, same.tau_low, same.spearman) == pytest.approx((1, 1, 1))
    assert same.regret == 0.0
    assert same.offset == pytest.approx(0.5)
    assert same.verdict.startswith("fit for the search")
    swapped = trained[[1, 0, 3, 2, 7, 4, 5, 6]]
    found = ranking.trust(swapped, trained)
    assert found.tau == pytest.approx((28 - 2 * 5) / 28)  # pairs out of order: 1 + 1 + 3
    assert found.regret == 1.0  # it ranks the second best first
    assert found.tau_low < found.tau < found.tau_high
    against = ranking.trust(trained[::-1].copy(), trained)
    assert against.tau == pytest.approx(-1)
    assert against.regret == 7.0
    assert against.verdict.startswith("not fit")
    flat = ranking.trust(np.ones(8), trained)
    assert (flat.tau, flat.spearman) == (0.0, 0.0)


def test_spread_covers_the_range():
    space = tiny_config().space
    subnets = ranking.spread(space, 6, seed=0)
    assert len(set(subnets)) == 6
    flops = [complexity.count(s).flops for s in subnets]
    assert flops == sorted(flops)
    rng = np.random.default_rng(1)
    others = [complexity.count(space.sample(rng)).flops for _ in range(200)]
    assert flops[0] <= np.quantile(others, 0.1)
    assert flops[-1] >= np.quantile(others, 0.9)
    with pytest.raises(UserError, match="--subnets is 3; at least 4"):
        ranking.spread(space, 3, seed=0)


def test_a_ranking_goes_on_after_a_kill(prepared, tmp_path, monkeypatch):
    """Training itself stands in the slow tests; here its loss is a formula of the subnet."""
    run, data, _, params = prepared
    begun = []

    def train(run, subnet, init_from, out):
        begun.append(subnet)
        (run.path / out).mkdir(parents=True)

    def loss(run, out):
        assert (run.path / out).is_dir()
        return 10 - complexity.count(begun[-1]).flops / 1e5

    monkeypatch.setattr(ranking, "train_subnet", train)
    monkeypatch.setattr(ranking, "trained_loss", loss)

    def rank(progress):
        own = dataclasses.replace(run, progress=progress)
        return ranking.rank(own, "rank", data, params, 8, ranking.RankingSettings(5))

    with pytest.raises(Killed):
        rank(KillAt("subnet 3 of 5"))
    assert len(begun) == 2
    result = rank(Silent())
    assert begun == ranking.spread(
        run.config.space, 5, run.config.seed
    )  # each once, in their order
    assert result == json.loads((run.path / "rank" / "rank.json").read_text()) == rank(Silent())
    before = [row["inherited"] for row in result["subnets"]]
    trained = [row["trained"] for row in result["subnets"]]
    assert trained == [pytest.approx(10 - row["gflops"] * 1e4) for row in result["subnets"]]
    tau: float = kendalltau(before, trained).statistic  # pyright: ignore
    assert result["tau"] == pytest.approx(tau)
    assert result["corrected"] == {}  # five are too few
    assert (run.path / "rank" / "rank.png").stat().st_size > 10_000
    assert not [x for x in (run.path / "rank").iterdir() if x.is_dir()]  # weights are not kept


def test_how_well_the_others_correct_each():
    """A supernet that sees only experts; training, depth as well."""
    subnets = ranking.spread(tiny_config().space, 14, seed=0)
    depths = np.array([len(s.decoder.layers) for s in subnets])
    experts = np.array([len(s.encoder.layers[0].experts) for s in subnets])
    inherited = 3.0 - 0.02 * experts
    found = ranking._corrected(subnets, inherited, inherited - 0.2 * depths)
    assert found["tau"] > 0.8
    assert found["error_inherited"] == pytest.approx(np.std(0.2 * depths))
    assert found["error"] < found["error_inherited"] / 3
    assert ranking._corrected(subnets[:8], inherited[:8], inherited[:8]) == {}


@pytest.mark.slow
def test_translations_are_ranked_too(prepared, monkeypatch):
    """With inherited weights and trained ones; of other weights of a supernet, without training."""
    run, data, _, params = prepared
    trained, seen = [], []
    bleu = iter([13.0, 19.0, 35.0, 39.0, 10.0, 20.0, 30.0, 40.0, 10.0, 40.0, 30.0, 20.0])

    def train(run, subnet, init_from, out):
        trained.append(subnet)
        if len(trained) == 3:
            raise Killed

    def scored(export, sources, references, beam):
        manifest = json.loads((export / "manifest.json").read_text())
        about = manifest["weights_from"].partition(",")[0], manifest["beam_sizes"]
        seen.append((*about, len(sources), len(references), beam))
        return dataclasses.replace(evaluation.score(sources, sources), bleu=next(bleu))

    def weights_of(run, out):
        return inherited(params, trained[-1], run.config.space), trained[-1], 8

    monkeypatch.setattr(ranking, "train_subnet", train)
    monkeypatch.setattr(ranking, "trained_loss", lambda run, out: float(len(trained)))
    monkeypatch.setattr(ranking, "subnet_params", weights_of)
    monkeypatch.setattr(ranking, "scored", scored)

    def rank(out, step, *settings, run=run):
        return ranking.rank(run, out, data, params, step, ranking.RankingSettings(*settings))

    with pytest.raises(Killed):
        rank("rank_bleu", 8, 4, 7)
    with pytest.raises(UserError, match="has no finished ranking; finish it first"):
        rank("rank_other", 6, 4, 7, "rank_bleu")
    result = rank("rank_bleu", 8, 4, 7)
    kinds = ["inherited"] * 4 + ["trained from scratch"] * 4
    assert seen == [(kind, [2], 7, 7, 2) for kind in kinds]  # each once
    assert len(trained) == 5
    rows = result["subnets"]
    assert [row["bleu_inherited"] for row in rows] == [13.0, 19.0, 35.0, 39.0]
    assert [row["bleu_trained"] for row in rows] == [10.0, 20.0, 30.0, 40.0]
    assert result["bleu"] == {"sentences": 7, "mean_difference": 10 / 4, "tau": 1.0}

    again = rank("rank_other", 6, 4, 7, "rank_bleu")
    assert [row["trained"] for row in again["subnets"]] == [row["trained"] for row in rows]
    assert again["bleu"]["mean_difference"] == 40 / 4
    assert rank("rank_losses", 8, 4, 0, "rank_bleu")["tau"] == result["tau"]
    assert len(trained) == 5


def test_whose_trained_subnets_are_taken(prepared, monkeypatch):
    """Only those of the same settings."""
    run, data, _, params = prepared
    monkeypatch.setattr(ranking, "train_subnet", lambda *_: None)
    monkeypatch.setattr(ranking, "trained_loss", lambda run, out: 3.0)
    monkeypatch.setattr(ranking.shutil, "rmtree", lambda _: None)

    def rank(out, settings, step=8, **subnet_training):
        own = dataclasses.replace(run.config.subnet_training, **subnet_training)
        config = dataclasses.replace(run.config, subnet_training=own)
        changed = dataclasses.replace(run, config=config)
        return ranking.rank(changed, out, data, params, step, ranking.RankingSettings(*settings))

    rank("of_best", (4,), final_weights="best")
    for settings, changes, words in (
        ((5, 0, "of_best"), {"final_weights": "best"}, "subnets is 4 there and 5 here"),
        ((4, 7, "of_best"), {"final_weights": "best"}, "bleu is None there"),
        ((4, 0, "of_best"), {}, "subnet_weights is 'best' there and None here"),
    ):
        with pytest.raises(UserError, match=rf"{words}.*or leave --trained_in out"):
            rank("other", settings, **changes)
    with pytest.raises(UserError, match=r"supernet_step is 8 there and 6 here; .* another --out"):
        rank("of_best", (4,), 6, final_weights="best")


def test_sensitivity_goes_on_after_a_kill(prepared, monkeypatch):
    run, _, _, params = prepared
    monkeypatch.setattr(sensitivity, "supernet_params", lambda *_: (params, 8))
    scored = []
    losses = PopulationScorer.losses

    def count(self, batches, subnets):
        scored.extend(subnets)
        if len(scored) == 12:
            raise Killed
        return losses(self, batches, subnets)

    monkeypatch.setattr(PopulationScorer, "losses", count)
    with pytest.raises(Killed):
        sensitivity.analyse(run, 48, 20)
    analysis = sensitivity.analyse(run, 48, 20)
    assert len(scored) == len(set(scored)) + 4 == 52  # those of the kill are scored again
    assert analysis.unit == "GFLOPs"
    folder = run.path / "sensitivity"
    assert json.loads((folder / "sensitivity.json").read_text()) == analysis.as_json()
    # Beside it, what a ranking of the run says.
    assert analysis.ranked == ()
    effects = [{"choice": "decoder depth", "inherited": -0.1, "trained": -0.2}]
    (run.path / "rank").mkdir(exist_ok=True)
    files.write_json(run.path / "rank" / "rank.json", {"version": 1, "effects": effects})
    assert sensitivity.analyse(run, 48, 20).as_json()["ranked"] == effects
    (run.path / "rank" / "rank.json").unlink()
    assert (folder / "sensitivity.png").stat().st_size > 10_000
    names = {w.choice for w in analysis.found.layers}
    assert {"encoder width", "decoder depth", "decoder 2: experts"} <= names
    assert 0.9 < analysis.found.cost_explained <= 1
    assert 0 <= analysis.found.loss_explained <= 1
    # The same seed draws the same subnets: nothing is scored again.
    assert sensitivity.analyse(run, 48, 20) == analysis
    assert len(scored) == 52
    with pytest.raises(UserError, match="--subnets is 20: 20 subnets for"):
        sensitivity.analyse(run, 20, 20)
    with pytest.raises(UserError, match="pairs is 20 there and 30 here"):
        sensitivity.analyse(run, 48, 30)
    best = dataclasses.replace(run.config.training, final_weights="best")
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, training=best))
    with pytest.raises(UserError, match="supernet_weights is None there and 'best' here"):
        sensitivity.analyse(other, 48, 20)
