"""Measurements of a search or a fit in a JSON-lines file, replayed after a restart."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from automoe_jax.architecture.subnet import Subnet, from_json, to_json
from automoe_jax.latency.statistics import Latency
from automoe_jax.system import files

MEASUREMENTS = "measurements.jsonl"
# Kinds of records, as the file names them.
LATENCY, FINAL = "latency_ms", "final_ms"


class ReplayLog:
    """Records by kind and subnet, each made at most once in the life of a search.

    A search that is started again asks for the same records in the same order; those in the file
    are returned instead of made. Decisions are folds over `asked`, what this process has asked for
    so far, so a resumed search decides as an uninterrupted one.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        lines = files.read_json_lines(path)
        self._stored = {(x["constraint"], from_json(x["subnet"])): x for x in lines}
        self._asked: dict[str, dict[Subnet, dict[str, Any]]] = {}

    def get(self, kind: str, subnet: Subnet, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a subnet; if there is none, `make` returns its fields (`value`, `how`)."""
        key = kind, subnet
        if key not in self._stored:
            line = {"constraint": kind, **make(), "subnet": to_json(subnet)}
            self._stored[key] = line
            files.append_json_line(self._path, line)
        return self._asked.setdefault(kind, {}).setdefault(subnet, self._stored[key])

    def clear(self):
        """Forgets all records: those of a machine that was busy, for example."""
        self._path.unlink(missing_ok=True)
        self._stored.clear()
        self._asked.clear()

    def asked(self, kind: str) -> dict[Subnet, dict[str, Any]]:
        """Records of a kind that this process has asked for, in the order of the first requests."""
        return self._asked.get(kind, {})

    def stored(self, kind: str) -> dict[Subnet, dict[str, Any]]:
        """Every record of a kind, whether asked for or not."""
        return {subnet: line for (k, subnet), line in self._stored.items() if k == kind}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A subnet's latency in ms, corrected for drift by a reference timed in turns with it."""

    ms: float  # mean of the protocol, and its 95 % interval
    low: float
    high: float
    reference: float  # mean of the reference in the same turns, not corrected
    how: str  # how it was measured, in words
    predicted: float | None = None  # before the measurement; None without a model
    largest: float | None = None  # ms of the largest subnet, if timed in the same turns

    def fields(self) -> dict[str, Any]:
        """The fields of a record."""
        values = dataclasses.asdict(self)
        return {"value": values.pop("ms"), "how": values.pop("how"), **values}


def measured_of(line: dict[str, Any]) -> Measured:
    """The measurement in a record; a record without an interval is that of a reference."""
    ms = line["value"]
    low, high, reference = (line.get(name, ms) for name in ("low", "high", "reference"))
    own = line.get("predicted"), line.get("largest")
    return Measured(ms, low, high, reference, line["how"], *own)


@dataclasses.dataclass(frozen=True)
class FinalMeasurement:
    """A subnet timed in turns with the smallest and the largest one; not corrected for drift."""

    latency: Latency
    largest: Latency  # that of the largest subnet
    low_ms: float  # 95 % interval of the latency
    high_ms: float
    ratio: float  # of the largest subnet's latency, and its 95 % interval
    ratio_low: float
    ratio_high: float
    slowdown: float  # the smallest subnet's latency over its usual one


def final_of(line: dict[str, Any]) -> FinalMeasurement:
    """The final measurement in a record."""
    stored = line["verdict"]
    latencies = {name: Latency(**stored[name]) for name in ("latency", "largest")}
    return FinalMeasurement(**{**stored, **latencies})
