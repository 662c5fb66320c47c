"""The metrics of trainings as a table and as a page of curves.

The lines of a training are those of its `metrics.jsonl`: step, wall_s, name, value.
"""

import collections
import html
import io
import re
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from automoe_jax.report.elements import STYLE, html_table

Lines = list[dict[str, Any]]
Series = dict[str, list[tuple[int, float]]]  # by name of the metric: (step, value)
# Rows of the table: what is shown, its metric, and how.
_ROWS = (
    ("training loss", "train/loss", "{:.3f}"),
    ("validation loss, largest", "valid/loss_largest", "{:.3f}"),
    ("validation loss, smallest", "valid/loss_smallest", "{:.3f}"),
    ("validation loss, random", "valid/loss_random", "{:.3f}"),
    ("validation loss", "valid/loss_subnet", "{:.3f}"),
    ("load-balance loss", "train/load_balance", "{:.3f}"),
    ("gradient norm", "train/gradient_norm", "{:.3f}"),
    ("learning rate", "learning_rate", "{:.2e}"),
    ("skipped steps", "train/skipped_steps", "{:.0f}"),
    ("target tokens/s", "train/target_tokens_per_s", "{:,.0f}"),
    ("goodput", "run/goodput", "{:.1%}"),
    ("starting", "run/share_starting", "{:.1%}"),
    ("waiting for data", "run/share_data", "{:.1%}"),
    ("compiling", "run/share_compiling", "{:.1%}"),
    ("evaluating", "run/share_evaluating", "{:.1%}"),
    ("saving", "run/share_saving", "{:.1%}"),
    ("memory, GB", "run/memory_gb", "{:.2f}"),
    ("device memory, GB", "run/device_memory_gb", "{:.2f}"),
)
_LOAD = re.compile(r"valid/load_(\w+?)/(encoder|decoder)_(\d+)/expert_(\d+)")
_ENTROPY = re.compile(r"valid/entropy_(\w+?)/(encoder|decoder)_(\d+)")
_SIZE = (7.5, 4.0)


def series(lines: Lines) -> Series:
    """The values of each metric; validation losses of random subnets also as their mean."""
    found: Series = collections.defaultdict(list)
    random = collections.defaultdict(list)
    for line in lines:
        found[line["name"]].append((line["step"], line["value"]))
        if line["name"].startswith("valid/loss_random_"):
            random[line["step"]].append(line["value"])
    if random:
        found["valid/loss_random"] = [(step, float(np.mean(x))) for step, x in random.items()]
    return dict(found)


def table(trainings: dict[str, Lines], totals: dict[str, int]) -> list[list[str]]:
    """Header and rows: the last value of each metric, a column for each training.

    `totals` are the steps that each is to take.
    """
    columns = {name: series(lines) for name, lines in trainings.items()}
    steps = [
        f"{max((line['step'] for line in lines), default=0):,} of {totals[name]:,}"
        for name, lines in trainings.items()
    ]
    rows = [["", *columns], ["step", *steps]]
    for label, metric, form in _ROWS:
        last = [
            form.format(own[metric][-1][1]) if metric in own else "" for own in columns.values()
        ]
        if any(last):
            rows.append([label, *last])
    return rows


def page(title: str, trainings: dict[str, Lines], totals: dict[str, int]) -> str:
    """An HTML page without other files: the table, and the curves of each training."""
    parts = [f"<h2>{html.escape(n)}</h2>{figures(lines)}" for n, lines in trainings.items()]
    name = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>
<h1>{name}</h1>
{html_table("metrics", table(trainings, totals))}
{"".join(parts)}
</html>
"""


def figures(lines: Lines) -> str:
    """The curves of a training as SVG."""
    return "".join(_svg(figure) for figure in _figures(series(lines)))


def losses(models: dict[str, dict[int, float]]) -> str:
    """The validation losses of several models, by their steps, in one figure as SVG."""
    own = {name: sorted(by_step.items()) for name, by_step in models.items()}
    figure = _curves(own, {name: name for name in own}, "validation loss (nats a token)")
    return "" if figure is None else _svg(figure)


def _figures(own: Series) -> list[Any]:
    losses = {
        "training, with label smoothing": "train/loss", "largest": "valid/loss_largest",
        "random, mean": "valid/loss_random", "smallest": "valid/loss_smallest",
        "validation": "valid/loss_subnet",
    }  # fmt: skip
    shares = {
        "steps (goodput)": "run/goodput", "starting": "run/share_starting",
        "data": "run/share_data", "compiling": "run/share_compiling",
        "evaluating": "run/share_evaluating", "saving": "run/share_saving",
    }  # fmt: skip
    wanted = [
        (losses, "loss (nats a token)"),
        ({"load balance": "train/load_balance"}, "load-balance loss (1 is even)"),
        ({"speed": "train/target_tokens_per_s"}, "target tokens a second"),
        (shares, "share of the time since the start"),
    ]
    figures = [_curves(own, names, label) for names, label in wanted]
    routing = (*_entropies(own), *_loads(own))
    return [figure for figure in (*figures, *routing) if figure is not None]


def _curves(own: Series, names: dict[str, str], label: str) -> Any:
    """The metrics over the steps; None if there are none."""
    there = {shown: own[metric] for shown, metric in names.items() if metric in own}
    if not there:
        return None
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for shown, points in there.items():
        marker = "o" if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), label=shown, marker=marker, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(there) > 1:
        axes.legend(fontsize=9)
    return figure


def _entropies(own: Series) -> list[Any]:
    """Of each subnet that is evaluated, its routers' entropies: where one falls to 0, it chooses
    for certain; at the logarithm of the number of experts it has no preference.
    """
    found: dict[str, dict[str, str]] = {}
    for name in own:
        if match := _ENTROPY.fullmatch(name):
            subnet, side, layer = match.groups()
            found.setdefault(subnet, {})[f"{side} {layer}"] = name
    return [_curves(own, names, f"router entropy, {_of(k)} (nats)") for k, names in found.items()]


def _of(subnet: str) -> str:
    """Which of the evaluated subnets a picture is of; a training of its own has one."""
    return "subnet" if subnet == "subnet" else f"{subnet} subnet"


def _loads(own: Series) -> list[Any]:
    """For each subnet that is evaluated, the load of its experts at the last evaluation."""
    loads: dict[str, dict[tuple[str, int], dict[int, float]]] = {}
    for name, points in own.items():
        if match := _LOAD.fullmatch(name):
            subnet, side, layer, expert = match.groups()
            rows = loads.setdefault(subnet, {}).setdefault((side, int(layer)), {})
            rows[int(expert)] = points[-1][1]
    return [_load_figure(subnet, rows) for subnet, rows in loads.items()]


def _load_figure(subnet: str, rows: dict[tuple[str, int], dict[int, float]]) -> Any:
    layers = sorted(rows, key=lambda row: (row[0] == "decoder", row[1]))
    grid = np.full((len(layers), max(map(len, rows.values()))), np.nan)
    for i, layer in enumerate(layers):
        for expert, share in rows[layer].items():
            grid[i, expert] = share
    size = (1.6 + 0.8 * grid.shape[1], 1.2 + 0.35 * len(layers))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(grid):
        if np.isfinite(share):
            colour = "white" if share > 0.6 else "black"
            axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(grid.shape[1]), [str(e + 1) for e in range(grid.shape[1])])
    axes.set_yticks(range(len(layers)), [f"{side} {i}" for side, i in layers])
    axes.set_xlabel("expert")
    axes.set_title(f"share of tokens, {_of(subnet)}", fontsize=10)
    return figure


def _svg(figure: Any) -> str:
    text = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # nothing of it
    figure.savefig(text, format="svg", metadata=about)
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
