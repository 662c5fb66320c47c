"""Group `search` of a config, with its limits in `search.constraint`."""

import dataclasses
import math

from automoe_jax.system import checks
from automoe_jax.system.errors import UserError

ALGORITHMS = ("evolution", "random_search", "random_sample", "nsga2", "local")
OBJECTIVES = ("loss", "bleu", "chrf")
LATENCIES = ("verified", "predicted", "partially_gold", "gold")
# The smallest subnet, the largest, and one found subnet twice.
FEWEST_MEASUREMENTS = 4
# Costs that a front may be drawn over, beside the objective.
COSTS = ("latency_ms", "gflops", "active_params_m", "params_m", "size_mb")


@dataclasses.dataclass(frozen=True)
class ConstraintConfig:
    """Limits of the search, any of them together; 0 leaves one out.

    Attributes:
      latency_ms: of the exported subnet, as groups `latency` and `search.latency` say how.
      latency_ratio: the same, as a share of the largest subnet's.
      gflops: FLOPs of one forward pass of 30 and 30 tokens, in billions.
      active_params_m: parameters that one token uses, in millions, embeddings left out.
      params_m: all parameters, in millions, embeddings left out.
      size_mb: the exported weights, embeddings included, in MB (10^6 bytes).
    """

    latency_ms: float = 0.0
    latency_ratio: float = 0.0
    gflops: float = 0.0
    active_params_m: float = 0.0
    params_m: float = 0.0
    size_mb: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise UserError(
                    f"constraint.{field.name} is {getattr(self, field.name)}; a limit above 0 is "
                    "needed, or 0 for none"
                )

        if self.latency_ratio > 1:
            raise UserError(
                f"constraint.latency_ratio is {self.latency_ratio}; a share of the largest "
                "subnet's latency is needed, above 0 up to 1, or 0 for none"
            )

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return any(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings of a search; the defaults are the paper's Algorithm 1.

    Attributes:
      algorithm: "evolution"; "random_search", the best of as many random subnets as evolution
        scores; "random_sample", one random subnet within the limits (the paper's
        baseline); "nsga2", a front over the objective and `front`; "local", evolution around the
        subnet `start`.
      objective: "loss" on validation pairs; "bleu" or "chrf" of translated validation sentences.
      iterations: rounds of selection; the last population is scored too.
      population: subnets of the first one, all within the limits.
      parents: best ones kept each round; of nsga2 the survivors of a round are `population`.
      mutations, crossovers: children of each kind per round.
      mutation_probability: of each dimension.
      max_tries: draws in a row without a new subnet within the limits before a round goes on with
        fewer.
      keep: how many of the best to verify and write.
      retreats: how often an evolution makes children that leave more room below a latency limit,
        as long as no subnet passes its final measurement, 0 for never; if more than 0, also whether
        it makes some, once, for room that a final measurement found.
      seed: of the draws; the config's own seed is that of data and training.
      eval_pairs: validation pairs, drawn once, that every candidate is scored on; 0 for all. The
        last parents are scored on all.
      objective_sentences: validation sentences translated for BLEU and chrF.
      latency: "verified" predicts latency, measures the parents of each round and the result;
        "predicted" only predicts; "partially_gold" and "gold" measure every candidate.
      latency_runs: timed runs of a measured candidate at most; "gold" takes the 300 of the name.
      measurements: of a verified search at most, the result's included.
      latency_model: file of `launch/fit_latency.py`; "" for the workdir's, made where it is
        missing.
      front: costs beside the objective that nsga2 trades off: latency_ms, gflops,
        active_params_m, params_m, size_mb.
      start: subnet file that "local" starts from; "" for the others.
      calibration: ranking (the `rank.json` of `launch/rank.py`) whose trained subnets correct
        inherited losses; "" for none.
      constraint: the limits.
    """

    algorithm: str = "evolution"
    objective: str = "loss"
    iterations: int = 15
    population: int = 125
    parents: int = 25
    mutations: int = 50
    crossovers: int = 50
    mutation_probability: float = 0.3
    max_tries: int = 100
    keep: int = 5
    retreats: int = 3
    seed: int = 0
    eval_pairs: int = 256
    objective_sentences: int = 64
    latency: str = "verified"
    latency_runs: int = 100
    measurements: int = 60
    latency_model: str = ""
    front: tuple[str, ...] = ("latency_ms",)
    start: str = ""
    calibration: str = ""
    constraint: ConstraintConfig = ConstraintConfig()

    def __post_init__(self):
        allowed = {"algorithm": ALGORITHMS, "objective": OBJECTIVES, "latency": LATENCIES}
        checks.one_of(self, "search.", **allowed)
        checks.at_least(1, self, "search.", "population", "parents", "max_tries", "keep",
                        "latency_runs", "objective_sentences", "measurements")  # fmt: skip
        checks.at_least(0, self, "search.", "iterations", "mutations", "crossovers", "eval_pairs",
                        "seed", "retreats")  # fmt: skip
        if not 0 < self.mutation_probability <= 1:
            raise UserError(
                f"search.mutation_probability is {self.mutation_probability}; allowed: above 0 "
                "up to 1"
            )
        if self.algorithm in ("evolution", "local") and self.parents > self.population:
            raise UserError(
                f"search.parents is {self.parents} and search.population {self.population}; "
                "parents are the best of the population, so give at most as many"
            )
        for name in self.front:
            if name not in COSTS:
                raise UserError(f"search.front has {name!r}; allowed: {', '.join(COSTS)}")
        if self.algorithm == "nsga2" and not self.front:
            raise UserError("search.front is empty; nsga2 needs a cost, as latency_ms")
        if (self.algorithm == "local") != bool(self.start):
            raise UserError(
                f"search.start is {self.start!r} and search.algorithm {self.algorithm!r}; the "
                "local search, and no other, starts from a subnet file"
            )
        if self.calibration and self.objective != "loss":
            raise UserError(
                f"search.calibration corrects losses, but search.objective is {self.objective!r}; "
                "give --config.search.objective=loss, or no calibration"
            )
        if self.latency == "verified" and self.measurements < FEWEST_MEASUREMENTS:
            raise UserError(
                f"search.measurements is {self.measurements}; a verified search needs at least "
                f"{FEWEST_MEASUREMENTS}"
            )

    @property
    def samples(self) -> int:
        """Subnets that random search draws, and evolution scores at most.

        Without those that final measurements ask for, see `retreats`.
        """
        return self.population + self.iterations * (self.mutations + self.crossovers)

    @property
    def limits_latency(self) -> bool:
        """Whether latency is limited."""
        return bool(self.constraint.latency_ms or self.constraint.latency_ratio)

    @property
    def needs_latency(self) -> bool:
        """Whether candidates need a latency: it is limited, or one side of a front."""
        on_front = self.algorithm == "nsga2" and "latency_ms" in self.front
        return self.limits_latency or on_front
