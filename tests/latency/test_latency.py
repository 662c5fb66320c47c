"""The latency protocol and the process that times."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import elastic_space, random_params

from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.export import export
from automoe_jax.decoding.parts import PARTS
from automoe_jax.decoding.xla_engine import ModelSpec
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.prober import Prober
from automoe_jax.latency.process import Timer, available_cpus
from automoe_jax.latency.records import Measured, ReplayLog, measured_of
from automoe_jax.latency.statistics import added, interval, ratio, reference_scale, summarise, trim
from automoe_jax.model.extract import extract
from automoe_jax.system.errors import UserError

SPACE = elastic_space(qkv_dim=32)
HULL = SPACE.hull()
QUICK = LatencyConfig(runs=5, warmup=1, source_length=8, target_length=6, beam_size=2)


def write(subnet, folder, beam_size):
    params = jax.tree.map(np.asarray, extract(random_params(SPACE), subnet, HULL))
    spec = ModelSpec(subnet, HULL.encoder.embed_dim, HULL.decoder.embed_dim)
    export(params, spec, ExportConfig((beam_size,)), folder, "random", programs=False)


def test_protocol_drops_a_tenth_at_both_ends():
    times = [100.0, 1.0, *range(10, 18)]  # ten runs: one goes at each end
    assert trim(times).tolist() == list(range(10, 18))
    assert summarise(times).mean_ms == pytest.approx(13.5)
    assert summarise(times).min_ms == 1.0
    assert summarise([5.0]).mean_ms == 5.0
    assert len(trim(range(300))) == 240


def test_ratio_and_its_interval():
    rng = np.random.default_rng(0)
    drift = 1 + 0.5 * np.sin(np.arange(200) / 20)  # the machine slows and recovers
    base = 10 * drift * rng.normal(1, 0.02, 200)
    other = 7 * drift * rng.normal(1, 0.02, 200)
    value, low, high = ratio(other, base)
    assert value == pytest.approx(0.7, abs=0.01)
    assert low < value < high
    assert high - low < 0.02


def test_what_parts_add():
    rng = np.random.default_rng(0)
    slow = 1 + 0.3 * rng.random(200)  # moments of the machine, the same for all of a round
    times = [mean * slow + 0.01 * rng.random(200) for mean in (2.0, 5.0, 5.0, 9.0)]
    found = added(times)
    for (value, low, high), expected in zip(found, (2, 3, 0, 4), strict=True):
        assert low <= value <= high
        assert value == pytest.approx(expected * trim(slow).mean(), abs=0.01)
    assert sum(value for value, *_ in found) == pytest.approx(summarise(times[-1]).mean_ms)


def test_names_of_measurements():
    assert LatencyConfig().name == "gold, 300 runs"
    assert LatencyConfig(runs=100).name == "partially gold, 100 runs"
    assert LatencyConfig(runs=7).name == "7 runs"


def test_timer_times_exports_in_turns(tmp_path):
    for name, subnet in (("small", SPACE.smallest()), ("large", SPACE.largest())):
        write(subnet, tmp_path / name, 2)
    with Timer(threads=1) as timer:
        assert timer.threads == 1
        times = timer.time([tmp_path / "large", tmp_path / "small"], QUICK)
        assert [len(t) for t in times] == [5, 5]
        assert min(min(t) for t in times) > 0
        parts = timer.parts(tmp_path / "small", QUICK)
        assert [len(own) for own in parts] == [5] * len(PARTS)
        repeated = timer.time([tmp_path / "small"], dataclasses.replace(QUICK, words="repeated"))
        assert len(repeated[0]) == 5
        with pytest.raises(UserError, match="beam size 9 is not in export"):
            timer.time([tmp_path / "small"], dataclasses.replace(QUICK, beam_size=9))
        with pytest.raises(UserError, match="does not exist"):
            timer.time([tmp_path / "none"], QUICK)
        with pytest.raises(UserError, match="no tokenizer"):
            timer.time([tmp_path / "small"], QUICK, ["a sentence"])
        assert len(timer.time([tmp_path / "small"], QUICK)[0]) == 5  # it is still there


def test_a_timer_that_was_killed_says_so(tmp_path):
    """Between two requests, as where memory runs out; closing it does not hide that."""
    write(SPACE.smallest(), tmp_path / "export", 2)
    timer = Timer(threads=1)
    timer.time([tmp_path / "export"], QUICK)
    timer._process.kill()
    timer._process.wait()
    with pytest.raises(UserError, match=r"was killed, as where memory runs out"):
        timer.time([tmp_path / "export"], QUICK)
    timer.close()


def test_more_threads_than_cpus():
    with pytest.raises(UserError, match="this machine lets us use"):
        Timer(threads=len(available_cpus()) + 1)


class ScriptedTimer:
    """Answers with prepared times: the reference's and the candidates'."""

    def __init__(self, answers):
        self.answers = answers

    def time(self, exports, config, sentences=None):
        # The export that is loaded first keeps compiled programs: it must not be removed.
        assert exports[0].name == "reference"
        return self.answers.pop(0)

    def close(self):
        pass


def scripted(monkeypatch, tmp_path, answers, runs=10):
    """A prober that gives these times, one list for each export of each request."""
    script = ScriptedTimer(answers)
    monkeypatch.setattr("automoe_jax.latency.prober.Timer", lambda *a: script)

    def no_export(subnet, folder, beam_size):
        folder.mkdir(parents=True, exist_ok=True)

    policy = MeasurementPolicy(runs=runs, reference_pause_s=0.0)
    return Prober(QUICK, policy, no_export, SPACE.smallest(), tmp_path / "t")


def test_drift_is_corrected(tmp_path, monkeypatch):
    answers = [[[10.0] * 10], [[20.0] * 10, [30.0] * 10]]  # at twice the reference's first time
    prober = scripted(monkeypatch, tmp_path, answers)
    assert prober.measure_reference().ms == 10.0
    measured = prober.measure(SPACE.largest(), 10.0)
    assert measured.ms == pytest.approx(15.0)
    assert measured.reference == 20.0
    assert measured.how.endswith("; 10 runs")
    assert (tmp_path / "t").exists()
    prober.close()
    assert not (tmp_path / "t").exists()


def test_nothing_is_timed_beside_a_compilation(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("automoe_jax.system.programs.wait", lambda: order.append("wait"))
    prober = scripted(monkeypatch, tmp_path, [[[10.0] * 10], [[10.0] * 10, [30.0] * 10]])
    script = prober._started()
    time = script.time
    monkeypatch.setattr(script, "time", lambda *a: order.append("time") or time(*a))
    prober.measure_reference()
    prober.measure(SPACE.largest(), 10.0)
    assert order == ["wait", "time"] * 2


def test_a_precise_measurement_has_the_runs_of_a_final_one(tmp_path, monkeypatch):
    prober = scripted(monkeypatch, tmp_path, [[[10.0] * 5, [20.0] * 5]], runs=2)
    measured = prober.measure(SPACE.largest(), 10.0, precise=True)
    assert measured.how.endswith("; 5 runs")  # of `QUICK`
    assert measured.ms == pytest.approx(20.0)


def test_a_prober_starts_nothing_before_it_measures(tmp_path):
    """Nor do its exports of an earlier process count: a measurement begins with new ones."""

    def no_export(subnet, folder, beam_size):
        raise AssertionError("exported before anything is measured")

    prober = Prober(QUICK, MeasurementPolicy(), no_export, SPACE.smallest(), tmp_path / "t")
    assert "beam 2, 8 in, 6 out" in prober.how
    prober.close()


def test_what_seems_infeasible_is_timed_again(tmp_path, monkeypatch):
    """The smallest subnet in a slow moment; after it, it is within the limit."""
    answers = [[[14.0] * 10], [[13.0] * 10], [[10.0] * 10], [[9.0]]]
    prober = scripted(monkeypatch, tmp_path, answers)
    assert prober.measure_reference(limit=12.0).ms == 10.0
    retries = MeasurementPolicy().reference_retries
    answers = [[[14.0] * 10], *[[[13.0 + i] * 10] for i in range(retries)]]
    prober = scripted(monkeypatch, tmp_path, answers)
    assert prober.measure_reference(limit=12.0).ms == 13.0
    assert answers == []


def test_the_final_measurement(tmp_path, monkeypatch):
    answers = [[[12.0] * 10, [18.0] * 10, [36.0] * 10]]
    final = scripted(monkeypatch, tmp_path, answers).verify(SPACE.hull(), SPACE.largest(), 10.0)
    assert final.latency.mean_ms == final.low_ms == final.high_ms == 18.0  # not corrected
    assert final.ratio == final.ratio_low == final.ratio_high == 0.5
    assert final.slowdown == pytest.approx(1.2)


def test_scale_is_what_the_reference_usually_takes():
    assert reference_scale(10.0, []) == 1.0
    assert reference_scale(14.0, [10.0, 10.2, 9.9, 15.0]) == pytest.approx(10.1 / 14)


def test_runs_end_when_the_interval_is_clear_of_the_limit(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def around(ms):
        return list(ms + 0.3 * rng.normal(size=10))

    clear = [[around(10), around(30)], [around(10), around(30)]]
    prober = scripted(monkeypatch, tmp_path, clear, runs=100)
    measured = prober.measure(SPACE.largest(), 10.0, limit=20.0)
    assert measured.how.endswith("; 20 runs")
    assert 20 < measured.low < measured.ms < measured.high
    # Near the limit it takes all of them.
    near = [[around(10), around(20)] for _ in range(10)]
    prober = scripted(monkeypatch, tmp_path, near, runs=100)
    measured = prober.measure(SPACE.largest(), 10.0, limit=20.02)
    assert measured.how.endswith("; 100 runs")
    assert measured.low < 20 < measured.high


def test_the_largest_in_turns_with_the_first_runs(tmp_path, monkeypatch):
    answers = [[[20.0] * 10, [30.0] * 10, [50.0] * 10], [[20.0] * 10, [30.0] * 10]]
    prober = scripted(monkeypatch, tmp_path, answers, runs=20)
    measured = prober.measure(SPACE.hull(), 10.0, largest=SPACE.largest(), limit=15.0)
    assert (measured.ms, measured.largest) == (pytest.approx(15.0), pytest.approx(25.0))
    assert measured.how.endswith("; 20 runs")
    assert answers == []


def test_several_in_turns(tmp_path, monkeypatch):
    answers = [[[20.0] * 10, [30.0] * 10, [40.0] * 10]]
    prober = scripted(monkeypatch, tmp_path, answers)
    found = prober.measure_group([SPACE.largest(), SPACE.hull()], 10.0)
    assert [m.ms for m in found] == pytest.approx([15.0, 20.0])


def test_runs_that_end_early_are_sure(tmp_path, monkeypatch):
    """A candidate exactly at the limit is seldom called clear of it, however often it is looked."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(60):
        answers = [
            [list(5 + 0.1 * rng.normal(size=10)), list(10 + rng.normal(size=10))] for _ in range(10)
        ]
        prober = scripted(monkeypatch, tmp_path, answers, runs=100)
        wrong += not prober.measure(SPACE.largest(), 5.0, limit=10.0).how.endswith("; 100 runs")
        prober.close()
    assert wrong <= 6  # 20 % of 300 where 95 % intervals from ten runs on decided


def line(value):
    return lambda: {"value": value, "how": "timed", "low": value - 0.1, "high": value + 0.1}


def test_a_log_replays_what_it_holds_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "new" / "measurements.jsonl"
    a, b = SPACE.smallest(), SPACE.largest()
    log = ReplayLog(path)
    assert log.get("latency_ms", a, line(3.0))["value"] == 3.0
    assert log.get("latency_ms", a, line(9.0))["value"] == 3.0  # made once
    with path.open("a") as f:
        f.write('{"constraint": "latency_ms", "subn')  # a kill tore this line
    again = ReplayLog(path)
    assert again.asked("latency_ms") == {}  # nothing counts before it is asked for
    assert list(again.stored("latency_ms")) == [a]
    assert again.get("latency_ms", b, line(5.0))["value"] == 5.0
    assert again.get("latency_ms", a, line(9.0))["high"] == 3.1
    assert list(again.asked("latency_ms")) == [b, a]
    assert list(ReplayLog(path).stored("latency_ms")) == [a, b]
    assert again.asked("final_ms") == {}


def test_records_of_a_reference_have_no_interval():
    m = measured_of({"value": 4.0, "how": "timed"})
    assert (m.low, m.ms, m.high, m.reference, m.predicted) == (4.0, 4.0, 4.0, 4.0, None)
    whole = Measured(3.0, 2.9, 3.1, 2.0, "timed", 2.5)
    assert measured_of(whole.fields()) == whole


def test_interval_knows_that_a_slow_moment_lasts():
    """Noise that neighbouring runs share: the interval still holds the mean most of the time."""
    rng = np.random.default_rng(0)
    held = 0
    for i in range(100):
        noise = np.zeros(300)
        for k in range(1, 300):
            noise[k] = 0.7 * noise[k - 1] + rng.normal()
        low, high = interval(50 + noise, seed=i, resamples=300)
        held += low <= 50 <= high
    assert held >= 80  # runs drawn one by one hold it 61 times


def test_interval_holds_the_mean():
    """Of 200 samples of known mean, the 95 % interval misses some, and few."""
    rng = np.random.default_rng(0)
    missed = 0
    for i in range(200):
        low, high = interval(10 + rng.normal(size=60), seed=i, resamples=300)
        missed += not low <= 10 <= high
    assert 2 <= missed <= 24
