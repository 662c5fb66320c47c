"""The search algorithms, on functions that need no model."""

import dataclasses

import numpy as np
import pytest
from conftest import elastic_space

from automoe_jax.architecture import counts as complexity
from automoe_jax.search import algorithms
from automoe_jax.search.candidates import InfeasibleError, Scored, best_first
from automoe_jax.search.config import ConstraintConfig, SearchConfig
from automoe_jax.search.drawing import Draws
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


def search(config, seed, limit, loss, on_iteration=None, select=lambda scored: scored, **options):
    """Every candidate that an algorithm asks for, scored by `loss`, best first."""
    costs = options.pop("costs", lambda subnet: (flops(subnet),))
    rng = np.random.default_rng(seed)
    draws = Draws(SPACE, rng, config, lambda s: flops(s) <= limit, **options)
    algorithm = algorithms.make(config, draws, costs)
    seen, iteration = {}, 0
    while population := algorithm.ask():
        for c in population:
            if c.subnet not in seen:
                seen[c.subnet] = Scored(c, loss(c.subnet))
        scored = best_first([seen[c.subnet] for c in population])
        if on_iteration:
            on_iteration(iteration, scored)
        algorithm.tell(select(scored))
        iteration += 1
    return best_first(list(seen.values()))


def run(config=CONFIG, limit=2.0e6, seed=0, on_iteration=None, **options):
    return search(config, seed, limit, fake_loss, on_iteration, **options)


def test_evolution_keeps_the_limit_and_beats_its_first_population():
    sizes = []
    first = []

    def on_iteration(iteration, scored):
        sizes.append(len(scored))
        if iteration == 0:
            first.extend(s.loss for s in scored)

    found = run(on_iteration=on_iteration)
    assert all(flops(s.subnet) <= 2.0e6 for s in found)
    assert [s.loss for s in found] == sorted(s.loss for s in found)
    assert found[0].loss < min(first)
    # The last population is scored too; parents live on, children are new.
    assert sizes == [20] + [5 + 8 + 8] * 4
    assert len(found) == 20 + 4 * (8 + 8)


def test_search_is_seeded():
    assert run(seed=3) == run(seed=3)
    assert run(seed=3) != run(seed=4)


def test_children_come_from_parents():
    found = run()
    by_origin = {}
    for s in found:
        by_origin.setdefault(s.candidate.origin, []).append(s.candidate)
    assert set(by_origin) == {"sample", "mutation", "crossover"}
    assert all(len(c.parents) == 1 for c in by_origin["mutation"])
    assert all(len(c.parents) == 2 for c in by_origin["crossover"])
    assert all(c.iteration == 0 for c in by_origin["sample"])


def test_baselines():
    one = run(dataclasses.replace(CONFIG, algorithm="random_sample"))
    assert len(one) == 1
    many = run(dataclasses.replace(CONFIG, algorithm="random_search"))
    assert len(many) == CONFIG.samples == 20 + 4 * 16
    assert {s.candidate.origin for s in many} == {"sample"}
    # What is drawn first is the same: the baseline is the first of the random search.
    assert one[0].subnet in {s.subnet for s in many}


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
    found = run(config, limit=limit)
    expected = {shape(s) for s in subnets if flops(s) <= limit}
    assert len(expected) >= fits
    assert {shape(s.subnet) for s in found} == expected
    assert all(flops(s.subnet) <= limit for s in found)
    # Drawn as a whole, they do not come up.
    found = run(config, limit=limit, stratified=False)
    assert len({shape(s.subnet) for s in found}) < len(expected)
    assert all(flops(s.subnet) <= limit for s in found)


def test_tight_limit_ends():
    smallest = flops(SPACE.smallest())
    found = run(limit=smallest * 1.02)
    assert found
    assert all(flops(s.subnet) <= smallest * 1.02 for s in found)
    with pytest.raises(InfeasibleError, match="no subnet within the limits"):
        run(dataclasses.replace(CONFIG, max_tries=3), limit=smallest * 0.9)


def limit(name, most, value):
    return Limit(name, name, lambda: most, value, lambda subnet: "counted")


def test_infeasible_limit_names_the_smallest():
    limits = Limits((limit("gflops", 1e-9, lambda s: flops(s) / 1e9),))
    with pytest.raises(InfeasibleError) as e:
        limits.require(SPACE.smallest())
    assert "no subnet can meet gflops <= 1e-09: the smallest one has" in str(e.value)
    assert "raise search.constraint.gflops" in str(e.value)


def test_limits_are_checked_in_order():
    def never(subnet):
        raise AssertionError("timed although FLOPs had ruled it out")

    limits = Limits((limit("gflops", 0.0, flops), limit("latency_ms", 1.0, never)))
    assert not limits.within(SPACE.largest())


WEIGHTS = np.random.default_rng(9).normal(size=200)


def layered_loss(subnet) -> float:
    """A landscape where layers matter each on its own."""
    stacks = (subnet.encoder, subnet.decoder)
    sizes = [f for stack in stacks for layer in stack.layers for f in layer.experts]
    return 5 - 1e-6 * flops(subnet) + 0.02 * float(WEIGHTS[: len(sizes)] @ np.array(sizes))


def layered(algorithm: str, seed: int, limit: float, **options):
    config = dataclasses.replace(CONFIG, algorithm=algorithm)
    return search(config, seed, limit, layered_loss, **options)


def test_evolution_beats_random_search_at_equal_budget():
    found = {
        algorithm: np.array([layered(algorithm, seed, 2.0e6)[0].loss for seed in range(20)])
        for algorithm in ("evolution", "random_search")
    }
    assert found["evolution"].mean() < found["random_search"].mean()
    assert (found["evolution"] < found["random_search"]).sum() >= 16


def test_candidates_that_are_not_told_have_no_children():
    banned = [set()]

    def select(scored):
        banned.append(banned[-1] | {s.subnet for s in scored[:2]})
        return [s for s in scored if s.subnet not in banned[-1]]

    found = run(select=select)
    children = [s.candidate for s in found if s.candidate.parents]
    assert children
    for child in children:
        assert not set(child.parents) & banned[child.iteration]


def test_local_search_starts_where_it_is_told():
    start = SPACE.sample(np.random.default_rng(11))
    config = dataclasses.replace(CONFIG, algorithm="local", start="x.json")
    found = run(config, limit=flops(start), start=start)
    assert start in {s.subnet for s in found}
    assert found[0].loss <= fake_loss(start)
    first = [s.subnet for s in found if s.candidate.iteration == 0]

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
    found = run(config, limit=0.8 * flops(start), start=start)
    assert all(flops(s.subnet) <= 0.8 * flops(start) for s in found)
    with pytest.raises(InfeasibleError, match="start from a smaller subnet"):
        run(config, limit=0.5 * flops(SPACE.smallest()), start=start)


def test_nsga2_returns_a_wide_front():
    def costs(subnet):
        return (flops(subnet),)

    def area(scored):
        points = [(flops(s.subnet), s.loss) for s in scored]
        return hypervolume(points, (flops(SPACE.largest()), 15.0))

    areas = {"nsga2": [], "random_search": []}
    for seed in range(10):
        for algorithm, own in areas.items():
            found = layered(algorithm, seed, np.inf, costs=costs)
            assert len({s.subnet for s in found}) == len(found) == CONFIG.samples
            own.append(area(found))
            if algorithm == "nsga2":
                assert len(front([(s.loss, flops(s.subnet)) for s in found])) >= 5
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
    with pytest.raises(ValueError, match=r"constraint\.latency_ratio is 5; a share"):
        ConstraintConfig(latency_ratio=5)
    with pytest.raises(ValueError, match=r"search\.parents is 9 and search\.population 8"):
        SearchConfig(population=8, parents=9)
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
