"""Latency models: features, regression, tables, and what a model says of itself."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import elastic_space, random_params

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Subnet,
    to_json,
)
from automoe_jax.config import base, resolve
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.weights import pack, prepare, quantize
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.records import LATENCY as LATENCY_MS
from automoe_jax.latency.records import MEASUREMENTS, Measured, ReplayLog
from automoe_jax.model.extract import extract
from automoe_jax.phases import costs
from automoe_jax.phases.export import SupernetExporter
from automoe_jax.phases.latency_model import fit_latency_model
from automoe_jax.phases.run import Run
from automoe_jax.predictor import design, estimates, features, fit, model, regression, tables
from automoe_jax.predictor.config import PredictorConfig
from automoe_jax.predictor.features import TranslationTask
from automoe_jax.predictor.scores import agreement
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent

TASK = TranslationTask(30, 20, 5, 32_768, 4, 0)
ONE = Subnet(
    Encoder(512, (EncoderLayer(8, (1024, 2048)), EncoderLayer(4, (3072,)))),
    Decoder(640, (DecoderLayer(8, 4, 2, (1024, 0)),)),
    512,
)


def work(subnet, task=TASK):
    return dict(zip(features.WORK, features.work(subnet, task), strict=True))


def test_work_by_hand():
    w = work(ONE)
    assert w["encoder layers"] == 2
    assert w["encoder attention"] == pytest.approx(2 * 30 * 4 * 512 * 512 / 1e6)
    assert w["encoder experts"] == pytest.approx(30 * 2 * 512 * (1536 + 3072) / 1e6)
    touched = 1 - 0.5**30
    assert w["encoder expert weights"] == pytest.approx(2 * 512 * (touched * 3072 + 3072) / 1e6)
    assert w["cross-attention set-up"] == pytest.approx(2 * 30 * 512 * 2 * 512 / 1e6)
    assert w["decoder layers"] == 20
    assert w["decoder attention"] == pytest.approx(20 * 6 * 640 * 512 / 1e6)
    assert w["decoder expert"] == pytest.approx(20 * 2 * 640 * 512 / 1e6)
    # Of two experts five rows touch nearly both; the identity expert has no weights.
    assert w["decoder expert weights"] == pytest.approx(20 * (1 - 0.5**5) * 2 * 640 * 1024 / 1e6)
    assert w["decoder expert calls"] == pytest.approx(20 * (1 - 0.5**5))
    assert w["decoder routers"] == 20
    assert w["output layer"] == pytest.approx(20 * 640 * 32_768 / 1e6)
    assert w["beyond the cache"] == 0
    step = w["output layer"] + w["decoder attention"] + w["cross-attention span"]
    step += w["decoder expert weights"]
    cached = work(ONE, dataclasses.replace(TASK, cache_bytes=4_000_000))
    assert cached["beyond the cache"] == pytest.approx(step - 20)


def test_averages_are_those_of_hat():
    assert features.averages(ONE).tolist() == [512, 2, 2304, 6, 640, 1, 512, 8, 4, 2]


def test_regression_finds_the_price_of_work():
    """Noise of 2 %, two wild outliers, a feature that costs nothing: prices come out anyway."""
    space = SearchSpace()
    subnets = design.choose(space, TASK, 60, 0)
    x = np.array([features.work(s, TASK) for s in subnets])
    true = np.zeros(x.shape[1])
    for name, value in (("constant", 3.0), ("encoder experts", 0.004), ("decoder layers", 0.02),
                        ("decoder attention", 0.12), ("decoder expert weights", 0.1),
                        ("output layer", 0.11)):  # fmt: skip
        true[features.WORK.index(name)] = value
    rng = np.random.default_rng(0)
    y = x @ true * (1 + 0.02 * rng.normal(size=len(x)))
    y[[5, 17]] *= 1.8
    found = regression.non_negative(x, y, 0.02 * y)
    assert (found >= 0).all()
    unseen = design.unseen(space, 40, subnets, 1)
    z = np.array([features.work(s, TASK) for s in unseen])
    error = agreement(z @ found, z @ true)
    assert error.mape < 1.5
    assert (error.tau or 0) > 0.95


def test_outliers_count_less():
    x = np.ones((20, 1))
    y = np.full(20, 10.0) + np.linspace(-0.1, 0.1, 20)
    y[3] = 100.0
    assert regression.non_negative(x, y, np.ones(20))[0] == pytest.approx(10, abs=0.1)


def test_design_covers_every_dimension():
    space = SearchSpace()
    blocks = design.blocks(space)
    for s in blocks:
        space.validate(s)
    assert any(len(s.decoder.layers) == 6 and s.decoder.embed_dim == 512 for s in blocks)
    chosen = design.choose(space, TASK, 48, 0)
    assert len(set(chosen)) == 48
    assert {space.smallest(), space.largest()} <= set(chosen)
    assert chosen == design.choose(space, TASK, 48, 0)
    # Better told apart than by random subnets alone.
    rng = np.random.default_rng(3)
    random = [space.sample(rng) for _ in range(48)]

    def information(subnets):
        x = np.array([features.work(s, TASK) for s in subnets])
        x = x[:, x.std(axis=0) > 0] / 1e3
        return np.linalg.slogdet(x.T @ x + 1e-9 * np.eye(x.shape[1]))[1]

    assert information(chosen) > information(random)
    assert not set(design.unseen(space, 30, chosen, 0)) & set(chosen)


class FakeProber:
    """Times subnets by a formula; counts what it is asked."""

    asked = 0
    at_first = 1.0  # how much slower the machine is when the reference is timed alone

    def __init__(self, *args):
        pass

    def measure_reference(self):
        ms = self.at_first * truth(SPACE.smallest())
        return Measured(ms, ms, ms, ms, "measured")

    def measure_group(self, subnets, reference_ms):
        type(self).asked += len(subnets)
        beside = truth(SPACE.smallest())
        ms = [self.at_first * truth(s) for s in subnets]
        return [Measured(t, 0.99 * t, 1.01 * t, beside, "measured") for t in ms]

    def close(self):
        pass


SPACE = elastic_space()
LATENCY = LatencyConfig()


def truth(subnet) -> float:
    w = work(subnet)
    return 1 + 40 * w["decoder attention"] + 30 * w["decoder expert"] + 2 * w["encoder attention"]


def fitted(folder, monkeypatch, count=24):
    monkeypatch.setattr(fit, "Prober", FakeProber)
    config = PredictorConfig(subnets=count, held_out=8)
    return fit.fit(SPACE, LATENCY, config, TASK, lambda *_: None, folder, Silent())


def test_fit_goes_on_and_knows_its_error(tmp_path, monkeypatch):
    FakeProber.asked = 0
    own = fitted(tmp_path / "a", monkeypatch)
    assert FakeProber.asked == 24 + 8 - 1  # the smallest subnet is the reference
    assert own.error.count == 8
    assert own.error.mape < 2
    assert (own.error.tau or 0) > 0.9
    lines = (tmp_path / "a" / "measurements.jsonl").read_text().splitlines(keepends=True)
    # Killed half-way: what was timed is not timed again, and the model is the same.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "measurements.jsonl").write_text("".join(lines[:13]))
    FakeProber.asked = 0
    assert fitted(tmp_path / "b", monkeypatch) == own
    assert FakeProber.asked == 32 - 13
    assert len(ReplayLog(tmp_path / "b" / MEASUREMENTS).stored(LATENCY_MS)) == 32

    path = tmp_path / "latency_model.json"
    own.save(path)
    again = model.load(path)
    assert again == own
    unseen = design.unseen(SPACE, 5, [], 3)
    assert [again.predict(s) for s in unseen] == [own.predict(s) for s in unseen]
    here = dict(own.made_for)
    assert own.warnings(here) == []
    other = {**here, "threads": here["threads"] + 1, "cpu": "another"}
    lines = own.warnings(other)
    assert len(lines) == 2
    assert "made for cpu" in lines[0]
    assert f"made for threads {here['threads']}, and here it is {here['threads'] + 1}" in lines[1]


def test_a_slow_moment_at_the_start_does_not_matter(tmp_path, monkeypatch):
    """The model tells latencies as they usually are, not as they were in the first second."""
    plain = fitted(tmp_path / "plain", monkeypatch)
    monkeypatch.setattr(FakeProber, "at_first", 1.4)
    slow = fitted(tmp_path / "slow", monkeypatch)
    assert slow.reference is not None
    assert plain.reference is not None
    assert slow.reference["ms"] == pytest.approx(plain.reference["ms"])
    assert slow.predict(SPACE.largest()) == pytest.approx(plain.predict(SPACE.largest()))


def test_asked_to_fit_again_it_times_again(tmp_path, monkeypatch):
    """A model that is there is of another day or another JAX: its timings are not taken over."""
    monkeypatch.setattr(fit, "Prober", FakeProber)
    config = dataclasses.replace(resolve(base()), space=SPACE)
    path = tmp_path / "latency_model.json"
    FakeProber.asked = 0
    for times, predictor in ((1, PredictorConfig(24, 8)), (2, PredictorConfig(24, 8, runs=7))):
        run = Run(dataclasses.replace(config, predictor=predictor), tmp_path, Silent())
        fit_latency_model(run, SupernetExporter(run, {}, "nothing"), (300, 300), path)
        assert FakeProber.asked == times * (24 + 8 - 1)
    assert model.load(path).fitted == 24


def test_too_small_a_space_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "Prober", FakeProber)
    space = SearchSpace(
        encoder_depths=(1,), decoder_depths=(1,), encoder_heads=(8,), decoder_self_heads=(8,),
        decoder_cross_heads=(8,), cross_spans=(1,), encoder_experts=(1,), decoder_experts=(1,),
        encoder_ffn_dims=(1024,), decoder_ffn_dims=(1024,),
    )  # fmt: skip
    with pytest.raises(UserError, match="too few subnets for 24 \\+ 8"):
        fit.fit(space, LATENCY, PredictorConfig(24, 8), TASK, lambda *_: None, tmp_path, Silent())


def test_damaged_models_are_one_line(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(UserError, match="does not exist"):
        model.load(path)
    for text in ("{}", "[]", '{"version": 1}', '{"version": 9}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"m\.json"):
            model.load(path)


def write_table(path, rows=300, change=lambda lines: lines):
    rng = np.random.default_rng(0)
    space = SearchSpace(encoder_experts=(1,), decoder_experts=(1,))
    lines = [",".join((*features.AVERAGES, *tables.LATENCIES))]
    for _ in range(rows):
        a = features.averages(space.sample(rng))
        decoder = a[5] * (5 + 0.02 * a[4] + 0.008 * a[6]) * (1 + 0.03 * rng.normal())
        lines.append(",".join(f"{x:.6g}" for x in (*a, 9.0, decoder)))
    path.write_text("\n".join(change(lines)) + "\n")
    return path


def test_tables(tmp_path):
    own, ordinary = tables.fit(write_table(tmp_path / "t.csv"))
    assert own.error.count == ordinary.count == 60
    assert own.error.mape < 3.5 < ordinary.mape  # the noise is 3 %; layers times sizes matter
    own.save(tmp_path / "m.json")
    again = model.load(tmp_path / "m.json")
    subnet = SearchSpace().sample(np.random.default_rng(1))
    assert again.predict(subnet) == own.predict(subnet)
    assert "of the table t.csv, not of this machine" in own.warnings({})[0]


def test_broken_tables(tmp_path):
    def error(**change):
        with pytest.raises(UserError) as e:
            tables.fit(write_table(tmp_path / "t.csv", **change))
        return str(e.value)

    assert "no column encoder_embed_dim" in error(change=lambda x: [x[0][7:], *x[1:]])
    bad = error(change=lambda x: [*x[:5], x[5].replace(",9,", ",oops,"), *x[6:]])
    assert "line 6: latency_mean_encoder is 'oops'" in bad
    assert "more than 40 are needed" in error(rows=20)


def test_published_tables(shared):
    """No worse than least squares, whose errors are those published with the tables."""
    for kind, rmse, mape in (("cpu_xeon", 16.6, 5.2), ("gpu_titanxp", 15.7, 5.6)):
        path = shared / "published" / "latency" / f"wmt14ende_{kind}_all.csv"
        own, ordinary = tables.fit(path)
        assert ordinary.rmse == pytest.approx(rmse, abs=0.3)
        assert ordinary.mape == pytest.approx(mape, abs=0.2)
        assert own.error.rmse <= ordinary.rmse
        assert own.error.mape <= ordinary.mape


def measured(ms, reference=10.0, predicted=None, largest=None):
    return Measured(ms, 0.9 * ms, 1.1 * ms, reference, "timed", predicted, largest)


def known(model=None, *, relative=False, **ms):
    """A fold over measurements of the smallest, the largest and another subnet, by name."""
    other = SPACE.sample(np.random.default_rng(8))
    subnets = {"smallest": SPACE.smallest(), "largest": SPACE.largest(), "other": other}
    values = {subnets[name]: m for name, m in ms.items()}
    largest = subnets["largest"] if relative else None
    return estimates.fold(values, model, largest=largest, min_measured=3)


def fake_model(ms: float, reference_ms: float | None):
    """A model that predicts `ms` for every subnet."""

    class Model(model.LatencyModel):
        def predict(self, subnet):
            return ms

    reference = None
    if reference_ms is not None:
        reference = {"subnet": to_json(SPACE.smallest()), "ms": reference_ms}
    where = {"cpu": "this", "threads": 1}
    return Model(model.WORK, {}, TASK, where, agreement([1.0], [1.0]), 8, reference)


def test_nothing_is_known_at_first():
    empty = known(fake_model(7.0, None))
    assert empty.of(SPACE.hull()).ms == empty.of(SPACE.hull()).upper_ms == 7.0
    with pytest.raises(KeyError):
        known().of(SPACE.hull())


def test_measurements_are_scaled_to_the_usual_speed():
    """The reference took 12 ms at first and takes 10 in turns with others."""
    found = known(smallest=measured(12.0), largest=measured(24.0), other=measured(36.0, 11.0))
    assert found.scale == pytest.approx(10.5 / 12)
    assert found.of(SPACE.largest()).ms == pytest.approx(21.0)
    assert found.of(SPACE.largest()).upper_ms == pytest.approx(1.1 * 21.0)
    assert found.of(SPACE.largest()).how == "timed"


def test_under_a_ratio_limit_the_largest_is_the_median_of_all_turns():
    own = {
        "smallest": measured(10.0),
        "largest": measured(23.0),
        "other": measured(15.0, largest=29.0),
    }
    assert known(**own).of(SPACE.largest()).ms == 23.0
    found = known(**own, relative=True).of(SPACE.largest())
    assert (found.ms, found.upper_ms) == (pytest.approx(26.0), pytest.approx(1.1 * 26.0))
    before = {name: own[name] for name in ("smallest", "other")}
    with pytest.raises(KeyError):  # not measured itself
        known(**before, relative=True).of(SPACE.largest())


def test_predictions_are_corrected_by_what_was_measured():
    unseen = SPACE.sample(np.random.default_rng(5))
    own = fake_model(20.0, 10.0)
    # Too few for a median: by the reference, 15 ms now and 10 when the model was made.
    few = known(own, relative=True, smallest=measured(15.0, 15.0))
    assert few.of(unseen).ms == pytest.approx(30.0)
    assert "times 1.500, as measured in this search" in few.of(unseen).how
    # Under a limit in ms a slow moment must not rule out everything; a fast one counts.
    assert known(own, smallest=measured(15.0, 15.0)).of(unseen).ms == 20.0
    assert known(own, smallest=measured(8.0, 8.0)).of(unseen).ms == pytest.approx(16.0)
    # Enough: the median of measured over predicted.
    many = known(own, smallest=measured(10.0), largest=measured(24.0), other=measured(40.0))
    assert many.correction == pytest.approx(24.0 / 20.0)
    pairs = known(own, smallest=measured(10.0), largest=measured(24.0, predicted=20.0))
    assert estimates.predicted_and_measured(pairs) == [(20.0, 24.0, 0.9 * 24.0, 1.1 * 24.0)]


def test_counted_size_is_that_of_the_export():
    """To the byte, for every way of sharing embeddings and of quantising."""
    rng = np.random.default_rng(0)
    for sharing in ("all", "decoder", "none"):
        space = dataclasses.replace(SPACE, share_embeddings=sharing)
        params = random_params(space)
        for kind in ("none", "int8"):
            for _ in range(4):
                subnet = space.sample(rng)
                own = jax.tree.map(np.asarray, extract(params, subnet, space.hull()))
                dense = prepare(own, subnet)
                packed = pack(quantize(dense) if kind == "int8" else dense)
                vocab = _vocab(own)
                counted = costs.CountedCosts(space, ExportConfig(quantize=kind), vocab)
                expected = sum(w.nbytes for w in packed.values())
                assert counted.weight_bytes(subnet) == expected, (sharing, kind)


def _vocab(params) -> tuple[int, int]:
    source = params.get("source_embedding", params.get("embedding"))["table"].shape[0]
    target = params.get("target_embedding", params.get("embedding"))["table"].shape[0]
    return source, target
