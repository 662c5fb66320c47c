"""Output of the commands: results on stdout; notes and progress on stderr."""

import json
import time
from collections.abc import Iterable
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table

_console = Console(stderr=True, highlight=False)
_INTERVAL = 10.0  # seconds between the lines that replace a bar where stderr is not a terminal
_WIDTH = 120  # columns of a table where stdout is not a terminal


def print_json(value: Any):
    """Prints one JSON line."""
    print(json.dumps(value, ensure_ascii=False))


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]):
    """Prints a table as wide as the terminal."""
    Console(width=None if is_terminal() else _WIDTH).print(table(header, rows))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table, to be shown."""
    made = Table(*header)
    for row in rows:
        made.add_row(*row)
    return made


def print_effects(effects: Iterable[dict[str, Any]]):
    """Prints what choices change of the losses of ranked subnets, as `rank.json` has it."""
    print("each choice, from its lowest to its highest value, in nats a token:")
    rows = ((e["choice"], _change(e, "inherited"), _change(e, "trained")) for e in effects)
    print_table(("choice", "inherited", "trained"), rows)


def _change(effect: dict[str, Any], kind: str) -> str:
    """With its 95 % interval; files of earlier versions have none."""
    interval = effect.get(f"{kind}_95")
    return f"{effect[kind]:+.4f}" + (" [{:+.4f}, {:+.4f}]".format(*interval) if interval else "")


def is_terminal() -> bool:
    """True if stdout is a terminal."""
    return Console().is_terminal


def note(text: str):
    """Prints one line on stderr."""
    _console.print(text, markup=False, soft_wrap=True)


class TerminalProgress:
    """Bars on a terminal; elsewhere a line every few seconds."""

    def note(self, text: str):
        note(text)

    def task(self, name: str, total: int):
        return _Bar(name, total) if _console.is_terminal else _Lines(name, total)


class _Bar:
    def __init__(self, name: str, total: int):
        columns = (
            "{task.description}", rich_progress.BarColumn(), rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(), rich_progress.TimeRemainingColumn(),
            "{task.fields[values]}",
        )  # fmt: skip
        self._progress = rich_progress.Progress(*columns, console=_console, transient=True)
        self._values: dict[str, object] = {}
        self._id = self._progress.add_task(name, total=total, values="")
        self._progress.start()

    def update(self, done: int, **fields: object):
        self._values.update(fields)
        self._progress.update(self._id, completed=done, values=_format(self._values))

    def close(self):
        self._progress.stop()


class _Lines:
    def __init__(self, name: str, total: int):
        self._name, self._total = name, total
        self._start = self._last = time.monotonic()
        self._first: int | None = None
        self._values: dict[str, object] = {}

    def update(self, done: int, **fields: object):
        self._values.update(fields)
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if now - self._last < _INTERVAL:
            return
        self._last = now
        left = ""
        if done > self._first:
            seconds = (now - self._start) * (self._total - done) / (done - self._first)
            left = f", {seconds:,.0f} s left"
        values = _format(self._values)
        note(f"{self._name}: {done:,} of {self._total:,}{left} {values}".rstrip())

    def close(self):
        pass


def _format(values: dict[str, object]) -> str:
    """`name=value` of each but the status, which stands for itself, and None, which is nothing."""
    shown = ((k, v) for k, v in values.items() if v is not None)
    return " ".join(str(v) if k == "status" else f"{k}={v}" for k, v in shown)
