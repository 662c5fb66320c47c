"""Range checks of the dataclasses of a config."""

import math
from collections.abc import Iterable

from automoe_jax.system.errors import UserError


def at_least(low: float, config: object, prefix: str, *names: str):
    """Raises `UserError` for a field below `low`, infinite or NaN; texts call it `prefix`name."""
    for name in names:
        value = getattr(config, name)
        if not low <= value < math.inf:
            rule = f"at least {low} is needed" if low else "it cannot be negative"
            raise UserError(f"{prefix}{name} is {value}; {rule}")


def one_of(config: object, prefix: str, **allowed: Iterable[str]):
    """Raises `UserError` for a field whose value is not among the allowed ones."""
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            raise UserError(f"{prefix}{name} is {value!r}; allowed: {', '.join(values)}")
