"""The platform that programs are traced for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_other: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """As "cpu": that of the default device, or what `traced_for` says."""
    return _other.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Traces programs for a platform that this machine need not have."""
    token = _other.set(name)
    try:
        yield
    finally:
        _other.reset(token)
