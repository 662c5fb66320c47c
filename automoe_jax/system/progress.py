"""The object through which the library reports progress."""

from typing import Protocol


class ProgressBar(Protocol):
    """A bar with values beside it."""

    def update(self, done: int, **fields: object) -> None:
        """Sets the count, and values to show beside the bar."""
        ...

    def close(self) -> None: ...


class Progress(Protocol):
    """Receives notes and bars."""

    def note(self, text: str) -> None:
        """Shows one line of text."""
        ...

    def task(self, name: str, total: int) -> ProgressBar:
        """Starts a bar that counts to `total`."""
        ...


class _NoBar:
    def update(self, done: int, **fields: object) -> None:
        pass

    def close(self) -> None:
        pass


class Silent:
    """Discards everything."""

    def note(self, text: str) -> None:
        pass

    def task(self, name: str, total: int) -> ProgressBar:
        return _NoBar()
