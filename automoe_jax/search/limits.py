"""Limits of a search: their values are measured once per subnet and remembered."""

import dataclasses
from collections.abc import Callable

from automoe_jax.search.evolution import InfeasibleError
from automoe_jax.search.history import History
from automoe_jax.subnet import Subnet


@dataclasses.dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
      name: of the constraint, as `latency_ms`.
      most: the largest value allowed.
      measure: value of a subnet.
      how: how values are got, in words.
      field: of the group `constraint` that sets it.
    """

    name: str
    most: float
    measure: Callable[[Subnet], float]
    how: str
    field: str


class Limits:
    """All limits together."""

    def __init__(self, limits: list[Limit], history: History):
        # Cheap ones first: what they reject is never timed.
        self._limits = sorted(limits, key=lambda limit: limit.name.startswith("latency"))
        self._history = history

    def value(self, limit: Limit, subnet: Subnet) -> float:
        """The value, measured where it is not known yet."""
        known = self._history.value(limit.name, subnet)
        if known is None:
            known = (limit.measure(subnet), limit.how)
            self._history.measured(limit.name, subnet, *known)
        return known[0]

    def within(self, subnet: Subnet) -> bool:
        """Whether a subnet satisfies every limit."""
        return all(self.value(limit, subnet) <= limit.most for limit in self._limits)

    def about(self, subnet: Subnet) -> dict[str, dict]:
        """Value, limit and origin of each constraint, for the history."""
        return {
            limit.name: {
                "value": self.value(limit, subnet),
                "limit": limit.most,
                "how": limit.how,
            }
            for limit in self._limits
        }

    def require(self, smallest: Subnet):
        """Raises `InfeasibleError` where not even the smallest subnet is within the limits."""
        for limit in self._limits:
            value = self.value(limit, smallest)
            if value > limit.most:
                raise InfeasibleError(
                    f"no subnet can meet {limit.name} <= {limit.most:.4g}: the smallest one has "
                    f"{value:.4g}; raise constraint.{limit.field}"
                )
