"""Limits of a search."""

import dataclasses
from collections.abc import Callable
from typing import Any

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.search.candidates import InfeasibleError


@dataclasses.dataclass(frozen=True)
class Limit:
    """An upper bound on one cost."""

    name: str  # of the cost, such as `latency_ms`
    field: str  # of `search.constraint` that sets it
    # The bound as known now; that of a ratio follows the estimate of the largest subnet's latency.
    upper_bound: Callable[[], float]
    value: Callable[[Subnet], float]
    how: Callable[[Subnet], str]  # how the cost of a subnet is known, in words


@dataclasses.dataclass(frozen=True)
class Limits:
    """All limits of a search, in the order in which they are checked: cheap costs first."""

    all: tuple[Limit, ...]

    def within(self, subnet: Subnet) -> bool:
        """True if the subnet satisfies every limit."""
        return all(limit.value(subnet) <= limit.upper_bound() for limit in self.all)

    def without(self, name: str) -> "Limits":
        """Those of the other costs."""
        return Limits(tuple(limit for limit in self.all if limit.name != name))

    def record(self, subnet: Subnet) -> dict[str, dict[str, Any]]:
        """Value, limit and origin of each limited cost, for the history."""
        return {
            x.name: {"value": x.value(subnet), "limit": x.upper_bound(), "how": x.how(subnet)}
            for x in self.all
        }

    def require(self, smallest: Subnet):
        """`InfeasibleError` if even the smallest subnet exceeds a limit."""
        for limit in self.all:
            value, bound = limit.value(smallest), limit.upper_bound()
            if value > bound:
                raise InfeasibleError(
                    f"no subnet can meet {limit.name} <= {bound:.4g}: the smallest one has "
                    f"{value:.4g}; raise search.constraint.{limit.field}"
                )
