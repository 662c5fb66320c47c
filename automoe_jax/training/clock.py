"""Where the time and the memory of a training go."""

import collections
import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from automoe_jax.training.step import StepMetrics

# What a run waits for besides its steps.
STARTING, DATA, COMPILING = "starting", "data", "compiling"
EVALUATING, SAVING = "evaluating", "saving"
_WAITS = STARTING, DATA, COMPILING, EVALUATING, SAVING
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class Clock:
    """Measures what a run spends its time on, from when it is made."""

    def __init__(self):
        self._start = time.monotonic()
        self._spent: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Counts the time within the `with` for `what`."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._spent[what] += time.monotonic() - before

    def shares(self) -> dict[str, float]:
        """Shares of the wall time so far, by name: goodput is that of steps, then what it lacks."""
        wall = max(time.monotonic() - self._start, 1e-9)
        waits = {what: self._spent[what] / wall for what in _WAITS}
        named = {f"run/share_{what}": share for what, share in waits.items()}
        return {"run/goodput": 1 - sum(waits.values()), **named}


def memory() -> dict[str, float]:
    """The most memory so far in GB, by name: of this process, and of a device that tells."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    values = {"run/memory_gb": peak / 1e9}
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        values["run/device_memory_gb"] = statistics["peak_bytes_in_use"] / 1e9
    return values


Span = tuple[int, int]  # of steps: the first and the last, counted from 1


class Profile:
    """A trace of some steps for XProf, in `plugins/profile/` of a run's folder."""

    def __init__(self, folder: Path, steps: Span | None):
        """None for no trace."""
        self._folder, self._steps = folder, steps
        self._tracing = False

    def before(self, step: int):
        """To be called before step `step`, counted from 0."""
        if self._steps is not None and step + 1 == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, output: StepMetrics):
        """To be called after a step, with its output."""
        if self._tracing and self._steps is not None and step + 1 >= self._steps[1]:
            jax.block_until_ready(output)
            self.close()

    def close(self):
        """Writes what was traced."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
