"""Pictures of searches, of latency predictions and of a supernet's ranking."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from automoe_jax.search.front import front
from automoe_jax.search.sensitivity import Worth

# Classes of tokens in `routing.json`.
_CLASSES = ("frequency", "place")
LABELS = {
    "latency_ms": "latency of the exported subnet (ms)",
    "gflops": "FLOPs of a forward pass (billions)",
    "active_params_m": "active parameters (millions)",
    "params_m": "parameters (millions)",
    "size_mb": "exported weights (MB)",
}
LOSS = "validation loss, inherited weights (nats a token)"
WIDE, SQUARE = (7.5, 4.8), (5.4, 5.0)
DPI = 130
Point = tuple[float, float]  # (cost, score)


def save(figure, *paths: Path):
    """Writes a picture, in the formats that its names end in, and closes the figure."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    plt.close(figure)


def with_svg(path: Path) -> tuple[Path, Path]:
    """The names of a picture as PNG and as SVG."""
    return path, path.with_suffix(".svg")


def _save(axes, *paths: Path, x: str, y: str, grid: Any = "both", **legend: Any):
    """Labels the axes, adds a grid and, given options of one, a legend, and writes the picture."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, axis=grid)
    if legend:
        axes.legend(fontsize=9, **legend)
    save(axes.figure, *paths)


def _step(axes, points: Sequence[Point], **style: Any):
    axes.step([p[0] for p in points], [p[1] for p in points], where="post", **style)


def search_plot(
    lines: list[dict[str, Any]],
    x_name: str,
    *paths: Path,
    limit: float | None = None,
    marked: dict[str, Point] | None = None,
    y_label: str = LOSS,
    on_front: Sequence[Point] | None = None,
):
    """Score over the cost `x_name` of every scored subnet, with the Pareto front.

    `lines` are those of `history.jsonl`. `limit` is drawn as a line, `marked` points are named. The
    front is that of the points `on_front`; of all points for None.
    """
    points = [(line["costs"][x_name], line["loss"]) for line in lines]
    iterations = [line["iteration"] for line in lines]
    figure, axes = plt.subplots(figsize=WIDE, layout="constrained")
    dots = axes.scatter(
        [p[0] for p in points], [p[1] for p in points],
        c=iterations, cmap="viridis", s=22, alpha=0.8, linewidths=0,
    )  # fmt: skip
    if len(set(iterations)) > 1:
        figure.colorbar(dots, ax=axes, label="iteration", ticks=MaxNLocator(integer=True))
    candidates = points if on_front is None else on_front
    best = [candidates[i] for i in front(candidates)]
    _step(axes, best, color="tab:red", linewidth=1.2, label="Pareto front")
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    for (label, (x, y)), marker in zip((marked or {}).items(), "*sD^vPX", strict=False):
        axes.plot(
            x, y, marker, markersize=13 if marker == "*" else 8, markeredgecolor="black",
            label=label, linestyle="none",
        )  # fmt: skip
    _save(axes, *paths, x=LABELS.get(x_name, x_name), y=y_label, loc="best")


def progress_plot(lines: list[dict[str, Any]], path: Path, y_label: str = LOSS):
    """Scores in the order of scoring, the best so far, and the starts of iterations."""
    losses = [line["loss"] for line in lines]
    best = [min(losses[: i + 1]) for i in range(len(losses))]
    _, axes = plt.subplots(figsize=WIDE, layout="constrained")
    for origin, color in (
        ("sample", "tab:gray"), ("start", "black"), ("mutation", "tab:blue"),
        ("crossover", "tab:orange"), ("last resort", "black"),
    ):  # fmt: skip
        own = [(i, line["loss"]) for i, line in enumerate(lines, 1) if line["origin"] == origin]
        if own:
            axes.scatter(*zip(*own, strict=True), s=14, color=color, alpha=0.6, linewidths=0,
                         label=origin)  # fmt: skip
    _step(axes, list(enumerate(best, 1)), color="tab:red", label="best so far")
    for i in range(1, len(lines)):
        if lines[i]["iteration"] != lines[i - 1]["iteration"]:
            axes.axvline(i + 0.5, color="black", alpha=0.12, linewidth=0.8)
    _save(
        axes, path, x="subnets scored (lines: iterations)", y=y_label, grid="y",
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False,
    )  # fmt: skip


def predicted_plot(pairs: Sequence[tuple[float, float, float, float]], path: Path):
    """Measured over predicted latency.

    Each pair is (predicted, measured, low, high) in ms; the last two are a 95 % interval.
    """
    predicted, measured, low, high = np.array(pairs).T
    errors = np.maximum(0, [measured - low, high - measured])
    _, axes = plt.subplots(figsize=SQUARE, layout="constrained")
    axes.errorbar(
        predicted, measured, yerr=errors, fmt="o", markersize=4.5, elinewidth=0.9, alpha=0.8,
        label="subnets, 95 % interval",
    )  # fmt: skip
    ends = np.array([min(*predicted, *measured), max(*predicted, *measured)])
    axes.plot(ends, ends, color="black", linewidth=1, label="equal")
    axes.fill_between(ends, 0.95 * ends, 1.05 * ends, color="black", alpha=0.08, label="within 5 %")
    _save(axes, path, x="predicted latency (ms)", y="measured latency (ms)", loc="upper left")


def fronts_plot(fronts: dict[str, list[Point]], x_name: str, path: Path, y_label: str = LOSS):
    """The fronts of several searches."""
    _, axes = plt.subplots(figsize=WIDE, layout="constrained")
    for label, points in fronts.items():
        _step(axes, sorted(points), marker="o", markersize=4, label=label)
    _save(axes, path, x=LABELS.get(x_name, x_name), y=y_label, loc="best")


def parts_plot(systems: dict[str, dict[str, float]], *paths: Path):
    """What each part of a translation takes (ms), a bar for each system."""
    rows = np.arange(len(systems))[::-1]
    figure, axes = plt.subplots(figsize=(WIDE[0], 1.4 + 0.38 * len(systems)), layout="constrained")
    ends = np.zeros(len(systems))
    for part in next(iter(systems.values())):
        # An addition too small to measure may come out below 0.
        widths = np.array([max(own[part], 0) for own in systems.values()])
        axes.barh(rows, widths, 0.7, left=ends, label=part)
        ends += widths
    axes.set_yticks(rows, list(systems), fontsize=8)
    axes.set_xlabel("ms of a translation")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    save(figure, *paths)


def rank_plot(inherited: list[float], trained: list[float], title: str, path: Path):
    """Losses after training from scratch over losses with inherited weights, numbered."""
    _, axes = plt.subplots(figsize=SQUARE, layout="constrained")
    axes.scatter(inherited, trained, s=36, color="tab:blue", alpha=0.85, linewidths=0)
    for i, point in enumerate(zip(inherited, trained, strict=True), 1):
        axes.annotate(
            str(i), point, xytext=(4, 4), textcoords="offset points", fontsize=8, color="tab:gray"
        )
    axes.set_title(title, fontsize=10)
    x, y = "loss with inherited weights", "loss after training from scratch"
    _save(axes, path, x=f"{x} (nats a token)", y=f"{y} (nats a token)")


def routing_plot(layers: Sequence[dict[str, Any]], *paths: Path):
    """Share of the tokens of each expert, a row per layer: all tokens and those of each class.

    `layers` are those of `routing.json` that have several experts.
    """
    groups = [name for name in ("all", *_CLASSES) if name == "all" or name in layers[0]]
    size = (3.2 * len(groups) + 1.2, 1.2 + 0.5 * sum(len(x["sizes"]) for x in layers) / 2)
    figure, axes = plt.subplots(
        len(layers), len(groups), figsize=size, layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": [len(layer["sizes"]) for layer in layers]},
    )  # fmt: skip
    colors = ScalarMappable(Normalize(0, 1), "Blues")
    for row, layer in zip(axes, layers, strict=True):
        for ax, group in zip(row, groups, strict=True):
            columns = {"all": layer["load"]} if group == "all" else layer[group]
            shares = np.array(list(columns.values())).T
            ax.imshow(shares, norm=colors.norm, cmap=colors.cmap, aspect="auto")
            for (e, c), share in np.ndenumerate(shares):
                color = "white" if share > 0.6 else "black"
                ax.text(c, e, f"{share:.0%}", ha="center", va="center", fontsize=7, color=color)
            ax.set_xticks(range(len(columns)), list(columns), fontsize=7)
            ax.set_yticks([])
        names = [f"{e}: {size}" for e, size in enumerate(layer["sizes"], 1)]
        row[0].set_yticks(range(len(names)), names, fontsize=7)
        row[0].set_ylabel(f"{layer['layer']}\nexpert: FFN size", fontsize=8)
    figure.colorbar(colors, ax=axes, label="share of the class's tokens", shrink=0.6)
    save(figure, *paths)


def sensitivity_plot(worths: Sequence[Worth], unit: str, *paths: Path):
    """Shares of the variance of loss and cost that each choice explains, and what it buys."""
    rows = np.arange(len(worths))[::-1]
    size = (10.5, 1.6 + 0.42 * len(worths))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for share, offset, color, label in (
        ("loss_share", 0.2, "tab:blue", "loss"),
        ("cost_share", -0.2, "tab:orange", f"cost ({unit})"),
    ):
        widths = [100 * getattr(w, share) for w in worths]
        left.barh(rows + offset, widths, 0.38, color=color, label=label)
    left.set_yticks(rows, [w.choice for w in worths])
    left.set_xlabel("share of the variance (%)")
    left.legend(fontsize=9)
    gains = np.array([-w.loss for w in worths])
    errors = np.array([[w.loss_high - w.loss, w.loss - w.loss_low] for w in worths]).T
    colors = ["tab:green" if w.buys else "tab:gray" for w in worths]
    right.barh(rows, gains, 0.6, color=colors, xerr=np.maximum(errors, 0), ecolor="black")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("nats gained from lowest to highest value\n(95 % interval)")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(6))
    save(figure, *paths)
