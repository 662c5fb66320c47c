"""The result of a search, and its files: subnets, the front, `result.json`, pictures."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from automoe_jax.architecture.subnet import Subnet, to_json
from automoe_jax.latency.records import FinalMeasurement
from automoe_jax.report import architecture, plots
from automoe_jax.search.candidates import Scored
from automoe_jax.system import files

RESULT, FRONT = "result.json", "front.json"


@dataclasses.dataclass(frozen=True)
class Found:
    """A subnet that a search returns, or the smallest or largest one for comparison."""

    subnet: Subnet
    loss: float  # on the whole validation set
    sample_loss: float  # on the sample that candidates are compared on
    costs: dict[str, float]
    final: FinalMeasurement | None  # None unless latency is limited and measured


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """A finished search."""

    algorithm: str
    objective: str
    label: str  # what the score is, for the axis of a picture
    over: tuple[str, ...]  # costs that the front trades off; pictures show the first one
    limits: dict[str, tuple[float, str]]  # bound and origin by name of the cost
    found: tuple[Found, ...]  # the returned subnets, best first
    # The random ones of the first population that are within the limits, in the order of drawing.
    samples: tuple[Scored, ...]
    front: tuple[tuple[Subnet, float, dict[str, float]], ...]  # subnet, score and costs
    corners: dict[str, Found]  # "smallest" and "largest"
    scored: int
    recompilations: int  # of the scoring step
    measurements: int | None  # None if latency is neither limited nor on the front
    lines: tuple[dict[str, Any], ...]  # the history, with costs as known at the end
    # (predicted, measured, low, high) in ms.
    predicted_and_measured: tuple[tuple[float, float, float, float], ...]


def write(result: SearchResult, folder: Path):
    """Writes all files of a finished search; `result.json`, which marks it as finished, last."""
    for i, f in enumerate(result.found, 1):
        files.write_json(folder / f"best_{i}.json", to_json(f.subnet))
    members = [{"loss": x, "costs": c, "subnet": to_json(s)} for s, x, c in result.front]
    over = ["loss", *result.over]
    files.write_json(folder / FRONT, {"version": 1, "over": over, "subnets": members})
    write_pictures(result, members, folder)
    files.write_json(folder / RESULT, _as_json(result))


def _as_json(result: SearchResult) -> dict[str, Any]:
    losses = [s.loss for s in result.samples]
    return {
        "version": 1,
        "algorithm": result.algorithm,
        "over": list(result.over),
        "objective": {"name": result.objective, "label": result.label},
        "limits": {name: {"most": b, "how": how} for name, (b, how) in result.limits.items()},
        "best": [
            {
                "file": f"best_{i}.json",
                "loss": f.loss,
                "sample_loss": f.sample_loss,
                "costs": f.costs,
                "verified": None if f.final is None else dataclasses.asdict(f.final),
            }
            for i, f in enumerate(result.found, 1)
        ],
        "scored": result.scored,
        "recompilations": result.recompilations,
        "measurements": result.measurements,
        "random": {
            "count": len(losses),
            "median_loss": statistics.median(losses) if losses else None,
            "best_loss": min(losses) if losses else None,
            "first": to_json(result.samples[0].subnet) if losses else None,
        },
        "front": len(result.front),
        "corners": {
            name: {"sample_loss": f.sample_loss, "costs": f.costs}
            for name, f in result.corners.items()
        },
        "largest_loss": result.corners["largest"].loss,
        "smallest_loss": result.corners["smallest"].loss,
    }


def write_pictures(result: SearchResult, members: list[dict[str, Any]], folder: Path):
    """Writes the pictures; `members` is the front as JSON."""
    x_name, label = result.over[0], result.label
    bound = result.limits[x_name][0] if x_name in result.limits else None
    shown = {"found": result.found[0], **result.corners}
    marked = {name: (x.costs[x_name], x.sample_loss) for name, x in shown.items()}
    on_front = [(m["costs"][x_name], m["loss"]) for m in members]
    lines = list(result.lines)
    plots.search_plot(
        lines, x_name, folder / "search.png", limit=bound, marked=marked, y_label=label,
        on_front=on_front,
    )  # fmt: skip
    plots.progress_plot(lines, folder / "progress.png", label)
    for i, f in enumerate(result.found, 1):
        architecture.architecture_card(to_json(f.subnet), f.costs, f.loss, folder / f"best_{i}.png")
    architecture.front_statistics(members, x_name, folder / "front.png", label)
    if len(result.predicted_and_measured) > 1:
        plots.predicted_plot(list(result.predicted_and_measured), folder / "latency.png")
