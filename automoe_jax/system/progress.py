"""How the library tells of its progress: through an object that it is handed."""

from typing import Protocol


class Task(Protocol):
    """One bar."""

    def update(self, done: int, **fields: object) -> None:
        """Sets how much is done, and values to show beside the bar."""
        ...

    def close(self) -> None: ...


class Progress(Protocol):
    """Where notes and bars go."""

    def note(self, text: str) -> None:
        """One line of text."""
        ...

    def task(self, name: str, total: int) -> Task:
        """A bar that counts to `total`."""
        ...


class _NoTask:
    def update(self, done: int, **fields: object) -> None:
        pass

    def close(self) -> None:
        pass


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        pass

    def task(self, name: str, total: int) -> Task:
        return _NoTask()
