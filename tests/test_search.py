"""The search algorithms, on functions that need no model."""

import dataclasses

import numpy as np
import pytest
from conftest import elastic_space

from automoe_jax import complexity
from automoe_jax.search.config import ConstraintConfig, SearchConfig
from automoe_jax.search.evolution import InfeasibleError, front, search
from automoe_jax.search.history import History
from automoe_jax.search.limits import Limit, Limits
from automoe_jax.subnet import to_json

SPACE = elastic_space()
CONFIG = SearchConfig(
    iterations=4, population=20, parents=5, mutations=8, crossovers=8, max_tries=50
)


def flops(subnet) -> float:
    return complexity.count(subnet).flops


def fake_loss(subnet) -> float:
    """Falls with FLOPs, and a little with the number of 24-wide decoder experts."""
    wide = sum(f == 24 for layer in subnet.decoder.layers for f in layer.experts)
    return 10 - 2e-6 * flops(subnet) - 0.05 * wide


def run(config=CONFIG, limit=2.0e6, seed=0, told=None):
    calls = []

    def score(candidates):
        calls.extend(c.subnet for c in candidates)
        return [fake_loss(c.subnet) for c in candidates]

    found = search(
        SPACE, config, np.random.default_rng(seed), lambda s: flops(s) <= limit, score,
        told or (lambda iteration, scored: None),
    )  # fmt: skip
    return found, calls


def test_evolution_keeps_the_limit_and_beats_its_first_population():
    sizes = []
    first = []

    def told(iteration, scored):
        sizes.append(len(scored))
        if iteration == 0:
            first.extend(s.loss for s in scored)

    found, calls = run(told=told)
    assert all(flops(s.candidate.subnet) <= 2.0e6 for s in found)
    assert [s.loss for s in found] == sorted(s.loss for s in found)
    assert found[0].loss < min(first)
    # The last population is scored too; nothing is scored twice.
    assert sizes == [20] + [5 + 8 + 8] * 4
    assert len(calls) == len(set(calls)) == len(found)


def test_search_is_seeded():
    assert run(seed=3)[0] == run(seed=3)[0]
    assert run(seed=3)[0] != run(seed=4)[0]


def test_children_come_from_parents():
    found, _ = run()
    by_origin = {}
    for s in found:
        by_origin.setdefault(s.candidate.origin, []).append(s.candidate)
    assert set(by_origin) == {"sample", "mutation", "crossover"}
    assert all(len(c.parents) == 1 for c in by_origin["mutation"])
    assert all(len(c.parents) == 2 for c in by_origin["crossover"])
    assert all(c.iteration == 0 for c in by_origin["sample"])


def test_baselines():
    one, calls = run(dataclasses.replace(CONFIG, algorithm="random_sample"))
    assert len(one) == len(calls) == 1
    many, _ = run(dataclasses.replace(CONFIG, algorithm="random_search"))
    assert len(many) == CONFIG.samples == 20 + 4 * 16
    assert {s.candidate.origin for s in many} == {"sample"}
    # What is drawn first is the same: the baseline is the first of the random search.
    assert one[0].candidate.subnet in {s.candidate.subnet for s in many}


def test_tight_limit_ends():
    smallest = flops(SPACE.smallest())
    found, _ = run(limit=smallest * 1.02)
    assert found
    assert all(flops(s.candidate.subnet) <= smallest * 1.02 for s in found)
    with pytest.raises(InfeasibleError, match="no subnet within the limits"):
        run(dataclasses.replace(CONFIG, max_tries=3), limit=smallest * 0.9)


def test_infeasible_limit_names_the_smallest(tmp_path):
    limit = Limit("gflops", 1e-9, lambda s: flops(s) / 1e9, "counted", "gflops")
    limits = Limits([limit], History(tmp_path))
    with pytest.raises(InfeasibleError) as e:
        limits.require(SPACE.smallest())
    assert "no subnet can meet gflops <= 1e-09: the smallest one has" in str(e.value)
    assert "raise constraint.gflops" in str(e.value)


def test_nothing_is_measured_or_scored_twice(tmp_path):
    rng = np.random.default_rng(0)
    a, b = SPACE.sample(rng), SPACE.sample(rng)
    measured = []

    def slow(subnet):
        measured.append(subnet)
        return flops(subnet)

    def limits():
        cheap = Limit("gflops", 1e9, flops, "counted", "gflops")
        return Limits(
            [Limit("latency_ms", 1e9, slow, "timed", "latency_ms"), cheap], History(tmp_path)
        )

    for _ in range(2):  # the second time from what is on disk
        own = limits()
        assert own.within(a)
        assert own.within(b)
        assert own.within(a)
    assert measured == [a, b]
    history = History(tmp_path)
    history.scored(a, 1.5, iteration=0)
    with (tmp_path / "history.jsonl").open("a") as f:
        f.write('{"loss": 2.0, "subn')  # a kill tore this line
    again = History(tmp_path)
    assert again.loss(a) == 1.5
    assert again.loss(b) is None
    again.scored(b, 2.5, iteration=1)
    assert [line["subnet"] for line in History(tmp_path).lines] == [to_json(a), to_json(b)]


def test_cheap_limits_come_first(tmp_path):
    def never(subnet):
        raise AssertionError("timed although FLOPs had ruled it out")

    limits = Limits(
        [
            Limit("latency_ms", 1.0, never, "timed", "latency_ms"),
            Limit("gflops", 0.0, flops, "counted", "gflops"),
        ],
        History(tmp_path),
    )
    assert not limits.within(SPACE.largest())


def test_front():
    points = [(1.0, 5.0), (2.0, 4.0), (2.5, 4.5), (3.0, 1.0), (0.5, 5.0), (4.0, 1.0)]
    assert front(points) == [4, 1, 3]


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"search\.algorithm is 'x'"):
        SearchConfig(algorithm="x")
    with pytest.raises(ValueError, match="set one of them to 0"):
        ConstraintConfig(latency_ms=1.0, latency_ratio=0.5)
