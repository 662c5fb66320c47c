"""Groups `search` and `constraint` of a config."""

import dataclasses
import math

from automoe_jax.errors import UserError

ALGORITHMS = ("evolution", "random_search", "random_sample")


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The paper's Algorithm 1 with its settings.

    Attributes:
      algorithm: "evolution"; "random_search", the best of as many random subnets as evolution's
        populations would hold; "random_sample", one random subnet within the limit (the paper's
        baseline).
      iterations: rounds of selection; the last population is scored too.
      population: subnets of the first one, all within the limit.
      parents: best ones kept each round.
      mutations, crossovers: children of each kind per round.
      mutation_probability: of each dimension.
      max_tries: draws in a row without a new subnet within the limits before a round goes on with
        fewer.
      keep: how many of the best to verify and write.
      eval_pairs: validation pairs to score on; 0 for all.
      latency_runs: timed runs per candidate where latency is limited (100: partially gold).
    """

    algorithm: str = "evolution"
    iterations: int = 15
    population: int = 125
    parents: int = 25
    mutations: int = 50
    crossovers: int = 50
    mutation_probability: float = 0.3
    max_tries: int = 100
    keep: int = 5
    eval_pairs: int = 0
    latency_runs: int = 100

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise UserError(
                f"search.algorithm is {self.algorithm!r}; allowed: {', '.join(ALGORITHMS)}"
            )
        for name in ("population", "parents", "max_tries", "keep", "latency_runs"):
            if getattr(self, name) < 1:
                raise UserError(f"search.{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("iterations", "mutations", "crossovers", "eval_pairs"):
            if getattr(self, name) < 0:
                raise UserError(f"search.{name} is {getattr(self, name)}; it cannot be negative")
        if not 0 < self.mutation_probability <= 1:
            raise UserError(
                f"search.mutation_probability is {self.mutation_probability}; allowed: above 0 "
                "up to 1"
            )

    @property
    def samples(self) -> int:
        """Subnets that evolution scores at most, and random search draws."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


@dataclasses.dataclass(frozen=True)
class ConstraintConfig:
    """Limits of the search; 0 leaves one out.

    Attributes:
      latency_ms: measured latency of the exported subnet, as `latency` says how.
      latency_ratio: the same, as a share of the largest subnet's.
      gflops: FLOPs of one forward pass of 30 and 30 tokens, in billions.
    """

    latency_ms: float = 0.0
    latency_ratio: float = 0.0
    gflops: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise UserError(
                    f"constraint.{field.name} is {getattr(self, field.name)}; a limit above 0 is "
                    "needed, or 0 for none"
                )
        if self.latency_ms and self.latency_ratio:
            raise UserError(
                f"constraint.latency_ms is {self.latency_ms:g} and constraint.latency_ratio is "
                f"{self.latency_ratio:g}; set one of them to 0"
            )
