"""Parts of a job that do not depend on each other: done in this process, or by other workers."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

P = TypeVar("P")
R = TypeVar("R")


class Workers(Protocol):
    """Where the parts of a job are done."""

    @property
    def remote(self) -> bool:
        """True if parts run in other processes: what they get and return is pickled."""
        ...

    def each(self, work: Callable[[P], R], parts: Iterable[P]) -> Iterator[tuple[int, R]]:
        """Yields index and result of every part as it is finished.

        `work` is a function of a module (or a partial of one), a pure function of its part and of
        files that all machines see. Leaving the iterator stops what is not finished.
        """
        ...


class _Here:
    """This process does the parts, in their order."""

    remote = False

    def each(self, work: Callable[[P], R], parts: Iterable[P]) -> Iterator[tuple[int, R]]:
        for i, part in enumerate(parts):
            yield i, work(part)


HERE: Workers = _Here()
