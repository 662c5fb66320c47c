"""Pictures of a search: what was scored, how it went on, how latency was predicted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from automoe_jax.search.front import front

LABELS = {
    "latency_ms": "latency of the exported subnet (ms)",
    "gflops": "FLOPs of a forward pass (billions)",
    "active_params_m": "active parameters (millions)",
    "params_m": "parameters (millions)",
    "size_mb": "exported weights (MB)",
}
SIZE = (7.5, 4.8)
DPI = 130
LOSS = "validation loss, inherited weights (nats a token)"
Marked = dict[str, tuple[float, float]]


def save(figure, path: Path):
    """Writes a PNG and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def search_plot(
    lines: list[dict[str, Any]],
    x_name: str,
    path: Path,
    limit: float | None = None,
    marked: Marked | None = None,
    y_label: str = LOSS,
    on_front: Sequence[tuple[float, float]] | None = None,
):
    """Score against a cost, every scored candidate, with the front.

    Args:
      lines: of `history.jsonl`.
      x_name: of a cost, as `latency_ms`.
      path: PNG to write.
      limit: drawn as a line.
      marked: points to name, as {label: (x, score)}.
      y_label: what the score is.
      on_front: (cost, score) of the front; None for that of `lines`.
    """
    points = [(line["costs"][x_name], line["loss"]) for line in lines]
    rounds = [line["iteration"] for line in lines]
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    dots = axes.scatter(
        [p[0] for p in points], [p[1] for p in points],
        c=rounds, cmap="viridis", s=22, alpha=0.8, linewidths=0,
    )  # fmt: skip
    if len(set(rounds)) > 1:
        figure.colorbar(dots, ax=axes, label="iteration", ticks=MaxNLocator(integer=True))
    if on_front is None:
        on_front = points
    best = [on_front[i] for i in front(on_front)]
    axes.step(
        [p[0] for p in best], [p[1] for p in best],
        where="post", color="tab:red", linewidth=1.2, label="Pareto front",
    )  # fmt: skip
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    _mark(axes, marked or {})
    axes.set_xlabel(LABELS.get(x_name, x_name))
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    save(figure, path)


def _mark(axes, marked: Marked):
    for (label, (x, y)), marker in zip(marked.items(), "*sD^v", strict=False):
        axes.plot(
            x, y, marker, markersize=13 if marker == "*" else 8, markeredgecolor="black",
            label=label, linestyle="none",
        )  # fmt: skip


def progress_plot(lines: list[dict[str, Any]], path: Path, y_label: str = LOSS):
    """Scores in the order that they came, the best so far, and where iterations begin."""
    losses = [line["loss"] for line in lines]
    best = [min(losses[: i + 1]) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for origin, color in (
        ("sample", "tab:gray"), ("start", "black"), ("mutation", "tab:blue"),
        ("crossover", "tab:orange"), ("last resort", "black"),
    ):  # fmt: skip
        own = [i for i, line in enumerate(lines) if line["origin"] == origin]
        if own:
            axes.scatter(
                [i + 1 for i in own], [losses[i] for i in own],
                s=14, color=color, alpha=0.6, linewidths=0, label=origin,
            )  # fmt: skip
    axes.step(range(1, len(best) + 1), best, where="post", color="tab:red", label="best so far")
    starts = [
        i + 0.5 for i in range(1, len(lines)) if lines[i]["iteration"] != lines[i - 1]["iteration"]
    ]
    for x in starts:
        axes.axvline(x, color="black", alpha=0.12, linewidth=0.8)
    axes.set_xlabel("subnets scored (lines: iterations)")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False, fontsize=9)
    save(figure, path)


def predicted_plot(pairs: Sequence[tuple[float, float, float, float]], path: Path):
    """Predicted against measured latency.

    Args:
      pairs: (predicted, measured, low, high) in ms; the last two a 95 % interval.
      path: PNG to write.
    """
    predicted, measured, low, high = ([p[i] for p in pairs] for i in range(4))
    figure, axes = plt.subplots(figsize=(5.4, 5.0), layout="constrained")
    errors = [
        [max(0.0, m - x) for m, x in zip(measured, low, strict=True)],
        [max(0.0, x - m) for m, x in zip(measured, high, strict=True)],
    ]
    axes.errorbar(
        predicted, measured, yerr=errors, fmt="o", markersize=4.5, elinewidth=0.9, alpha=0.8,
        label="subnets, 95 % interval",
    )  # fmt: skip
    ends = [min(predicted + measured), max(predicted + measured)]
    axes.plot(ends, ends, color="black", linewidth=1, label="equal")
    axes.fill_between(
        ends, [0.95 * x for x in ends], [1.05 * x for x in ends], color="black", alpha=0.08,
        label="within 5 %",
    )  # fmt: skip
    axes.set_xlabel("predicted latency (ms)")
    axes.set_ylabel("measured latency (ms)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)
    save(figure, path)


def fronts_plot(
    fronts: dict[str, list[tuple[float, float]]], x_name: str, path: Path, y_label: str = LOSS
):
    """The fronts of several searches, one line each."""
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for label, points in fronts.items():
        ordered = sorted(points)
        axes.step(
            [p[0] for p in ordered], [p[1] for p in ordered],
            where="post", marker="o", markersize=4, label=label,
        )  # fmt: skip
    axes.set_xlabel(LABELS.get(x_name, x_name))
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    save(figure, path)


def rank_plot(inherited: list[float], scratch: list[float], text: str, path: Path):
    """Losses of subnets trained from scratch against those with inherited weights."""
    figure, axes = plt.subplots(figsize=(5.4, 5.0), layout="constrained")
    axes.scatter(inherited, scratch, s=36, color="tab:blue", alpha=0.85, linewidths=0)
    for i, point in enumerate(zip(inherited, scratch, strict=True), 1):
        axes.annotate(
            str(i), point, xytext=(4, 4), textcoords="offset points", fontsize=8, color="tab:gray"
        )
    axes.set_xlabel("loss with inherited weights (nats a token)")
    axes.set_ylabel("loss after training from scratch (nats a token)")
    axes.set_title(text, fontsize=10)
    axes.grid(alpha=0.3)
    save(figure, path)
