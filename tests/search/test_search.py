"""The search algorithms, on functions that need no model."""

import dataclasses

import numpy as np
import pytest
from conftest import elastic_space

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import to_json
from automoe_jax.latency.records import History
from automoe_jax.search.config import ConstraintConfig, SearchConfig
from automoe_jax.search.evolution import InfeasibleError, search
from automoe_jax.search.front import crowding, front, hypervolume, ranked
from automoe_jax.search.limits import Limit, Limits

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


def run(config=CONFIG, limit=2.0e6, seed=0, told=None, **options):
    calls = []

    def score(candidates):
        calls.extend(c.subnet for c in candidates)
        return [fake_loss(c.subnet) for c in candidates]

    found = search(
        SPACE, config, np.random.default_rng(seed), lambda s: flops(s) <= limit, score,
        told or (lambda iteration, scored: None), **options,
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


def shape(subnet) -> tuple[int, ...]:
    encoder, decoder = subnet.encoder, subnet.decoder
    return encoder.embed_dim, len(encoder.layers), decoder.embed_dim, len(decoder.layers)


def test_every_shape_that_fits_is_drawn():
    """Also those of which hardly a subnet is within the limit, as a search may end there."""
    subnets = [x.smallest() for x in SPACE.shapes()]
    assert len({shape(s) for s in subnets}) == len(subnets)
    ordered = sorted(subnets, key=flops)
    fits = len(ordered) // 2
    limit = 1.001 * flops(ordered[fits - 1])
    config = dataclasses.replace(CONFIG, algorithm="random_search")
    found, _ = run(config, limit=limit)
    expected = {shape(s) for s in subnets if flops(s) <= limit}
    assert len(expected) >= fits
    assert {shape(s.candidate.subnet) for s in found} == expected
    assert all(flops(s.candidate.subnet) <= limit for s in found)
    # Drawn as a whole, they do not come up.
    found, _ = run(config, limit=limit, by_shape=False)
    assert len({shape(s.candidate.subnet) for s in found}) < len(expected)
    assert all(flops(s.candidate.subnet) <= limit for s in found)


def test_tight_limit_ends():
    smallest = flops(SPACE.smallest())
    found, _ = run(limit=smallest * 1.02)
    assert found
    assert all(flops(s.candidate.subnet) <= smallest * 1.02 for s in found)
    with pytest.raises(InfeasibleError, match="no subnet within the limits"):
        run(dataclasses.replace(CONFIG, max_tries=3), limit=smallest * 0.9)


def limit(name, most, value):
    return Limit(name, lambda: most, value, lambda subnet: "counted", name)


def test_infeasible_limit_names_the_smallest():
    limits = Limits([limit("gflops", 1e-9, lambda s: flops(s) / 1e9)])
    with pytest.raises(InfeasibleError) as e:
        limits.require(SPACE.smallest())
    assert "no subnet can meet gflops <= 1e-09: the smallest one has" in str(e.value)
    assert "raise search.constraint.gflops" in str(e.value)


def test_history_survives_a_torn_line(tmp_path):
    rng = np.random.default_rng(0)
    a, b = SPACE.sample(rng), SPACE.sample(rng)
    history = History(tmp_path)
    history.scored(a, 1.5, iteration=0)
    history.measured("latency_ms", a, 3.0, "timed", low=2.9, high=3.1)
    for name in ("history.jsonl", "measurements.jsonl"):
        with (tmp_path / name).open("a") as f:
            f.write('{"loss": 2.0, "subn')  # a kill tore this line
    again = History(tmp_path)
    assert again.loss(a) == 1.5
    assert again.loss(b) is None
    assert again.value("latency_ms", a) == (3.0, "timed")
    assert again.about("latency_ms", a)["high"] == 3.1
    assert again.value("latency_ms", b) is None
    again.scored(b, 2.5, iteration=1)
    assert [line["subnet"] for line in History(tmp_path).lines] == [to_json(a), to_json(b)]


def test_cheap_limits_come_first():
    def never(subnet):
        raise AssertionError("timed although FLOPs had ruled it out")

    limits = Limits([limit("latency_ms", 1.0, never), limit("gflops", 0.0, flops)])
    assert not limits.within(SPACE.largest())


WEIGHTS = np.random.default_rng(9).normal(size=200)


def layered_loss(subnet) -> float:
    """A landscape where layers matter each on its own."""
    stacks = (subnet.encoder, subnet.decoder)
    sizes = [f for stack in stacks for layer in stack.layers for f in layer.experts]
    return 5 - 1e-6 * flops(subnet) + 0.02 * float(WEIGHTS[: len(sizes)] @ np.array(sizes))


def layered(algorithm: str, seed: int, limit: float, **options):
    return search(
        SPACE, dataclasses.replace(CONFIG, algorithm=algorithm), np.random.default_rng(seed),
        lambda s: flops(s) <= limit, lambda group: [layered_loss(c.subnet) for c in group],
        **options,
    )  # fmt: skip


def test_evolution_beats_random_search_at_equal_budget():
    found = {
        algorithm: np.array([layered(algorithm, seed, 2.0e6)[0].loss for seed in range(20)])
        for algorithm in ("evolution", "random_search")
    }
    assert found["evolution"].mean() < found["random_search"].mean()
    assert (found["evolution"] < found["random_search"]).sum() >= 16


def test_selection_is_asked_for_parents():
    """What a selection leaves out has no children from then on."""
    banned = [set()]

    def select(scored, count, iteration):
        banned.append(banned[-1] | {s.candidate.subnet for s in scored[:2]})
        return [s for s in scored if s.candidate.subnet not in banned[-1]][:count]

    found, _ = run(select=select)
    children = [s.candidate for s in found if s.candidate.parents]
    assert children
    for child in children:
        assert not set(child.parents) & banned[child.iteration]


def test_local_search_starts_where_it_is_told():
    start = SPACE.sample(np.random.default_rng(11))
    config = dataclasses.replace(CONFIG, algorithm="local", start="x.json")
    found, _ = run(config, limit=flops(start), start=start)
    assert start in {s.candidate.subnet for s in found}
    assert found[0].loss <= fake_loss(start)
    first = [s.candidate.subnet for s in found if s.candidate.iteration == 0]

    def changed(subnets):
        """Mean number of layers and widths that are not the start's."""
        pairs = [
            zip(
                (s.encoder.embed_dim, s.decoder.embed_dim, *s.encoder.layers, *s.decoder.layers),
                (*(x.embed_dim for x in (start.encoder, start.decoder)), *start.encoder.layers,
                 *start.decoder.layers),
                strict=False,
            )
            for s in subnets
        ]  # fmt: skip
        return np.mean([sum(a != b for a, b in pair) for pair in pairs])

    rng = np.random.default_rng(0)
    mutants = [SPACE.mutate(start, rng, CONFIG.mutation_probability) for _ in range(50)]
    assert changed(first) < 0.8 * changed(mutants)
    # Where the start is too large, what is around it and small enough.
    found, _ = run(config, limit=0.8 * flops(start), start=start)
    assert all(flops(s.candidate.subnet) <= 0.8 * flops(start) for s in found)
    with pytest.raises(InfeasibleError, match="start from a smaller subnet"):
        run(config, limit=0.5 * flops(SPACE.smallest()), start=start)


def test_nsga2_returns_a_wide_front():
    def costs(subnet):
        return (flops(subnet),)

    def area(scored):
        points = [(flops(s.candidate.subnet), s.loss) for s in scored]
        return hypervolume(points, (flops(SPACE.largest()), 15.0))

    areas = {"nsga2": [], "random_search": []}
    for seed in range(10):
        for algorithm, own in areas.items():
            found = layered(algorithm, seed, np.inf, costs=costs)
            assert len({s.candidate.subnet for s in found}) == len(found) == CONFIG.samples
            own.append(area(found))
            if algorithm == "nsga2":
                assert len(front([(s.loss, flops(s.candidate.subnet)) for s in found])) >= 5
    nsga2, random = map(np.array, areas.values())
    assert nsga2.mean() > random.mean()
    assert (nsga2 > random).sum() >= 7


def test_front():
    points = [(1.0, 5.0), (2.0, 4.0), (2.5, 4.5), (3.0, 1.0), (0.5, 5.0), (4.0, 1.0)]
    assert front(points) == [4, 1, 3]
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [0]
    assert front([]) == []


def naive_ranks(points):
    left, ranks, rank = set(range(len(points))), {}, 0
    while left:
        own = {
            i
            for i in left
            if not any(
                all(a <= b for a, b in zip(points[j], points[i], strict=True))
                and points[j] != points[i]
                for j in left
            )
        }
        ranks |= dict.fromkeys(own, rank)
        left -= own
        rank += 1
    return [ranks[i] for i in range(len(points))]


def test_ranks_are_those_of_peeling_fronts_off():
    rng = np.random.default_rng(0)
    for n_costs in (2, 3):
        points = [tuple(p) for p in rng.integers(0, 6, size=(40, n_costs)).tolist()]
        assert ranked(points) == naive_ranks(points)


def test_crowding_and_hypervolume():
    # By hand: the ends are infinite; (4 - 0) / 4 + (8 - 0) / 8 and so on in the middle.
    room = crowding([(0.0, 8.0), (1.0, 4.0), (4.0, 0.0)])
    assert room.tolist() == [np.inf, 2.0, np.inf]
    assert hypervolume([(1.0, 2.0), (2.0, 1.0), (2.5, 2.5)], (3.0, 3.0)) == 3.0
    assert hypervolume([(4.0, 1.0)], (3.0, 3.0)) == 0.0


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"search\.algorithm is 'x'"):
        SearchConfig(algorithm="x")
    with pytest.raises(ValueError, match=r"constraint\.size_mb is -1"):
        ConstraintConfig(size_mb=-1)
    with pytest.raises(ValueError, match=r"search\.latency is 'guess'; allowed: verified"):
        SearchConfig(latency="guess")
    with pytest.raises(ValueError, match=r"search\.front has 'x'"):
        SearchConfig(front=("x",))
    for wrong in ({"algorithm": "local"}, {"algorithm": "random_search", "start": "x.json"}):
        with pytest.raises(ValueError, match="starts from a subnet file"):
            SearchConfig(**wrong)
    with pytest.raises(ValueError, match=r"search\.measurements is 3; a verified search needs"):
        SearchConfig(measurements=3)
    assert SearchConfig(measurements=3, latency="predicted").measurements == 3
