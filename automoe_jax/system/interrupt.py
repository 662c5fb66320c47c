"""SIGTERM and Ctrl-C: they end a program at once, or at the next good moment of a loop."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = signal.SIGINT, signal.SIGTERM


class Interrupted(KeyboardInterrupt):
    """A program is ended by a signal, as by Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


class _Handler:
    """Handles the signals of this process."""

    def __init__(self):
        self.deferred = False
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None):
        if not self.deferred or self.received is not None:  # the second one does not wait
            raise Interrupted(number)
        self.received = number


_handler = _Handler()


def install():
    """Handles the signals from here on, but for those that this process was told to ignore.

    A signal raises `Interrupted`; within `deferred`, at its end.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handler)


@contextlib.contextmanager
def deferred(*, defer: bool = True) -> Iterator[Callable[[], bool]]:
    """Defers the first signal within the `with`; yields a function that tells if one came.

    The body ends itself soon after; `Interrupted` is then raised at its end. A second signal is not
    deferred, and none without `defer`. Without `install`, signals do what they did.
    """
    _handler.deferred, _handler.received = defer, None
    try:
        yield lambda: _handler.received is not None
    finally:
        _handler.deferred = False
    if _handler.received is not None:
        raise Interrupted(_handler.received)
