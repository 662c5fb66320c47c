"""Latency of a search's candidates: measured, predicted, or predicted and verified."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.latency import subnet_timer as timing
from automoe_jax.latency.records import History
from automoe_jax.latency.statistics import Latency
from automoe_jax.latency.subnet_timer import SubnetTimer, Verdict
from automoe_jax.predictor.fit import LATENCY as NAME
from automoe_jax.predictor.model import LatencyModel
from automoe_jax.search.evolution import Scored

FINAL = "final_ms"
# Measurements from which on their median corrects predictions.
FEWEST = 4
# A final measurement waits while the machine takes longer than usual by this factor. In a search it
# looks so many times, so many seconds apart.
CALM, LOOKS, PAUSE = 1.1, 24, 5.0
# Final measurements of one subnet at most, where the machine becomes slow in the middle.
TRIES = 3


class LatencySource:
    """Gives the latency of subnets, each measured at most once in the life of a search.

    What was measured is in the history; a search that was killed and started again asks for the
    same in the same order and counts it again, so it takes the same decisions.
    """

    def __init__(
        self,
        mode: str,
        history: History,
        start_timer: Callable[[float | None], SubnetTimer],
        make_model: Callable[[], LatencyModel] | None,
        smallest: Subnet,
        budget: float,
        note: Callable[[str], None],
    ):
        """Measures nothing yet.

        Args:
          mode: `search.latency`.
          history: of the search.
          start_timer: starts the timing process; takes the smallest subnet's latency where known.
          make_model: loads or makes the latency model, for "verified" and "predicted"; called when
            the first prediction is wanted.
          smallest: by which drift is corrected.
          budget: measurements of a verified search at most.
          note: told when it waits.
        """
        self.mode, self._history, self._make_model = mode, history, make_model
        self._model: LatencyModel | None = None
        self._start_timer, self._smallest, self._budget = start_timer, smallest, budget
        self._timer: SubnetTimer | None = None
        # What the history says of each measured so far, the smallest first.
        self._asked: dict[Subnet, dict[str, Any]] = {}
        self._finals, self._looks, self._note = 0, LOOKS, note
        self._most_ms, self._ratio, self._largest = math.inf, math.inf, smallest
        self.correction = 1.0  # of predictions
        self.speed = 1.0  # of what was measured, see `timing.speed`

    @property
    def measures(self) -> bool:
        """Whether this machine is timed at all."""
        return self.mode != "predicted"

    @property
    def predicts(self) -> bool:
        """Whether the latency of a subnet is known without timing it."""
        return self.mode in ("verified", "predicted")

    @property
    def used(self) -> int:
        """Measurements so far, those that an earlier start of this search made included."""
        return len(self._asked) + self._finals

    @property
    def left(self) -> float:
        """Measurements that the budget still has."""
        return self._budget - self.used

    def close(self):
        """Ends the timing process."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    @property
    def timer(self) -> SubnetTimer:
        """The timing process, started when first needed."""
        if self._timer is None:
            known = self._history.value(NAME, self._smallest)
            self._timer = self._start_timer(known[0] if known else None)
        return self._timer

    @property
    def model(self) -> LatencyModel:
        """The latency model."""
        if self._model is None:
            assert self._make_model is not None
            self._model = self._make_model()
            self._correct()
        return self._model

    def value(self, subnet: Subnet) -> float:
        """Latency in ms, as far as the mode knows it."""
        if not self.predicts:
            return self.measure(subnet)
        if subnet in self._asked:
            return self._asked[subnet]["value"] * self.speed
        return self.model.predict(subnet) * self.correction

    def upper(self, subnet: Subnet) -> float:
        """Upper end of the 95 % interval of `value`, in ms; a prediction has none."""
        value = self.value(subnet)
        if not self.knows(subnet):
            return value
        return self._asked[subnet]["high"] * self.speed

    def how(self, subnet: Subnet) -> str:
        """How `value` was got."""
        if subnet in self._asked:
            return self._asked[subnet]["how"]
        if not self.predicts:
            return self.timer.how
        if self.correction == 1:
            return self.model.how
        return f"{self.model.how}; times {self.correction:.3f}, as measured in this search"

    def knows(self, subnet: Subnet) -> bool:
        """Whether it is measured."""
        return subnet in self._asked

    def predicted(self, subnet: Subnet) -> float | None:
        """The model's latency, where there is a model."""
        return None if self._model is None else self._model.predict(subnet)

    def limit(self, most_ms: float, ratio: float, largest: Subnet):
        """Sets the limit.

        Args:
          most_ms: infinite for none.
          ratio: of the latency of the largest subnet, which is measured now; infinite for none.
          largest: that subnet.
        """
        self._most_ms, self._largest = most_ms, largest
        self.begin()
        if ratio < math.inf:
            if self.measures:
                self.measure(largest)
            self._ratio = ratio
            self._correct()

    @property
    def most(self) -> float:
        """The limit in ms. Where it is a ratio, it follows what the largest subnet's latency is
        taken to be.
        """
        if self._ratio == math.inf:
            return self._most_ms
        return min(self._most_ms, self._ratio * self.value(self._largest))

    def predicted_and_measured(self) -> list[tuple[float, float, float, float]]:
        """(predicted, measured, low, high) in ms of what this search has measured and predicted."""
        return [
            (line["predicted"], *(self.speed * line[name] for name in ("value", "low", "high")))
            for line in self._history.records(NAME)
            if line["predicted"] is not None
        ]

    def _correct(self):
        """Sets `speed`, and measured over predicted latency.

        That is the median of what this search has measured; with too few for a median, what the
        smallest subnet takes over what it took when the model was made. Above one, that counts
        where a ratio is limited, and not for a limit in ms: the machine may be slow for a moment,
        and little would seem to meet the limit.
        """
        if not self._asked:
            return
        first, *others = self._asked.values()
        self.speed = timing.speed(first["value"], [line["reference"] for line in others])
        if self._model is None:
            return
        few = len(self._asked) < FEWEST
        made = self._model.reference
        if few and made is not None and from_json(made["subnet"]) == self._smallest:
            slower = self.value(self._smallest) / made["ms"]
        else:
            slower = statistics.median(self.value(s) / self._model.predict(s) for s in self._asked)
        self.correction = min(slower, 1.0) if few and self._ratio == math.inf else slower

    def measure(self, subnet: Subnet) -> float:
        """Latency in ms, timed where the history has none."""
        if subnet not in self._asked:
            if self._history.value(NAME, subnet) is None:
                timer = self.timer
                m = timer.measure(subnet, self.most / self.speed)
                how = f"{timer.how}; {m.runs} runs" if m.runs else timer.how
                self._history.measured(
                    NAME, subnet, m.ms, how, low=m.low, high=m.high, reference=m.reference,
                    predicted=self.predicted(subnet),
                )  # fmt: skip
            self._asked[subnet] = self._history.about(NAME, subnet)
            self._correct()
        return self._asked[subnet]["value"] * self.speed

    def begin(self):
        """Measures the smallest subnet: what is timed later is corrected by it."""
        if self.measures:
            self.measure(self._smallest)

    def select(self, within: Callable[[Subnet], bool], reserved: int, rounds: int):
        """A selection of parents that measures the best of them, as far as the budget reaches.

        What is measured above the limit is no parent; each round has its share of the budget.

        Args:
          within: the limits.
          reserved: measurements of the budget that are left for the result.
          rounds: of the search.
        """

        def chosen(scored: list[Scored], count: int, iteration: int) -> list[Scored]:
            if self.mode != "verified":
                return scored[:count]
            share = self._share(reserved, rounds - iteration)
            parents: list[Scored] = []
            for s in scored:
                if len(parents) == count:
                    break
                if s.candidate.subnet not in self._asked and share > 0:
                    self.measure(s.candidate.subnet)
                    share -= 1
                if within(s.candidate.subnet):
                    parents.append(s)
            return parents or scored[:1]

        return chosen

    def probe(self, reserved: int, rounds: int):
        """Measures some of each round's front, evenly along it, as far as the budget reaches.

        Args:
          reserved: measurements of the budget that are left for the result.
          rounds: of the search.
        """

        def measured(on_front: list[Scored], iteration: int):
            if self.mode == "verified":
                self.measure_some(on_front, self._share(reserved, rounds - iteration))

        return measured

    def measure_some(self, scored: list[Scored], count: int):
        """Measures up to `count` of those that are not, evenly along the list."""
        unknown = [s for s in scored if not self.knows(s.candidate.subnet)]
        at = np.linspace(0, len(unknown) - 1, min(len(unknown), max(count, 0))).round().astype(int)
        for i in at.tolist():
            self.measure(unknown[i].candidate.subnet)

    def _share(self, reserved: int, rounds: int) -> int:
        """Measurements of a round, `rounds` of which are still to come, itself included."""
        spare = self.left - reserved
        return int(max(0, min(spare, math.ceil(spare / max(1, rounds)))))

    def verify(self, subnet: Subnet, largest: Subnet) -> Verdict:
        """The final measurement, beside the smallest and the largest subnet; once in the life of a
        search.

        Where ms are limited it waits for a machine that is slower than it usually is; what becomes
        slow in the middle is measured again, and counts again.
        """
        known = self._history.about(FINAL, subnet)
        if known:
            self._finals += known["tries"]
            return verdict_of(known["verdict"])
        tries = 0
        while True:
            self._wait(largest)
            verdict = self.timer.verify(subnet, largest)
            verdict = dataclasses.replace(verdict, slowdown=verdict.slowdown / self.speed)
            tries, self._finals = tries + 1, self._finals + 1
            disturbed = verdict.slowdown > CALM and verdict.high_ms > self._most_ms
            if not disturbed or not self._looks or tries == TRIES or self.left < 2:
                break
        self._history.measured(
            FINAL, subnet, verdict.latency.mean_ms, "final measurement",
            tries=tries, verdict=dataclasses.asdict(verdict),
        )  # fmt: skip
        return verdict

    def _wait(self, largest: Subnet):
        """Waits while the machine is slower than usual, as long as there are looks left."""
        if self._most_ms == math.inf:
            return
        told = False
        while self._looks:
            slowdown = self.timer.slowdown(largest) / self.speed
            if slowdown <= CALM:
                return
            self._looks -= 1
            if not told:
                self._note(
                    f"the machine takes {slowdown:.3g} times as long as during most of the search: "
                    f"waiting for it, up to {self._looks * PAUSE:.0f} s, to measure the result"
                )
            told = True
            time.sleep(PAUSE)


def verdict_of(stored: dict[str, Any]) -> Verdict:
    """A `Verdict` from its JSON."""
    both = {name: Latency(**stored[name]) for name in ("latency", "largest")}
    return Verdict(**{**stored, **both})
