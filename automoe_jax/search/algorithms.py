"""Evolutionary search (the paper's Algorithm 1), its random baselines, a local search, NSGA-II.

Knows nothing of how a score or a cost is computed: it is handed functions.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.search.config import SearchConfig
from automoe_jax.search.front import crowding, front, ranked
from automoe_jax.system.errors import UserError


class InfeasibleError(UserError):
    """No subnet can satisfy the limit."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A subnet within the limit and where it comes from."""

    subnet: Subnet
    origin: str  # sample, mutation, crossover
    iteration: int
    parents: tuple[Subnet, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scored:
    """A candidate and its score, smaller is better: a loss, or 100 less a BLEU or chrF."""

    candidate: Candidate
    loss: float


Within = Callable[[Subnet], bool]
Score = Callable[[list[Candidate]], list[float]]
Told = Callable[[int, list[Scored]], None]
# Up to so many parents out of a scored population, best first.
Select = Callable[[list[Scored], int, int], list[Scored]]
# Told of the front of each round of nsga2, which it may measure.
Watch = Callable[[list[Scored], int], None]
# What a front trades off against the score.
Costs = Callable[[Subnet], tuple[float, ...]]


def best_first(scored: list[Scored], count: int, iteration: int) -> list[Scored]:
    """The plain selection of parents."""
    return scored[:count]


def search(
    space: SearchSpace,
    config: SearchConfig,
    rng: np.random.Generator,
    within: Within,
    score: Score,
    told: Told = lambda iteration, scored: None,
    select: Select = best_first,
    costs: Costs | None = None,
    start: Subnet | None = None,
    watch: Watch = lambda on_front, iteration: None,
    by_shape: bool = True,
) -> list[Scored]:
    """Runs the configured algorithm.

    Args:
      space: where to search.
      config: the algorithm and its settings.
      rng: fixes all draws.
      within: whether a subnet satisfies the limits.
      score: scores of candidates, in their order.
      told: called with each scored population.
      select: takes the parents out of a population; not asked by nsga2.
      costs: of a subnet, for nsga2.
      start: where "local" starts.
      watch: called with the front that each round of nsga2 ends with; may change what `costs` says.
      by_shape: draw widths and depths of random subnets first, among those that can be within the
        limits; it asks `within` more often, of subnets that are not scored.

    Returns:
      Every candidate scored, each once, best first.

    Raises:
      InfeasibleError: nothing within the limits was found.
    """
    seen: dict[Subnet, Scored] = {}

    def score_all(population: list[Candidate], iteration: int) -> list[Scored]:
        new = [c for c in population if c.subnet not in seen]
        for candidate, loss in zip(new, score(new), strict=True):
            seen[candidate.subnet] = Scored(candidate, loss)
        scored = sorted((seen[c.subnet] for c in population), key=lambda s: s.loss)
        told(iteration, scored)
        return scored

    draw = _Draw(space, rng, within, config, start, by_shape)
    if config.algorithm == "random_sample":
        score_all(draw.population(1), 0)
    elif config.algorithm == "random_search":
        score_all(draw.population(config.samples), 0)
    elif config.algorithm == "nsga2":
        assert costs is not None
        survivors = score_all(draw.population(config.population), 0)
        watch(front_of(survivors, costs), 0)
        for iteration in range(1, config.iterations + 1):
            parents = _tournaments(survivors, costs, rng, 2 * config.parents)
            children = draw.children(parents, iteration, [s.candidate for s in survivors])
            known = [s.candidate for s in survivors]
            survivors = _survivors(score_all(known + children, iteration), costs, config.population)
            watch(front_of(survivors, costs), iteration)
    else:
        population = draw.population(config.population)
        for iteration in range(config.iterations):
            best = select(score_all(population, iteration), config.parents, iteration)
            parents = [s.candidate for s in best]
            population = parents + draw.children(parents, iteration + 1, parents)
        select(score_all(population, config.iterations), config.parents, config.iterations)
    return sorted(seen.values(), key=lambda s: s.loss)


def _points(scored: list[Scored], costs: Costs) -> list[tuple[float, ...]]:
    return [(s.loss, *costs(s.candidate.subnet)) for s in scored]


def front_of(scored: list[Scored], costs: Costs) -> list[Scored]:
    """What no other of them beats in score and costs, by its score."""
    return [scored[i] for i in front(_points(scored, costs))]


def _survivors(scored: list[Scored], costs: Costs, count: int) -> list[Scored]:
    """NSGA-II's selection: whole fronts, then those of the last one with the most room."""
    points = _points(scored, costs)
    ranks = np.array(ranked(points))
    kept: list[int] = []
    for rank in range(int(ranks.max()) + 1):
        own = np.flatnonzero(ranks == rank)
        if len(kept) + len(own) > count:
            room = crowding([points[i] for i in own])
            own = own[np.argsort(-room, kind="stable")][: count - len(kept)]
        kept += own.tolist()
    return [scored[i] for i in kept]


def _tournaments(
    scored: list[Scored], costs: Costs, rng: np.random.Generator, count: int
) -> list[Candidate]:
    """Parents by binary tournaments: the lower rank wins, then the more room."""
    points = _points(scored, costs)
    ranks = np.array(ranked(points))
    room = np.zeros(len(scored))
    for rank in set(ranks.tolist()):
        own = np.flatnonzero(ranks == rank)
        room[own] = crowding([points[i] for i in own])
    pairs = rng.integers(len(scored), size=(count, 2))
    winners = [min(pair, key=lambda i: (ranks[i], -room[i])) for pair in pairs.tolist()]
    return [scored[i].candidate for i in winners]


class _Draw:
    """Draws populations whose members are different and within the limits, in bounded tries."""

    def __init__(
        self,
        space: SearchSpace,
        rng: np.random.Generator,
        within: Within,
        config: SearchConfig,
        start: Subnet | None,
        by_shape: bool,
    ):
        self._space, self._rng, self._within, self._config = space, rng, within, config
        self._start, self._by_shape = start, by_shape

    def population(self, size: int) -> list[Candidate]:
        """Random subnets. Where there are fewer than that, they are mutated.

        By shape, widths and depths are drawn first, among those that can be within the limits: else
        the larger ones, of which few sizes fit, would hardly be seen.
        """
        if self._start is not None:
            return self._around(self._start, size)
        shapes = self._space.shapes() if self._by_shape else [self._space]
        shapes = [shape for shape in shapes if self._within(shape.smallest())]

        def sample() -> Subnet:
            if not shapes:
                return self._space.smallest()
            shape = shapes[self._rng.integers(len(shapes))]
            for _ in range(self._config.max_tries):
                subnet = shape.sample(self._rng)
                if self._within(subnet):
                    return subnet
            shapes.remove(shape)  # hardly more than its smallest is within
            return shape.smallest()

        found = self._fill(size, lambda: Candidate(sample(), "sample", 0), set())
        if len(found) < size:
            known = [c.subnet for c in found] or [self._space.smallest()]

            def mutant() -> Candidate:
                parent = known[self._rng.integers(len(known))]
                child = self._mutate(parent)
                return Candidate(child, "mutation", 0, (parent,))

            found += self._fill(size - len(found), mutant, {c.subnet for c in found})
        if not found:
            raise InfeasibleError(
                f"no subnet within the limits was found in {self._config.max_tries} draws; "
                "raise the limit a little, or search.max_tries"
            )
        return found

    def _around(self, start: Subnet, size: int) -> list[Candidate]:
        """The start, where it is within the limits, and neighbours of what has been found."""
        found = self._fill(1, lambda: Candidate(start, "start", 0), set())
        if not found:  # the limits may be more than a step away

            def far() -> Candidate:
                child = self._space.mutate(start, self._rng, self._config.mutation_probability)
                return Candidate(child, "mutation", 0, (start,))

            found = self._fill(1, far, set())
        if not found:
            raise InfeasibleError(
                f"neither the start nor one of {self._config.max_tries} mutations of it is within "
                "the limits; start from a smaller subnet"
            )
        first = found[0].subnet

        def neighbour() -> Candidate:
            return Candidate(self._mutate(first), "mutation", 0, (first,))

        return found + self._fill(size - 1, neighbour, {first})

    def children(
        self, parents: list[Candidate], iteration: int, known: list[Candidate]
    ) -> list[Candidate]:
        """Mutated ones, then crossed ones; none of them among `known`."""

        def one() -> Subnet:
            return parents[self._rng.integers(len(parents))].subnet

        def mutation() -> Candidate:
            parent = one()
            return Candidate(self._mutate(parent), "mutation", iteration, (parent,))

        def crossover() -> Candidate:
            a, b = one(), one()
            child = self._space.crossover(a, b, self._rng)
            return Candidate(child, "crossover", iteration, (a, b))

        children: list[Candidate] = []
        for count, make in (
            (self._config.mutations, mutation),
            (self._config.crossovers, crossover if self._start is None else mutation),
        ):
            children += self._fill(count, make, {c.subnet for c in [*known, *children]})
        return children

    def _mutate(self, subnet: Subnet) -> Subnet:
        probability = self._config.mutation_probability
        if self._start is not None:  # a step to a neighbour changes a dimension or two
            probability = min(probability, 1.5 / _dimensions(subnet))
        return self._space.mutate(subnet, self._rng, probability)

    def _fill(
        self, count: int, make: Callable[[], Candidate], taken: set[Subnet]
    ) -> list[Candidate]:
        found: list[Candidate] = []
        tries = 0
        while len(found) < count and tries < self._config.max_tries:
            tries += 1
            candidate = make()
            if candidate.subnet in taken or not self._within(candidate.subnet):
                continue
            taken.add(candidate.subnet)
            found.append(candidate)
            tries = 0
        return found


def _dimensions(subnet: Subnet) -> int:
    """How many choices a subnet is made of."""
    own = sum(3 + len(x.experts) for x in subnet.encoder.layers)
    return 4 + own + sum(5 + len(x.experts) for x in subnet.decoder.layers)
