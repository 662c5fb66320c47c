"""Draws candidates that are distinct and within the limits, in a bounded number of tries."""

import dataclasses
from collections.abc import Callable

import numpy as np

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.search.candidates import Candidate, InfeasibleError
from automoe_jax.search.config import SearchConfig


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random draws of one search.

    `stratified` draws widths and depths of random subnets first, among the combinations that have a
    feasible subnet. Drawn uniformly, the larger ones, few of which are feasible, would hardly
    appear. It calls `feasible` more often, for subnets that are never scored.
    """

    space: SearchSpace
    rng: np.random.Generator
    config: SearchConfig
    feasible: Callable[[Subnet], bool]  # True within the limits
    stratified: bool = True
    start: Subnet | None = None  # of a local search; None for every other algorithm

    def population(self, size: int) -> list[Candidate]:
        """The first population: random subnets, or neighbours of the start of a local search.

        If the space has fewer than `size` feasible ones at random, mutations fill up.
        `InfeasibleError` if no feasible subnet was found.
        """
        if self.start is not None:
            return self._around(self.start, size)
        shapes = self.space.shapes() if self.stratified else [self.space]
        shapes = [shape for shape in shapes if self.feasible(shape.smallest())]

        def sample() -> Subnet:
            if not shapes:
                return self.space.smallest()
            shape = shapes[self.rng.integers(len(shapes))]
            for _ in range(self.config.max_tries):
                subnet = shape.sample(self.rng)
                if self.feasible(subnet):
                    return subnet
            shapes.remove(shape)  # little more than its smallest subnet is feasible
            return shape.smallest()

        found = self._fill(size, lambda: Candidate(sample(), "sample", 0), set())
        if len(found) < size:
            known = [c.subnet for c in found] or [self.space.smallest()]

            def mutant() -> Candidate:
                return self._mutant(known[self.rng.integers(len(known))], 0, local=False)

            found += self._fill(size - len(found), mutant, {c.subnet for c in found})
        if not found:
            raise InfeasibleError(
                f"no subnet within the limits was found in {self.config.max_tries} draws; "
                "raise the limit a little, or search.max_tries"
            )
        return found

    def children(
        self, parents: list[Candidate], iteration: int, known: list[Candidate]
    ) -> list[Candidate]:
        """Mutations, then crossovers (mutations in a local search); none of them in `known`."""

        def parent() -> Subnet:
            return parents[self.rng.integers(len(parents))].subnet

        def mutation() -> Candidate:
            return self._mutant(parent(), iteration, local=self.start is not None)

        def crossover() -> Candidate:
            a, b = parent(), parent()
            return Candidate(self.space.crossover(a, b, self.rng), "crossover", iteration, (a, b))

        children: list[Candidate] = []
        for count, make in (
            (self.config.mutations, mutation),
            (self.config.crossovers, crossover if self.start is None else mutation),
        ):
            children += self._fill(count, make, {c.subnet for c in [*known, *children]})
        return children

    def _around(self, start: Subnet, size: int) -> list[Candidate]:
        """The start, or a feasible mutation of it, and mutations of that one."""
        found = self._fill(1, lambda: Candidate(start, "start", 0), set())
        if not found:  # a small mutation may not reach the limits
            found = self._fill(1, lambda: self._mutant(start, 0, local=False), set())
        if not found:
            raise InfeasibleError(
                f"neither the start nor one of {self.config.max_tries} mutations of it is within "
                "the limits; start from a smaller subnet"
            )
        first = found[0].subnet

        return found + self._fill(size - 1, lambda: self._mutant(first, 0, local=True), {first})

    def _mutant(self, parent: Subnet, iteration: int, *, local: bool) -> Candidate:
        """A mutation; a local one changes one or two dimensions."""
        probability = self.config.mutation_probability
        if local:
            probability = min(probability, 1.5 / _dimensions(parent))
        subnet = self.space.mutate(parent, self.rng, probability)
        return Candidate(subnet, "mutation", iteration, (parent,))

    def _fill(
        self, count: int, make: Callable[[], Candidate], taken: set[Subnet]
    ) -> list[Candidate]:
        """Up to `count` new feasible candidates; `max_tries` failures in a row end it."""
        found: list[Candidate] = []
        tries = 0
        while len(found) < count and tries < self.config.max_tries:
            tries += 1
            candidate = make()
            if candidate.subnet in taken or not self.feasible(candidate.subnet):
                continue
            taken.add(candidate.subnet)
            found.append(candidate)
            tries = 0
        return found


def _dimensions(subnet: Subnet) -> int:
    """The number of choices that define a subnet."""
    encoder = sum(3 + len(layer.experts) for layer in subnet.encoder.layers)
    return 4 + encoder + sum(5 + len(layer.experts) for layer in subnet.decoder.layers)
