"""Group `predictor` of a config."""

import dataclasses

from automoe_jax.system import checks


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """How a latency model is made.

    Attributes:
      subnets: timed ones that it is fitted to.
      held_out: random ones that only its error is measured on.
      runs: timed runs of each.
    """

    subnets: int = 48
    held_out: int = 12
    runs: int = 20

    def __post_init__(self):
        for name, low in (("subnets", 8), ("held_out", 2), ("runs", 5)):
            checks.at_least(low, self, "predictor.", name)
