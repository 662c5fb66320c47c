"""A whole search on a tiny supernet: limits, kills, budgets of measurements, fronts, seeds."""

import dataclasses
import functools
import json
import math
import random
from typing import ClassVar

import numpy as np
import pytest
from tiny import Killed, tiny_config

from automoe_jax.architecture import counts
from automoe_jax.architecture.subnet import from_json, to_json
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.records import (
    LATENCY,
    MEASUREMENTS,
    FinalMeasurement,
    Measured,
    ReplayLog,
)
from automoe_jax.latency.statistics import summarise
from automoe_jax.phases import (
    latency_model,
    search_context,
    search_result,
    search_seeds,
)
from automoe_jax.phases.run import Run
from automoe_jax.phases.search import claim_search, run_search
from automoe_jax.phases.search_history import ScoreHistory
from automoe_jax.predictor import features
from automoe_jax.predictor import fit as predictor
from automoe_jax.predictor.model import WORK, LatencyModel
from automoe_jax.predictor.scores import agreement
from automoe_jax.published import subnet_files
from automoe_jax.search import calibration
from automoe_jax.search.candidates import InfeasibleError
from automoe_jax.search.front import front
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training.population import PopulationScorer


def configured(search=None, **constraint):
    config = tiny_config(**constraint)
    fields = {"iterations": 3, "population": 8, "parents": 3, "mutations": 3, "crossovers": 3}
    own = dataclasses.replace(config.search, **{**fields, **(search or {})})
    return dataclasses.replace(config, search=own)


def search(prepared, config, folder, notes=None):
    """What is found; `notes`, a list, takes the lines for the user."""
    run, data, _, params = prepared
    progress = Silent()
    if notes is not None:
        progress.note = notes.append
    return run_search(Run(config, run.path, progress), folder, data, params).found


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(search_result, "write_pictures", lambda *args: None)


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.suffix in (".json", ".jsonl")}


def true_ms(subnet) -> float:
    return counts.count(subnet).flops / 1e4


def beside() -> float:
    """What the smallest subnet takes beside the others."""
    return 1.03 * true_ms(tiny_config().space.smallest())


class FakeProber:
    """Latencies by a formula, a little above what the model predicts; counts what it times."""

    timed: ClassVar[list] = []
    finals: ClassVar[list] = []
    precise: ClassVar[list] = []  # of `timed`, those that were timed as often as finals
    how = "measured (fake)"
    at_first = 1.0  # how much longer the smallest takes when the search begins
    slow = 1.0  # of the final measurements
    machine = 1.0  # how much slower all is by then
    largest_at_first = 1.0  # how much longer the largest takes when the search begins

    def __init__(self, protocol, policy, write, reference, folder):
        self.reference = reference

    def measure_reference(self, limit):
        return self.measure(self.reference, None, limit)

    def measure(self, subnet, reference_ms, limit, *, precise=False, largest=None):
        self.timed.append(subnet)
        self.precise += [subnet] * precise
        ms = 1.03 * true_ms(subnet) * self.at_first
        if precise:
            ms *= self.largest_at_first
        other = largest and 1.03 * true_ms(largest) * self.at_first
        own = beside(), f"{self.how}; 20 runs", None, other
        return Measured(ms, 0.99 * ms, 1.01 * ms, *own)

    def verify(self, subnet, largest, reference_ms):
        self.finals.append(subnet)
        a, b = 1.03 * true_ms(subnet) * self.slow, 1.03 * true_ms(largest)
        a, b = a * self.machine, b * self.machine
        return FinalMeasurement(
            summarise([a] * 10), summarise([b] * 10), a, 1.005 * a, a / b, a / b, 1.005 * a / b,
            self.slow * self.machine / self.at_first,
        )  # fmt: skip

    def slowdown(self, largest, reference_ms):
        return self.slow * self.machine / self.at_first

    def close(self):
        pass


@pytest.fixture
def fake_latency(monkeypatch):
    """Latency without exports: the model knows FLOPs, the prober finds 3 % more."""

    class Model(LatencyModel):
        def predict(self, subnet):
            return true_ms(subnet)

    config = tiny_config()
    task = predictor.task_of(config.latency, 300, "none")
    model = Model(
        WORK, dict.fromkeys(features.WORK, 0.0), task, predictor.made_for(config.latency),
        agreement([1.0, 2.0], [1.0, 2.0]), 10, None,
    )  # fmt: skip
    monkeypatch.setattr(search_context, "Prober", FakeProber)
    policy = functools.partial(MeasurementPolicy, look_pause_s=0.0)
    monkeypatch.setattr(search_context, "MeasurementPolicy", policy)
    monkeypatch.setattr(latency_model, "latency_model", lambda *args: model)
    FakeProber.timed, FakeProber.finals, FakeProber.precise = [], [], []
    FakeProber.slow = FakeProber.machine = FakeProber.at_first = 1.0
    FakeProber.largest_at_first = 1.0
    return model


def moments(whole: dict[str, str], seed: str) -> list[int]:
    """Five random writes out of those that a whole search made."""
    writes = sum(text.count("\n") for name, text in whole.items() if name.endswith("jsonl"))
    assert writes > 15
    return sorted(random.Random(seed).sample(range(1, writes), 5))


class KillAtWrite:
    """Ends the program at some write of a record, once torn in the middle of its line."""

    def __init__(self, monkeypatch, moment: int):
        whole, self.left = files.append_json_line, moment

        def append_line(path, line):
            self.left -= 1
            if self.left == 0:
                with path.open("a") as f:
                    f.write(json.dumps(line)[: 20 * (moment % 2)])
                raise Killed
            whole(path, line)

        monkeypatch.setattr(files, "append_json_line", append_line)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
@pytest.mark.parametrize(
    "mode", ["flops", pytest.param("predicted", marks=pytest.mark.slow), "nsga2"]
)
def test_killed_and_resumed_is_the_same(prepared, tmp_path, mode):
    """At five random moments: the same history, byte for byte, and the same result."""
    config = {
        "flops": configured(),
        "predicted": configured({"latency": "predicted"}, latency_ms=26.0),
        "nsga2": configured({"algorithm": "nsga2", "latency": "predicted"}, size_mb=1.0),
    }[mode]
    check_resumed(prepared, config, tmp_path, mode)
    assert FakeProber.timed == FakeProber.finals == []


def check_resumed(prepared, config, folder, seed):
    """Killed at five random moments and started again, a search writes what a whole one writes."""
    search(prepared, config, folder / "whole")
    whole = contents(folder / "whole")
    for moment in moments(whole, seed):
        own = folder / f"at_{moment}"
        with pytest.MonkeyPatch.context() as patch:
            KillAtWrite(patch, moment)
            with pytest.raises(Killed):
                search(prepared, config, own)
        search(prepared, config, own)
        assert contents(own) == whole


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_front_of_measured_latencies_goes_on_as_it_began(prepared, tmp_path, monkeypatch):
    """Each one that is asked for corrects the others, by what the smallest took beside it."""
    measure = FakeProber.measure

    def uneven(self, subnet, *args, **kwargs):
        found = measure(self, subnet, *args, **kwargs)
        slower = 1 + 0.1 * (counts.count(subnet).flops // 100 % 7)
        return dataclasses.replace(found, reference=found.reference * slower)

    monkeypatch.setattr(FakeProber, "measure", uneven)
    config = configured({"algorithm": "nsga2", "latency": "gold"}, size_mb=1.0)
    check_resumed(prepared, config, tmp_path, "gold")


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_verified_search(prepared, tmp_path):
    """Within its budget, what it returns is measured; killed, it measures nothing twice."""
    config = configured(
        {"latency": "verified", "measurements": 16, "population": 12, "seed": 1}, latency_ms=26.0
    )
    found = search(prepared, config, tmp_path / "whole")
    assert found
    assert all(f.final and f.final.high_ms <= 26.0 for f in found)
    assert all(f.costs["latency_ms"] == 1.03 * true_ms(f.subnet) for f in found)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["measurements"] == len(FakeProber.timed) + len(FakeProber.finals) <= 16
    assert len(FakeProber.timed) > 5
    assert result["recompilations"] == 0
    lines = ScoreHistory(tmp_path / "whole").lines
    # Once it has seen that predictions are low, it draws with that in mind.
    how = lines[-1]["constraints"]["latency_ms"]["how"]
    assert "times 1.030, as measured" in how or "measured (fake)" in how

    once = list(FakeProber.timed), list(FakeProber.finals)
    whole = contents(tmp_path / "whole")
    for moment in moments(whole, seed="verified"):
        FakeProber.timed, FakeProber.finals = [], []
        folder = tmp_path / f"at_{moment}"
        with pytest.MonkeyPatch.context() as patch:
            KillAtWrite(patch, moment)
            with pytest.raises(Killed):
                search(prepared, config, folder)
        search(prepared, config, folder)
        assert contents(folder) == whole
        # The one whose line was being written is the only one that may have to be timed again.
        for again, first in zip((FakeProber.timed, FakeProber.finals), once, strict=True):
            assert len(again) <= len(first) + 1
            assert len(set(again)) >= len(again) - 1


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_final_measurement_that_fails(prepared, tmp_path):
    """The machine became slower: the search goes on to smaller subnets, or says the fastest."""
    config = configured({"latency": "verified", "measurements": 30}, latency_ms=17.0)
    FakeProber.slow = 1.08  # only the smallest are fast enough
    notes = []
    found = search(prepared, config, tmp_path / "a", notes)
    assert all(f.final and f.final.high_ms <= 17.0 for f in found)
    failed = [n for n in notes if "fails the final measurement" in n]
    assert failed
    assert all("takes 1.08 times as long as during most of the search" in n for n in failed)
    FakeProber.slow = 10.0
    with pytest.raises(InfeasibleError, match=r"nearest was E.*limit 17 .*took [\d.]+ ms when"):
        search(prepared, config, tmp_path / "b")


def encoder_ffn(subnet) -> int:
    return subnet.encoder.layers[0].experts[0]


class LargeEncoderIsBetter:
    """An objective: minus the size of the encoder's FFN; on the whole set it is worse for all."""

    label, batch_size = "minus size", 4

    def sample(self, subnets):
        return [float(-encoder_ffn(subnet)) for subnet in subnets]

    def full(self, subnet):
        return 100.0 - encoder_ffn(subnet)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
@pytest.mark.parametrize(
    ("algorithm", "latency"),
    [
        ("evolution", "verified"),
        ("evolution", "partially_gold"),
        ("nsga2", "verified"),
        ("random_search", "verified"),
    ],
)
def test_new_candidates_after_the_best_failed(prepared, tmp_path, monkeypatch, algorithm, latency):
    """All but the largest take 1.3 times what they took when they were drawn: an evolution, whose
    good candidates are just within the limit, makes others that leave room for it. A random search
    stays what it is.
    """
    monkeypatch.setattr(search_context, "make_objective", lambda *args: LargeEncoderIsBetter())
    search_fields = {"latency": latency, "algorithm": algorithm}
    config = one_expert({**search_fields, "measurements": 40, "iterations": 6}, 0.6)
    FakeProber.slow = 1.3
    lines, more, said = corrected(prepared, config, tmp_path, "leave room for it")
    if algorithm == "random_search":
        assert not more
        assert not said
        return
    assert 1 <= len(said) <= config.search.retreats
    for line in more:
        cost = line["constraints"]["latency_ms"]
        assert 1.25 * cost["value"] <= cost["limit"]
    assert len({str(line["subnet"]) for line in lines}) == len(lines)
    check_gain(prepared, config, tmp_path)
    check_killed(prepared, config, tmp_path)


def one_expert(fields, ratio):
    """A search of the sizes of one FFN in each layer, within a share of the largest's latency."""
    config = configured({"latency": "verified", **fields}, latency_ratio=ratio)
    ffns = tuple(range(8, 257, 8))
    one = {"decoder_depths": (1,), "encoder_experts": (1,), "decoder_experts": (1,)}
    space = dataclasses.replace(config.space, **one, encoder_ffn_dims=ffns, decoder_ffn_dims=ffns)
    return dataclasses.replace(config, space=space)


def corrected(prepared, config, tmp_path, words):
    """A search in folder "whole" whose final measurements correct the limit.

    Its history, the lines that came of that, and what it said of them.
    """
    notes = []
    found = search(prepared, config, tmp_path / "whole", notes)
    most = config.search.constraint.latency_ratio
    assert all(f.final and f.final.ratio_high <= most for f in found)
    lines = ScoreHistory(tmp_path / "whole").lines
    more = [line for line in lines if line["iteration"] > config.search.iterations]
    return lines, more, [n for n in notes if f"more subnets that {words}" in n]


def check_gain(prepared, config, tmp_path):
    """What is found with `search.retreats` is never worse than without, and on average better."""
    gains = []
    for seed in range(4):
        both = []
        for n in (3, 0):
            own = dataclasses.replace(config.search, seed=seed, retreats=n)
            again = dataclasses.replace(config, search=own)
            best = search(prepared, again, tmp_path / f"{seed}_{n}")[0]
            assert best.final
            assert best.final.ratio_high <= config.search.constraint.latency_ratio
            both.append(encoder_ffn(best.subnet))
        gains.append(both[0] - both[1])
    assert min(gains) >= 0
    assert np.mean(gains) > 0


def check_killed(prepared, config, tmp_path):
    """Killed near its end, the search in folder "whole" comes to the same."""
    whole = contents(tmp_path / "whole")
    writes = sum(text.count("\n") for name, text in whole.items() if name.endswith("jsonl"))
    for moment in (1, 3, 5, 8):
        folder = tmp_path / f"at_{moment}"
        with pytest.MonkeyPatch.context() as patch:
            KillAtWrite(patch, writes - moment)
            with pytest.raises(Killed):
                search(prepared, config, folder)
        search(prepared, config, folder)
        assert contents(folder) == whole


@pytest.mark.usefixtures("no_pictures", "fake_latency")
@pytest.mark.parametrize("algorithm", ["evolution", "random_search"])
def test_room_that_is_found_is_used(prepared, tmp_path, monkeypatch, algorithm):
    """All but the largest take 0.75 times what they took when they were drawn."""
    monkeypatch.setattr(search_context, "make_objective", lambda *args: LargeEncoderIsBetter())
    fields = {"measurements": 40, "algorithm": algorithm, "iterations": 6}
    config = one_expert(fields, 0.45)
    FakeProber.slow = 0.75
    _, more, said = corrected(prepared, config, tmp_path, "use the room")
    if algorithm == "random_search":
        assert not more
        assert not said
        return
    assert len(said) == 1
    limits = [line["constraints"]["latency_ms"] for line in more]
    assert any(cost["value"] > cost["limit"] for cost in limits)
    assert all(0.74 * cost["value"] <= cost["limit"] for cost in limits)
    check_gain(prepared, config, tmp_path)
    check_killed(prepared, config, tmp_path)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_limit_that_nothing_meets(prepared, tmp_path, monkeypatch):
    """It is known before a model is fitted, and the timing process ends."""
    ended = []
    monkeypatch.setattr(FakeProber, "close", lambda self: ended.append(self.reference))
    monkeypatch.setattr(latency_model, "latency_model", lambda *args: pytest.fail("was loaded"))
    config = configured({"latency": "verified"}, latency_ms=0.001)
    with pytest.raises(InfeasibleError, match=r"latency_ms <= 0.001: the smallest one has \d"):
        search(prepared, config, tmp_path)
    assert FakeProber.timed == ended == [config.space.smallest()]


@pytest.mark.usefixtures("no_pictures", "fake_latency")
@pytest.mark.parametrize("measurements", [4, 7, 30])
def test_the_budget_holds_when_nothing_passes(prepared, tmp_path, measurements):
    config = configured({"latency": "verified", "measurements": measurements}, latency_ms=17.0)
    FakeProber.slow = 1.5
    with pytest.raises(InfeasibleError, match="passed the final latency measurement"):
        search(prepared, config, tmp_path)
    assert len(FakeProber.timed) + len(FakeProber.finals) <= measurements


@pytest.mark.usefixtures("no_pictures", "fake_latency")
@pytest.mark.parametrize("at_first", [0.8, 1.25])
def test_a_ratio_does_not_rest_on_the_largest_first_measurement(prepared, tmp_path, at_first):
    """The limit in the end is the one without an error in it, and no finalist fails."""
    config = configured({"latency": "verified", "measurements": 30}, latency_ratio=0.7)
    limits = []
    for factor in (1.0, at_first):
        FakeProber.largest_at_first = factor
        notes = []
        found = search(prepared, config, tmp_path / str(factor), notes)
        assert all(f.final and f.final.ratio_high <= 0.7 for f in found)
        last = files.read_json_lines(tmp_path / str(factor) / "history.jsonl")[-1]
        limits.append(last["constraints"]["latency_ms"]["limit"])
        assert not any("final measurement" in note for note in notes)
    assert limits[1] == pytest.approx(limits[0])


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_the_random_baseline_is_within_the_limits_as_known_at_the_end(prepared, tmp_path):
    """The largest seems slower at first than it is: some are drawn that turn out to be too slow."""
    fields = {"latency": "verified", "measurements": 40, "population": 20}
    config = configured(fields, latency_ratio=0.55)
    FakeProber.largest_at_first = 2.0
    search(prepared, config, tmp_path)
    lines = [x for x in files.read_json_lines(tmp_path / "history.jsonl") if not x["iteration"]]
    result = json.loads((tmp_path / "result.json").read_text())
    most = result["limits"]["latency_ms"]["most"]
    within = [x["subnet"] for x in lines if 1.03 * true_ms(from_json(x["subnet"])) <= most]
    assert 0 < len(within) < len(lines)
    assert result["random"]["count"] == len(within)
    assert result["random"]["first"] == within[0]


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_machine_that_is_fast_for_a_moment_makes_no_room(prepared, tmp_path):
    """Under a limit in ms, when the search has ended."""
    config = configured({"latency": "verified", "measurements": 30}, latency_ms=22.0)
    FakeProber.machine = 0.7
    notes = []
    search(prepared, config, tmp_path, notes)
    assert not any("use the room" in note for note in notes)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_ratio_does_not_mind_a_slower_machine(prepared, tmp_path):
    """What the whole machine has lost since, the largest subnet has lost too."""
    config = configured({"latency": "verified", "measurements": 30}, latency_ratio=0.8)
    ratios = []
    for name, slower in (("a", 1.0), ("b", 1.3)):
        FakeProber.machine, FakeProber.slow = slower, 1.004  # the best are a little above the limit
        found = search(prepared, config, tmp_path / name)
        assert all(f.final and f.final.ratio_high <= 0.8 for f in found)
        ratios.append([f.final.ratio for f in found if f.final])
    assert ratios[1] == pytest.approx(ratios[0])
    # The limit is as wrong as the largest subnet's latency: that is measured best.
    assert FakeProber.precise == [config.space.largest()] * 2
    # Each failure rules out what lies as far beyond the limit: few are timed in vain.
    assert len(FakeProber.finals) <= 2 * (len(ratios[0]) + 3)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
@pytest.mark.parametrize("limit", [{"latency_ms": 22.0}, {"latency_ratio": 0.7}])
def test_a_slow_moment_at_the_start_does_not_matter(prepared, tmp_path, limit):
    """What drift is corrected by took 1.4 times as long at first: latencies are told as they
    usually are, and the limit is what it is.
    """
    most = limit.get("latency_ms") or 0.7 * 1.03 * true_ms(tiny_config().space.largest())
    config = configured({"latency": "verified", "measurements": 30, "iterations": 6}, **limit)
    plain = search(prepared, config, tmp_path / "plain")
    FakeProber.at_first, FakeProber.timed = 1.4, []
    notes = []
    found = search(prepared, config, tmp_path / "slow", notes)
    for f in found:
        assert f.costs["latency_ms"] == pytest.approx(1.03 * true_ms(f.subnet))
        assert f.final
        assert f.final.slowdown == pytest.approx(1.0)
    if "latency_ms" in limit:
        # More than that moment would have allowed.
        assert min(f.costs["latency_ms"] for f in found) > most / 1.4
    else:
        assert [f.subnet for f in found] == [f.subnet for f in plain]
    result = json.loads((tmp_path / "slow" / "result.json").read_text())
    assert result["limits"]["latency_ms"]["most"] == pytest.approx(most)
    assert not any("times as long" in n for n in notes)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_slow_machine_is_waited_for(prepared, tmp_path, monkeypatch):
    """Slow when the search has ended, once more in the middle of a final measurement."""
    config = configured({"latency": "verified", "measurements": 30}, latency_ms=22.0)
    plain = search(prepared, config, tmp_path / "plain")
    looks = iter([1.4, 1.4, 1.0, 1.0] + [1.0] * 10)
    finals = iter([1.4, 1.0] + [1.0] * 10)
    final = FakeProber.verify

    def verify(prober, subnet, largest, reference_ms):
        prober.machine = next(finals)
        return final(prober, subnet, largest, reference_ms)

    monkeypatch.setattr(FakeProber, "verify", verify)
    monkeypatch.setattr(FakeProber, "slowdown", lambda *args: next(looks))
    FakeProber.timed, FakeProber.finals = [], []
    notes = []
    found = search(prepared, config, tmp_path / "slow", notes)
    assert [f.subnet for f in found] == [f.subnet for f in plain]
    assert FakeProber.finals[0] == FakeProber.finals[1]
    result = json.loads((tmp_path / "slow" / "result.json").read_text())
    assert result["measurements"] == len(FakeProber.timed) + len(FakeProber.finals)
    waits = [n for n in notes if "waiting for it, up to" in n]
    assert len(waits) == 1
    assert "the machine takes 1.4 times as long as during most of the search" in waits[0]


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_disturbed_ratio_is_measured_again(prepared, tmp_path, monkeypatch):
    """The machine becomes slower in the middle of a final measurement: its interval is wide."""
    config = configured({"latency": "verified", "measurements": 30}, latency_ratio=0.8)
    plain = search(prepared, config, tmp_path / "plain")
    finals = iter([1.4, 1.0] + [1.0] * 10)
    final = FakeProber.verify

    def verify(prober, subnet, largest, reference_ms):
        prober.machine = machine = next(finals)
        found = final(prober, subnet, largest, reference_ms)
        return dataclasses.replace(found, ratio_high=found.ratio_high * machine)

    monkeypatch.setattr(FakeProber, "verify", verify)
    monkeypatch.setattr(FakeProber, "slowdown", lambda *args: 1.0)
    FakeProber.finals = []
    found = search(prepared, config, tmp_path / "disturbed")
    assert [f.subnet for f in found] == [f.subnet for f in plain]
    assert FakeProber.finals[0] == FakeProber.finals[1]


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_one_outlier_rules_out_little(prepared, tmp_path, monkeypatch):
    """The best is far slower in its final measurement than when it was drawn; only that one is."""
    config = configured({"latency": "verified", "measurements": 30}, latency_ms=22.0)
    plain = search(prepared, config, tmp_path / "plain")
    best, final = plain[0].subnet, FakeProber.verify

    def verify(prober, subnet, largest, reference_ms):
        prober.slow = 1.5 if subnet == best else 1.0
        return final(prober, subnet, largest, reference_ms)

    monkeypatch.setattr(FakeProber, "verify", verify)
    FakeProber.finals = []
    found = search(prepared, config, tmp_path / "outlier")
    assert FakeProber.finals[0] == best
    # What came second is found: at first it is passed over, and then returned to.
    assert plain[1].subnet in [f.subnet for f in found]
    assert len(found) == len(plain)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_the_smallest_is_the_last_resort(prepared, tmp_path, monkeypatch):
    """A limit that only the smallest subnet meets, as measured, finds it, drawn or not."""
    smallest = tiny_config().space.smallest()
    most = 1.1 * true_ms(smallest)  # by the predictions, others are within the limit too

    def measure(prober, subnet, reference_ms, limit, **_):
        prober.timed.append(subnet)
        ms = (1.03 if subnet == smallest else 1.2) * true_ms(subnet)
        return Measured(ms, ms, ms, beside(), prober.how)

    monkeypatch.setattr(FakeProber, "measure", measure)
    config = configured({"latency": "verified", "measurements": 30}, latency_ms=most)
    found = search(prepared, config, tmp_path)
    assert [f.subnet for f in found] == [smallest]
    assert len(FakeProber.timed) > 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best"][0]["verified"]["high_ms"] <= most
    assert from_json(json.loads((tmp_path / "best_1.json").read_text())) == smallest


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_a_front_is_within_the_limits_and_best_first(prepared, tmp_path):
    """Best by the whole validation set, though the crowd is scored on a sample of it."""
    config = configured(
        {"algorithm": "nsga2", "latency": "verified", "measurements": 30, "population": 12,
         "eval_pairs": 3, "keep": 4},
        latency_ms=22.0,
    )  # fmt: skip
    found = search(prepared, config, tmp_path / "limited")
    stored = json.loads((tmp_path / "limited" / "front.json").read_text())["subnets"]
    assert stored
    assert all(x["costs"]["latency_ms"] <= 22.0 for x in stored)
    assert [f.loss for f in found] == sorted(f.loss for f in found)
    assert len(FakeProber.timed) + len(FakeProber.finals) <= 30
    # Some of every round's front are measured, not the last one's alone.
    lines = ReplayLog(tmp_path / "limited" / MEASUREMENTS).stored(LATENCY)
    assert len(lines) > 4

    config = configured(
        {"algorithm": "nsga2", "front": ("gflops",), "population": 12, "eval_pairs": 3, "keep": 4},
        gflops=1.0,
    )  # fmt: skip
    found = search(prepared, config, tmp_path / "counted")
    assert len(found) == 4
    assert [f.loss for f in found] == sorted(f.loss for f in found)
    best = json.loads((tmp_path / "counted" / "result.json").read_text())["best"]
    assert any(row["loss"] != row["sample_loss"] for row in best)


@pytest.mark.usefixtures("no_pictures", "fake_latency")
def test_what_was_measured_before_the_first_score_is_kept(prepared, tmp_path):
    run, data, _, params = prepared
    config = configured({"latency": "partially_gold"}, latency_ms=26.0)

    def program(config):
        """As the command `search` does it."""
        own = Run(config, run.path, Silent())
        claim_search(own, tmp_path, 8)
        return run_search(own, tmp_path, data, params)

    with pytest.MonkeyPatch.context() as patch:
        KillAtWrite(patch, 6)
        with pytest.raises(Killed):
            program(config)
    assert not (tmp_path / "history.jsonl").exists()
    first = list(FakeProber.timed)
    assert len(first) == 6
    program(config)
    assert len(FakeProber.timed) == len(set(FakeProber.timed)) + 1  # the one that was being written
    # The same folder for int8, whose latencies are others.
    int8 = dataclasses.replace(config, export=dataclasses.replace(config.export, quantize="int8"))
    with pytest.raises(UserError, match="made with another config: quantize is 'none' there"):
        program(int8)


def test_a_folder_of_anything_else_is_left_alone(prepared, tmp_path):
    run, _, _, _ = prepared
    workdir.claim(tmp_path, "latency measurements", {}, begun=False)
    (tmp_path / MEASUREMENTS).write_text("{}\n")
    with pytest.raises(UserError, match="is of kind latency measurements, not search"):
        claim_search(run, tmp_path, 1)
    assert (tmp_path / MEASUREMENTS).exists()


def test_limits_together(prepared, tmp_path):
    config = configured(size_mb=0.05, gflops=2.5e-4, params_m=0.006)
    found = search(prepared, config, tmp_path)
    for f in found:
        assert f.costs["size_mb"] <= 0.05
        assert f.costs["gflops"] <= 2.5e-4
        assert f.costs["params_m"] <= 0.006
        assert f.final is None
    for name in ("search", "progress", "front", "best_1"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("fake_latency")
def test_front_over_three(prepared, tmp_path):
    config = configured(
        {"algorithm": "nsga2", "front": ("latency_ms", "size_mb"), "latency": "verified",
         "measurements": 12, "population": 10},
        size_mb=1.0,
    )  # fmt: skip
    search(prepared, config, tmp_path)
    stored = json.loads((tmp_path / "front.json").read_text())
    assert stored["over"] == ["loss", "latency_ms", "size_mb"]
    points = [
        (x["loss"], x["costs"]["latency_ms"], x["costs"]["size_mb"]) for x in stored["subnets"]
    ]
    assert len(front(points)) == len(points)
    measured = ReplayLog(tmp_path / MEASUREMENTS).stored(LATENCY)
    assert 1 < len(measured) <= 12
    on_front = {from_json(x["subnet"]) for x in stored["subnets"]}
    assert on_front & measured.keys()


def test_a_score_of_translations_as_objective(prepared, tmp_path):
    config = configured(
        {"objective": "chrf", "objective_sentences": 8, "iterations": 1, "population": 2,
         "mutations": 1, "crossovers": 0, "parents": 1, "keep": 1}
    )  # fmt: skip
    found = search(prepared, config, tmp_path)
    assert 0 < found[0].loss <= 100
    assert json.loads((tmp_path / "result.json").read_text())["objective"]["name"] == "chrf"


def test_seeds_are_compared(prepared, tmp_path):
    for seed in (1, 2):
        search(prepared, configured({"seed": seed}), tmp_path / f"seed_{seed}")
    compared = search_seeds.compare(tmp_path, (1, 2))
    assert set(compared["seeds"]) == {"1", "2"}
    rows = compared["seeds"].values()
    assert all(0 < row["hypervolume_share"] <= 1 for row in rows)
    assert compared["best_mean"] == pytest.approx(np.mean([row["best"] for row in rows]))
    histories = [(tmp_path / f"seed_{s}" / "history.jsonl").read_text() for s in (1, 2)]
    assert histories[0] != histories[1]
    assert (tmp_path / "seeds.png").stat().st_size > 10_000


def test_local_search_from_a_file(prepared, tmp_path):
    config = configured()
    start = config.space.smallest()
    subnet_files.save(start, tmp_path / "start.json")
    config = configured({"algorithm": "local", "start": str(tmp_path / "start.json")})
    found = search(prepared, config, tmp_path / "search")
    lines = ScoreHistory(tmp_path / "search").lines
    assert lines[0]["origin"] == "start"
    assert from_json(lines[0]["subnet"]) == start
    assert found[0].loss <= lines[0]["loss"] or len(lines) > 1


def ranking_file(path, space):
    """A ranking's file of 12 subnets, whose trained losses fall with the decoder's depth."""
    rng = np.random.default_rng(4)
    subnets = [space.sample(rng) for _ in range(12)]
    rows = [
        {"subnet": to_json(s), "inherited": 9.0, "trained": 4.0 - len(s.decoder.layers)}
        for s in subnets
    ]
    files.write_json(path, {"version": 1, "subnets": rows})
    return subnets


def test_losses_are_corrected_by_trained_subnets(prepared, tmp_path, no_pictures):
    limit = {"gflops": 1e-2}  # that all meet
    plain = configured({"iterations": 1}, **limit)
    path = tmp_path / "rank.json"
    known = ranking_file(path, plain.space)
    config = configured({"iterations": 1, "calibration": str(path)}, **limit)
    folder, notes = tmp_path / "search", []
    found = search(prepared, config, folder, notes)
    assert "inherited losses are corrected by those of 12 trained subnets" in notes
    _, data, trained, params = prepared
    scorer = PopulationScorer(trained, config.training, params)
    losses = functools.partial(scorer.losses, scorer.prepare(data.valid))
    own = calibration.fit(known, losses(known), [4.0 - len(s.decoder.layers) for s in known])
    best = found[0].subnet
    assert found[0].loss == pytest.approx(own.correct([best], losses([best]))[0], rel=1e-5)
    # What depth is worth was learned: an untrained supernet knows nothing of it.
    lines = ScoreHistory(folder).lines
    depths = [len(line["subnet"]["decoder"]["layers"]) for line in lines]
    assert np.corrcoef(depths, [line["loss"] for line in lines])[0, 1] < -0.9
    assert "corrected" in json.loads((folder / "result.json").read_text())["objective"]["label"]


def test_a_calibration_that_changed(prepared, tmp_path):
    """A search goes on only with the trained subnets that it began with."""
    run = prepared[0]
    path = tmp_path / "rank.json"
    config = configured({"calibration": str(path)})
    ranking_file(path, config.space)
    changed = dataclasses.replace(run, config=config)
    claim_search(changed, tmp_path / "search", 8)
    # Of a kill before the first score: another ranking, or another supernet, may follow.
    inherited = tmp_path / "search" / "calibration.json"
    files.write_json(inherited, {"version": 1, "inherited": [1.0]})
    claim_search(changed, tmp_path / "search", 16)
    assert not inherited.exists()
    claim_search(changed, tmp_path / "search", 8)
    (tmp_path / "search" / "history.jsonl").write_text("")
    files.write_json(inherited, {"version": 1, "inherited": [1.0]})
    claim_search(changed, tmp_path / "search", 8)
    assert inherited.exists()
    # Where the file is does not matter.
    moved = path.rename(tmp_path / "moved.json")
    own = dataclasses.replace(config.search, calibration=str(moved))
    changed = dataclasses.replace(run, config=dataclasses.replace(config, search=own))
    claim_search(changed, tmp_path / "search", 8)
    content = moved.read_text()
    stored = json.loads(content)
    stored["subnets"][0]["trained"] = 3.5
    files.write_json(moved, stored)
    with pytest.raises(UserError, match="calibration is"):
        claim_search(changed, tmp_path / "search", 8)
    moved.unlink()
    with pytest.raises(UserError, match=r"moved\.json"):
        claim_search(changed, tmp_path / "search", 8)
    (tmp_path / "search" / "result.json").write_text("{}")  # finished, it needs no file
    claim_search(changed, tmp_path / "search", 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "is no ranking; give the rank.json of launch/rank.py"),
        ({"version": 1, "subnets": [{"subnet": {}}]}, "is no ranking"),
        (7, "has 7 trained subnets; at least 8 are needed: launch/rank.py --subnets=16"),
        ("not finite", "is no ranking"),
        ("another space", "subnet 1: "),
    ],
)
def test_calibrations_that_cannot_be_used(tmp_path, content, words):
    config = configured({"calibration": str(tmp_path / "rank.json")})
    ranking_file(tmp_path / "rank.json", config.space)
    stored = json.loads((tmp_path / "rank.json").read_text())
    if content == "not finite":
        content = stored
        content["subnets"][3]["trained"] = math.nan
    if isinstance(content, int):
        content = {**stored, "subnets": stored["subnets"][:content]}
    if content == "another space":
        content = stored
        content["subnets"][0]["subnet"]["encoder"]["embed_dim"] = 4096
    files.write_json(tmp_path / "rank.json", content)
    with pytest.raises(UserError, match=words):
        search_context.check(config, (72, 72))


def test_a_calibration_of_another_corpus(tmp_path):
    """Known where the ranking's manifest is beside its file."""
    path = tmp_path / "rank.json"
    config = configured({"calibration": str(path)})
    ranking_file(path, config.space)
    groups = config.groups("data", "tokenizer")
    workdir.write(tmp_path, "ranking", {"config": groups})
    search_context.check(config, (72, 72))
    groups["data"] = dataclasses.replace(config.data, max_length=50)
    workdir.write(tmp_path, "ranking", {"config": groups})
    with pytest.raises(UserError, match="made with another group data of the config"):
        search_context.check(config, (72, 72))


def test_no_calibration_of_other_objectives():
    with pytest.raises(UserError, match=r"corrects losses, but search.objective is 'bleu'"):
        configured({"calibration": "rank.json", "objective": "bleu"})


def test_another_beam_scores_otherwise(prepared, tmp_path):
    """A search by BLEU does not go on with another beam; one by loss does not mind."""
    for objective, refused in (("bleu", True), ("loss", False)):
        config = configured({"objective": objective})
        folder = tmp_path / objective
        claim_search(dataclasses.replace(prepared[0], config=config), folder, 8)
        (folder / "history.jsonl").write_text("")
        export = dataclasses.replace(config.export, beam_sizes=(1, 2))
        run = dataclasses.replace(prepared[0], config=dataclasses.replace(config, export=export))
        if refused:
            with pytest.raises(UserError, match="objective_beam is 2 there and 1 here"):
                claim_search(run, folder, 8)
        else:
            claim_search(run, folder, 8)
    # Earlier versions did not write the beam: their searches go on.
    folder = tmp_path / "bleu"
    stored = workdir.settings(folder, "search")
    del stored["objective_beam"]
    workdir.write(folder, "search", {"config": stored})
    config = configured({"objective": "bleu"})
    claim_search(dataclasses.replace(prepared[0], config=config), folder, 8)


def test_a_start_without_the_width_of_queries_has_the_space_s(tmp_path):
    config = configured()
    subnet = to_json(config.space.smallest())
    del subnet["qkv_dim"]
    files.write_json(tmp_path / "start.json", subnet)
    config = configured({"algorithm": "local", "start": str(tmp_path / "start.json")})
    search_context.check(config, (72, 72))
