"""Evolutionary search (the paper's Algorithm 1) and its two random baselines.

Knows nothing of how a loss or a limit is computed: it is handed functions.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from automoe_jax.errors import UserError
from automoe_jax.search.config import SearchConfig
from automoe_jax.space import SearchSpace
from automoe_jax.subnet import Subnet


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
    candidate: Candidate
    loss: float


Within = Callable[[Subnet], bool]
Score = Callable[[list[Candidate]], list[float]]
Told = Callable[[int, list[Scored]], None]


def search(
    space: SearchSpace,
    config: SearchConfig,
    rng: np.random.Generator,
    within: Within,
    score: Score,
    told: Told = lambda iteration, scored: None,
) -> list[Scored]:
    """Runs the configured algorithm.

    Args:
      space: where to search.
      config: the algorithm and its settings.
      rng: fixes all draws.
      within: whether a subnet satisfies the limits.
      score: losses of candidates, in their order.
      told: called with each scored population.

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

    draw = _Draw(space, rng, within, config)
    if config.algorithm == "random_sample":
        score_all(draw.population(1), 0)
    elif config.algorithm == "random_search":
        score_all(draw.population(config.samples), 0)
    else:
        population = draw.population(config.population)
        for iteration in range(config.iterations):
            best = score_all(population, iteration)[: config.parents]
            population = draw.next_population([s.candidate for s in best], iteration + 1)
        score_all(population, config.iterations)
    return sorted(seen.values(), key=lambda s: s.loss)


class _Draw:
    """Draws populations whose members are different and within the limits, in bounded tries."""

    def __init__(self, space: SearchSpace, rng, within: Within, config: SearchConfig):
        self._space, self._rng, self._within, self._config = space, rng, within, config

    def population(self, size: int) -> list[Candidate]:
        """Random subnets. Where a limit is so tight that samples do not meet it, subnets that do
        (the smallest to begin with) are mutated instead.
        """
        found = self._fill(
            size, lambda: Candidate(self._space.sample(self._rng), "sample", 0), set()
        )
        if len(found) < size:
            known = [c.subnet for c in found] or [self._space.smallest()]

            def mutant() -> Candidate:
                parent = known[self._rng.integers(len(known))]
                child = self._mutate(parent)
                return Candidate(child, "mutation", 0, (parent,))

            found += self._fill(size - len(found), mutant, {c.subnet for c in found})
        if not found and self._within(self._space.smallest()):
            found = [Candidate(self._space.smallest(), "sample", 0)]
        if not found:
            raise InfeasibleError(
                f"no subnet within the limits was found in {2 * self._config.max_tries} draws; "
                "raise the limit a little, or search.max_tries"
            )
        return found

    def next_population(self, parents: list[Candidate], iteration: int) -> list[Candidate]:
        """The parents, then mutated ones, then crossed ones."""

        def one() -> Subnet:
            return parents[self._rng.integers(len(parents))].subnet

        def mutation() -> Candidate:
            parent = one()
            return Candidate(self._mutate(parent), "mutation", iteration, (parent,))

        def crossover() -> Candidate:
            a, b = one(), one()
            child = self._space.crossover(a, b, self._rng)
            return Candidate(child, "crossover", iteration, (a, b))

        population = list(parents)
        for count, make in (
            (self._config.mutations, mutation),
            (self._config.crossovers, crossover),
        ):
            population += self._fill(count, make, {c.subnet for c in population})
        return population

    def _mutate(self, subnet: Subnet) -> Subnet:
        return self._space.mutate(subnet, self._rng, self._config.mutation_probability)

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


def front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is better than in both coordinates, by the first."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept
