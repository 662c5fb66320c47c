"""Candidates of a search, and the error of a search that has none."""

import dataclasses

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.system.errors import UserError


class InfeasibleError(UserError):
    """No subnet satisfies the limits."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A subnet within the limits, and how it was made."""

    subnet: Subnet
    origin: str  # "sample", "mutation", "crossover", "start" or "last resort"
    iteration: int  # 0 for the first population
    parents: tuple[Subnet, ...] = ()  # that it was mutated or crossed from


@dataclasses.dataclass(frozen=True)
class Scored:
    """A candidate and its score; lower is better: a loss, or 100 minus BLEU or chrF."""

    candidate: Candidate
    loss: float

    @property
    def subnet(self) -> Subnet:
        """The candidate's architecture."""
        return self.candidate.subnet


def best_first(scored: list[Scored]) -> list[Scored]:
    """The candidates by ascending score; candidates of equal score keep their order."""
    return sorted(scored, key=lambda s: s.loss)
