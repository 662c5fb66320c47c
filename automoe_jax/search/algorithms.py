"""Search algorithms behind one interface: `ask` for a population, `tell` its scores.

Evolution is the paper's Algorithm 1; random search and a single random sample are its baselines; a
local search is evolution around a given subnet; NSGA-II is Deb et al. (2002). No algorithm computes
a score or a cost.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.search.candidates import Candidate, Scored
from automoe_jax.search.config import SearchConfig
from automoe_jax.search.drawing import Draws
from automoe_jax.search.front import crowding, front, ranked

# The costs of a subnet that a front trades off against its score.
Costs = Callable[[Subnet], tuple[float, ...]]


class Algorithm(Protocol):
    """A search in rounds: score what `ask` returns, `tell` the scores, until `ask` returns []."""

    def ask(self) -> list[Candidate]:
        """The next population, members that were scored before included; [] at the end.

        `InfeasibleError` if no subnet within the limits was found.
        """
        ...

    def tell(self, scored: list[Scored]) -> None:
        """Takes the scored population, best first; who is left out gets no children."""


class RandomSearch:
    """One population of random subnets."""

    def __init__(self, draws: Draws, count: int):
        self._draws, self._count = draws, count

    def ask(self) -> list[Candidate]:
        count, self._count = self._count, 0
        return self._draws.population(count) if count else []

    def tell(self, scored: list[Scored]) -> None:
        """Random subnets do not depend on scores."""


def populations(draws: Draws, later: Callable[[int], list[Candidate]]) -> Iterator[list[Candidate]]:
    """A random population, then that of each iteration, drawn when it is asked for."""
    yield draws.population(draws.config.population)
    yield from map(later, range(1, draws.config.iterations + 1))


class Evolution:
    """Truncation selection: the best `config.parents` live on and have children."""

    def __init__(self, draws: Draws):
        self._draws, self._config = draws, draws.config
        self._parents: list[Candidate] = []
        self._populations = populations(draws, self._next)

    def ask(self) -> list[Candidate]:
        return next(self._populations, [])

    def _next(self, iteration: int) -> list[Candidate]:
        return self._parents + self._draws.children(self._parents, iteration, self._parents)

    def tell(self, scored: list[Scored]) -> None:
        self._parents = [s.candidate for s in scored[: self._config.parents]]


class NSGA2:
    """Non-dominated sorting: a population spread over the front of score and costs.

    `survivors` is the population after selection, as scored.
    """

    def __init__(self, draws: Draws, costs: Costs):
        """Draws nothing yet; `costs` is called anew in each round, since estimates may change."""
        self._draws, self._config, self._costs = draws, draws.config, costs
        self.survivors: list[Scored] = []
        self._populations = populations(draws, self._next)

    def ask(self) -> list[Candidate]:
        return next(self._populations, [])

    def _next(self, iteration: int) -> list[Candidate]:
        count = 2 * self._config.parents
        parents = tournaments(self.survivors, self._costs, self._draws.rng, count)
        known = [s.candidate for s in self.survivors]
        return known + self._draws.children(parents, iteration, known)

    def tell(self, scored: list[Scored]) -> None:
        if self.survivors:
            scored = survivors(scored, self._costs, self._config.population)
        self.survivors = scored


def make(config: SearchConfig, draws: Draws, costs: Costs) -> Algorithm:
    """The configured algorithm; NSGA-II needs `costs`."""
    if config.algorithm == "random_sample":
        return RandomSearch(draws, 1)
    if config.algorithm == "random_search":
        return RandomSearch(draws, config.samples)
    if config.algorithm == "nsga2":
        return NSGA2(draws, costs)
    return Evolution(draws)


def front_of(scored: list[Scored], costs: Costs) -> list[Scored]:
    """The candidates that no other one dominates in score and costs, by ascending score."""
    return [scored[i] for i in front(_points(scored, costs))]


def survivors(scored: list[Scored], costs: Costs, count: int) -> list[Scored]:
    """NSGA-II's selection: whole fronts, then the least crowded candidates of the next front."""
    points = _points(scored, costs)
    ranks = np.array(ranked(points))
    kept: list[int] = []
    for rank in range(int(ranks.max()) + 1):
        members = np.flatnonzero(ranks == rank)
        if len(kept) + len(members) > count:
            distance = crowding([points[i] for i in members])
            order = np.argsort(-distance, kind="stable")
            members = members[order][: count - len(kept)]
        kept += members.tolist()
    return [scored[i] for i in kept]


def tournaments(
    scored: list[Scored], costs: Costs, rng: np.random.Generator, count: int
) -> list[Candidate]:
    """Parents by binary tournaments: the lower rank wins, at equal rank the less crowded."""
    points = _points(scored, costs)
    ranks = np.array(ranked(points))
    distance = np.zeros(len(scored))
    for rank in set(ranks.tolist()):
        members = np.flatnonzero(ranks == rank)
        distance[members] = crowding([points[i] for i in members])
    pairs = rng.integers(len(scored), size=(count, 2))
    winners = [min(pair, key=lambda i: (ranks[i], -distance[i])) for pair in pairs.tolist()]
    return [scored[i].candidate for i in winners]


def _points(scored: list[Scored], costs: Costs) -> list[tuple[float, ...]]:
    return [(s.loss, *costs(s.subnet)) for s in scored]
