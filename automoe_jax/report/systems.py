"""The trained models that a comparison shows, and their table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from automoe_jax.report.architecture import SIDES

PRECISIONS = ("fp32", "int8")
Interval = tuple[float, float, float]  # a value and the ends of its 95 % interval


@dataclasses.dataclass(frozen=True)
class PrecisionScores:
    """Of one precision: BLEU, with its interval if known, and latency, if measured."""

    bleu: tuple[float, float | None, float | None]
    chrf: float
    ms: float | None = None
    of_reference: Interval | None = None

    @property
    def share(self) -> float | None:
        """Of the reference's latency, without its interval."""
        return None if self.of_reference is None else self.of_reference[0]


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """A model beside another one, in fp32."""

    bleu: Interval  # difference; paired bootstrap over sentences
    latency_ratio: Interval  # timed in turns
    inherited: float | None = None  # how much lower its loss is, if one supernet has both

    @property
    def reverse(self) -> "PairedDifference":
        """That of the other model."""
        bleu, low, high = self.bleu
        ratio, lowest, highest = self.latency_ratio
        return PairedDifference(
            (-bleu, -high, -low), (1 / ratio, 1 / highest, 1 / lowest),
            None if self.inherited is None else -self.inherited,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained model."""

    system: str
    budget: str  # what limited its search; empty for none
    seed: int
    subnet: dict[str, Any]
    params_m: float
    active_params_m: float
    gflops: float
    precisions: dict[str, PrecisionScores]
    hours: float | None = None  # of training and scoring
    search_minutes: float | None = None  # of its own search, in a trained supernet
    translations: tuple[str, ...] = ()  # of the examples
    parts_ms: dict[str, float] = dataclasses.field(default_factory=dict)  # of its latency, fp32
    more_tests: dict[str, float] = dataclasses.field(default_factory=dict)  # BLEU, fp32, by name
    loss: float | None = None  # on validation text
    losses: dict[int, float] = dataclasses.field(default_factory=dict)  # the same by update
    study: str = ""  # that it belongs to, where several are shown
    # From other models of its seed, by their labels.
    differences: dict[str, PairedDifference] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The study, the system, and its budget, of the two where there is one."""
        study = f"{self.study}: " if self.study else ""
        return f"{study}{self.system} ({self.budget})" if self.budget else study + self.system

    def difference(self, other: "Row") -> PairedDifference | None:
        """From another model, if the two are of one seed and were compared directly."""
        if self.seed != other.seed:
            return None
        if found := self.differences.get(other.label):
            return found
        reverse = other.differences.get(self.label)
        return None if reverse is None else reverse.reverse

    @property
    def mixture(self) -> bool:
        """Whether a layer has several experts."""
        return any(len(x["experts"]) > 1 for side in SIDES for x in self.subnet[side]["layers"])

    @property
    def sparsity(self) -> float:
        """Share of the parameters that a token does not use."""
        return 1 - self.active_params_m / self.params_m


@dataclasses.dataclass(frozen=True)
class Group:
    """The seeds of a system at a budget."""

    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        return self.rows[0].label

    def bleu(self, precision: str) -> tuple[float, float | None, float | None] | None:
        """Mean over seeds with the lowest and highest; of one seed its bootstrap interval."""
        found = [r.precisions[precision].bleu for r in self.rows if precision in r.precisions]
        if len(found) < 2:
            return found[0] if found else None
        values = [value for value, _, _ in found]
        return float(np.mean(values)), min(values), max(values)

    def ms(self, precision: str) -> float | None:
        """Mean over seeds."""
        return self._mean(lambda row: row.precisions[precision].ms, precision)

    def share(self, precision: str) -> float | None:
        """Of the reference's latency, mean over seeds."""
        return self._mean(lambda row: row.precisions[precision].share, precision)

    def _mean(self, value: Any, precision: str) -> float | None:
        found = [value(row) for row in self.rows if precision in row.precisions]
        known = [x for x in found if x is not None]
        return float(np.mean(known)) if known else None


def grouped(rows: Sequence[Row]) -> list[Group]:
    """The models of each system and budget together, in the order in which they come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row)
    return [Group(tuple(own)) for own in found.values()]


def table(groups: Sequence[Group]) -> list[list[str]]:
    """Header, then a row for each system and budget: means over its seeds, the sum of times."""
    more = list(dict.fromkeys(name for g in groups for row in g.rows for name in row.more_tests))
    rows = [
        ["system", "seeds", "params M", "active M", "sparsity", "GFLOPs", "ms fp32", "speed-up",
         "BLEU fp32", "from", "to", "chrF", *(f"BLEU {name}" for name in more), "ms int8",
         "BLEU int8", "search min", "hours"],
    ]  # fmt: skip
    for group in groups:
        own = group.rows
        share, bleu, int8 = group.share("fp32"), group.bleu("fp32"), group.bleu("int8")
        chrf = [row.precisions["fp32"].chrf for row in own if "fp32" in row.precisions]
        rows.append([
            group.label, str(len(own)), *(
                f"{np.mean(x):.3f}" for x in (
                    [row.params_m for row in own], [row.active_params_m for row in own])),
            f"{np.mean([row.sparsity for row in own]):.1%}",
            f"{np.mean([row.gflops for row in own]):.4f}",
            _number(group.ms("fp32"), 2), _number(None if share is None else 1 / share, 2),
            *(_number(x, 2) for x in bleu or (None,) * 3),
            _mean(chrf, 2),
            *(_mean([row.more_tests[name] for row in own if name in row.more_tests], 2)
              for name in more),
            _number(group.ms("int8"), 2), _number(int8[0] if int8 else None, 2),
            _sum([row.search_minutes for row in own]), _sum([row.hours for row in own]),
        ])  # fmt: skip
    return rows


def _mean(values: Sequence[float], digits: int) -> str:
    return _number(float(np.mean(values)) if values else None, digits)


def _sum(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(sum(known) if known else None, 1)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
