"""The object through which the library reports progress."""

from typing import Protocol


class ProgressBar(Protocol):
    """A bar; `update` sets the count and the values beside it."""

    def update(self, done: int, **fields: object) -> None: ...
    def close(self) -> None: ...


class Progress(Protocol):
    """Receives notes, lines of text, and tasks, bars that count to `total`."""

    def note(self, text: str) -> None: ...
    def task(self, name: str, total: int) -> ProgressBar: ...


class Silent:
    """A `Progress` and its bar that discard everything."""

    def note(self, text: str) -> None: ...
    def update(self, done: int, **fields: object) -> None: ...
    def close(self) -> None: ...

    def task(self, name: str, total: int) -> ProgressBar:
        return self
