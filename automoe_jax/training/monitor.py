"""What the training loop keeps of its steps: means for the log, and the count of skipped ones."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.system.errors import UserError
from automoe_jax.training.step import StepMetrics

# Steps that run ahead of the host: a step holds its batch and subnets until it has run.
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps since the last log line; only `means` waits for them."""

    start: float = dataclasses.field(default_factory=time.monotonic)
    outputs: list[StepMetrics] = dataclasses.field(default_factory=list)
    imbalances: list[float] = dataclasses.field(default_factory=list)
    n_restored: int = 0  # of the outputs, those of an interrupted process

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> "Window":
        """The window that an interrupted process stored; an empty one for {}."""
        outputs = [StepMetrics(*values) for values in stored.get("outputs", ())]
        imbalances = list(stored.get("imbalances", ()))
        return cls(outputs=outputs, imbalances=imbalances, n_restored=len(outputs))

    def stored(self) -> dict[str, Any]:
        """The window as JSON, for a checkpoint; a copy, as it is written beside later steps."""
        outputs = [list(_floats(o)) for o in self.outputs]
        return {"outputs": outputs, "imbalances": list(self.imbalances)}

    def add(self, output: StepMetrics, subnets: Sequence[Sequence[Subnet]] | None):
        self.outputs.append(output)
        if subnets is not None and len(subnets) > 1:
            # FLOPs of the busiest device over the mean: the cost of waiting for it.
            work = [sum(complexity.count(subnet).flops for subnet in row) for row in subnets]
            self.imbalances.append(max(work) / (sum(work) / len(work)))

    def means(self) -> dict[str, float]:
        """Means by name, over target tokens or steps, without skipped steps; speeds with them."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        outputs: list[Any] = [_floats(o) for o in self.outputs]
        own, finite = outputs[self.n_restored :], [o for o in outputs if not o.skipped]
        values = {}
        if finite:
            target = sum(o.target_tokens for o in finite)
            for name in ("loss", "nll", "load_balance"):
                total = sum(getattr(o, name) * o.target_tokens for o in finite)
                values[f"train/{name}"] = total / target
            values["train/gradient_norm"] = sum(o.gradient_norm for o in finite) / len(finite)
        values |= {
            "train/target_tokens_per_s": sum(o.target_tokens for o in own) / seconds,
            "train/source_tokens_per_s": sum(o.source_tokens for o in own) / seconds,
            "train/step_s": seconds / max(len(own), 1),
        }
        if self.imbalances:
            values["train/device_imbalance"] = float(np.mean(self.imbalances))
        return values


@dataclasses.dataclass(frozen=True)
class Lowest:
    """The lowest validation loss so far, and the evaluations since."""

    loss: float | None = None  # None before the first; JSON has no infinity
    waited: int = 0

    def after(self, loss: float) -> "Lowest":
        """With one more evaluation; a loss that is not finite is never the lowest."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return Lowest(loss)
        return Lowest(self.loss, self.waited + 1)

    def exhausts(self, patience: int) -> bool:
        """Whether so many evaluations without a lower loss end a training; 0 never do."""
        return 0 < patience <= self.waited


class SkippedSteps:
    """Counts the skipped steps, and ends a run that skips `limit` of them in a row."""

    def __init__(self, limit: int, describe: Callable[[int], str], total: int = 0):
        """`describe` says what a step trained on; `total` steps were skipped before."""
        self._limit, self._describe = limit, describe
        self._pending: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._in_a_row = 0
        self.total = total

    def add(self, step: int, output: StepMetrics):
        """Takes the output of a step, and waits for the one some steps before it.

        `UserError` at too many in a row.
        """
        self._pending.append((step, output))
        if len(self._pending) > _AHEAD:
            self._take()

    def wait(self):
        """Waits for all steps."""
        while self._pending:
            self._take()

    def _take(self):
        step, output = self._pending.popleft()
        skipped = bool(_number(output.skipped))
        self.total += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row == self._limit:
            raise UserError(
                f"the loss or gradient of {self._limit} steps in a row (training.max_skipped) is "
                f"not finite, the last at step {step + 1:,}: {self._describe(step)}; they changed "
                "nothing, and the last checkpoint is good: lower training.peak_rate or raise "
                "training.warmup_steps"
            )


def _floats(output: StepMetrics) -> StepMetrics:
    """Metrics of a step as numbers; waits for it."""
    return jax.tree.map(_number, output)


def _number(metric: Any) -> float:
    """A metric as the first device has it, or as it was restored."""
    if isinstance(metric, float):
        return metric
    return float(np.asarray(metric.addressable_data(0)).reshape(-1)[0])
