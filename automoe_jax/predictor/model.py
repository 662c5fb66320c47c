"""`LatencyModel`: predicts the latency of a subnet; a JSON file that names its machine."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.predictor import features
from automoe_jax.predictor.features import TranslationTask
from automoe_jax.predictor.scores import Agreement
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

VERSION = 1
WORK, AVERAGES = "work", "averages"
# Properties in which two machines must agree to share a model.
_SAME = ("cpu", "threads", "platform", "kernels", "jax", "automoe_jax")


@dataclasses.dataclass(frozen=True)
class LatencyModel:
    """A fitted model."""

    kind: str  # "work" (fitted to timed exports) or "averages" (to a table of latencies)
    coefficients: dict[str, float]  # ms per unit of a feature; for "averages" with "intercept"
    task: TranslationTask | None  # None for a table
    made_for: dict[str, Any]  # CPU, threads, platform, kernels, versions; for a table, its file
    error: Agreement  # on held-out subnets
    fitted: int  # subnets or rows that it was fitted to
    reference: dict[str, Any] | None  # {"subnet": JSON, "ms": latency}; None for a table

    def predict(self, subnet: Subnet) -> float:
        """Latency in ms."""
        if self.kind == WORK:
            assert self.task is not None
            x_F = features.work(subnet, self.task)
            return float(x_F @ np.array([self.coefficients[name] for name in features.WORK]))
        x_NF = features.products(features.averages(subnet)[None])
        weights = np.array(list(self.coefficients.values()))
        return float(weights[0] + x_NF[0] @ weights[1:])

    @property
    def how(self) -> str:
        """How predictions are made, for a history."""
        where = self.made_for
        place = where.get("table") or f"{where['cpu']}, {where['threads']} thread(s)"
        return (
            f"predicted by a model of {place}, fitted to {self.fitted} latencies; error on "
            f"{self.error.count} others {self.error.mape:.1f} % (mean absolute)"
        )

    def warnings(self, here: dict[str, Any]) -> list[str]:
        """A line for each difference between `made_for` and `here`, that of a model made here."""
        if self.kind == AVERAGES:
            return [
                f"the latency model is of the table {self.made_for['table']}, not of this machine"
            ]
        return [
            f"the latency model was made for {name} {self.made_for.get(name)}, and here it is "
            f"{here[name]}; fit it again with launch/fit_latency.py"
            for name in _SAME
            if self.made_for.get(name) != here[name]
        ]

    def save(self, path: Path):
        """Writes it as JSON."""
        files.write_json(path, {"version": VERSION, **dataclasses.asdict(self)})


def load(path: Path) -> LatencyModel:
    """Reads a model; `UserError` where the file is missing or is something else."""
    stored = files.read_json(path, "latency model")
    try:
        if stored["version"] != VERSION:
            raise UserError(f"{path} is a latency model of version {stored['version']}; fit again")
        fields = {f.name: stored[f.name] for f in dataclasses.fields(LatencyModel)}
        fields["task"] = TranslationTask(**fields["task"]) if fields["task"] else None
        fields["error"] = Agreement(**fields["error"])
        names = features.WORK if fields["kind"] == WORK else ("intercept", *features.PRODUCTS)
        if tuple(fields["coefficients"]) != names:
            raise UserError(f"{path} has other features than this version's; fit it again")
        return LatencyModel(**fields)
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is not a latency model; make one with launch/fit_latency.py"
        ) from None
