"""Limits of a search."""

import dataclasses
from collections.abc import Callable

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.search.evolution import InfeasibleError


@dataclasses.dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
      name: of the cost, as `latency_ms`.
      bound: gives the largest value allowed.
      value: of a subnet, remembered where it is expensive.
      how: how the value of a subnet was got, in words.
      field: of `search.constraint` that sets it.
    """

    name: str
    bound: Callable[[], float]
    value: Callable[[Subnet], float]
    how: Callable[[Subnet], str]
    field: str

    @property
    def most(self) -> float:
        """The largest value allowed, as it is known now."""
        return self.bound()


class Limits:
    """All limits together."""

    def __init__(self, limits: list[Limit]):
        # Cheap ones first: what they reject is never timed.
        self.all = sorted(limits, key=lambda limit: limit.name.startswith("latency"))

    def within(self, subnet: Subnet) -> bool:
        """Whether a subnet satisfies every limit."""
        return all(limit.value(subnet) <= limit.most for limit in self.all)

    def about(self, subnet: Subnet) -> dict[str, dict]:
        """Value, limit and origin of each cost that is limited, for the history."""
        return {
            limit.name: {
                "value": limit.value(subnet),
                "limit": limit.most,
                "how": limit.how(subnet),
            }
            for limit in self.all
        }

    def require(self, smallest: Subnet):
        """Raises `InfeasibleError` where not even the smallest subnet is within the limits."""
        for limit in self.all:
            value = limit.value(smallest)
            if value > limit.most:
                raise InfeasibleError(
                    f"no subnet can meet {limit.name} <= {limit.most:.4g}: the smallest one has "
                    f"{value:.4g}; raise search.constraint.{limit.field}"
                )
