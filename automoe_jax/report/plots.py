"""Pictures of a search."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from automoe_jax.search.evolution import front

LABELS = {
    "latency_ms": "latency of the exported subnet (ms)",
    "gflops": "FLOPs of a forward pass (billions)",
}


def search_plot(
    lines: list[dict[str, Any]],
    x_name: str,
    path: Path,
    limit: float | None = None,
    marked: dict[str, tuple[float, float]] | None = None,
):
    """Loss against a cost, every scored candidate, with the front.

    Args:
      lines: of `history.jsonl`.
      x_name: `latency_ms` or `gflops`.
      path: PNG to write.
      limit: drawn as a line.
      marked: points to name, as {label: (x, loss)}.
    """
    points = [(line["costs"][x_name], line["loss"]) for line in lines]
    rounds = [line["iteration"] for line in lines]
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    dots = axes.scatter(
        [p[0] for p in points],
        [p[1] for p in points],
        c=rounds,
        cmap="viridis",
        s=22,
        alpha=0.8,
        linewidths=0,
    )
    if len(set(rounds)) > 1:
        figure.colorbar(dots, ax=axes, label="iteration", ticks=MaxNLocator(integer=True))
    best = [points[i] for i in front(points)]
    axes.step(
        [p[0] for p in best],
        [p[1] for p in best],
        where="post",
        color="tab:red",
        linewidth=1.2,
        label="Pareto front",
    )
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    for (label, (x, y)), marker in zip((marked or {}).items(), "*sD^v", strict=False):
        axes.plot(
            x, y, marker, markersize=13 if marker == "*" else 8, markeredgecolor="black",
            label=label, linestyle="none",
        )  # fmt: skip
    axes.set_xlabel(LABELS.get(x_name, x_name))
    axes.set_ylabel("validation loss, inherited weights (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
