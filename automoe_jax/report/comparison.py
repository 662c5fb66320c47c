"""One page that compares systems: quality against latency, a table, architectures, examples."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from automoe_jax.report import curves, expert_use, gains
from automoe_jax.report.architecture import statistics
from automoe_jax.report.elements import SORT, STYLE, card, html_table, picture, sortable_table
from automoe_jax.report.plots import parts_plot, save, with_svg
from automoe_jax.report.systems import PRECISIONS, Group, Row, grouped, table
from automoe_jax.search.front import front
from automoe_jax.system import files

PAGE, PICTURE, PARTS_PICTURE = "index.html", "systems", "parts"
_MARKERS = "osD^vPX*<>p"


def write(
    folder: Path,
    title: str,
    rows: Sequence[Row],
    examples: Mapping[str, Sequence[dict[str, str]]] | None = None,
    trainings: dict[str, curves.Lines] | None = None,
    studies: dict[str, Sequence[Row]] | None = None,
    uses: Mapping[str, tuple[dict[str, Any], Path]] | None = None,
):
    """Writes `index.html`, which needs no other file, and its pictures as PNG and SVG.

    `examples`, by the study of their rows, have "source" and "reference"; `trainings` are the
    metrics of runs by name; `studies` are the rows that were trained alike, by the name of their
    result file; `uses` are runs' `results.json` and pictures of routing, by the runs' names. Each
    study of `rows` has a picture of its own: their BLEU is of different text.
    """
    groups = grouped(rows)
    folder.mkdir(parents=True, exist_ok=True)
    name = html.escape(title)
    files.write_text(
        folder / PAGE,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}{_STYLE}</style>
<h1>{name}</h1>
{_pictures(groups, folder)}
<p><small>BLEU on test text, cased, 13a. Lines through points: lowest and highest of several
seeds; of one seed 95 % intervals, where known: of BLEU by a bootstrap over sentences, of the share
of the reference's latency as timed in turns (ms of different times may not compare). Steps: the
best of dense models, and of mixtures, that are at least as fast.</small></p>
<h2>All systems</h2>
<p><small>A click on a column's name sorts by it.</small></p>
{sortable_table(table(groups))}
{_gains(studies or {})}{_parts(groups, folder)}{_shares(rows)}<h2>Architectures</h2>
<div class=cards>{"".join(_card(row) for row in rows)}</div>
{_uses(uses or {})}{_examples(groups, examples or {})}
{_trainings(groups, trainings or {})}
<script>{SORT}</script>
</html>
""",
    )


def _pictures(groups: Sequence[Group], folder: Path) -> str:
    """A picture for each study, as PNG and SVG in the folder, with its name above it."""
    shown = []
    for i, study in enumerate(dict.fromkeys(group.rows[0].study for group in groups)):
        name = f"{PICTURE}_{i}" if i else PICTURE
        png, svg = with_svg(folder / f"{name}.png")
        save(figure([group for group in groups if group.rows[0].study == study]), png, svg)
        heading = f"<h2>{html.escape(study)}</h2>" if study else ""
        about = f"BLEU against latency of every system{f' of {study}' * bool(study)}"
        shown.append(heading + picture(png, about))
    return "\n".join(shown)


def _gains(studies: dict[str, Sequence[Row]]) -> str:
    """The section on what the quality of searched mixtures is made of; empty without any."""
    tables = {name: gains.table(rows) for name, rows in studies.items()}
    shown = "".join(
        f"<h3>{html.escape(name)}</h3>{html_table('text', rows)}"
        for name, rows in tables.items()
        if len(rows) > 1
    )
    if not shown:
        return ""
    return f"""<h2>What the gain is made of</h2>
{shown}
<p><small>BLEU of a searched mixture (fp32) less that of the model in the second column, trained
alike: the mean over seeds, its 95 % interval (several seeds: Student, seeds as the unit; one seed:
a paired bootstrap over sentences, where the two were compared directly), each seed's; by how much
its validation loss is lower, trained and with weights inherited from one supernet. The last
columns are shares of that model's: of its latency, timed in turns, with the interval of one seed,
or the quotient of the two shares of the reference's; and of its FLOPs. "As fast" is not surely
slower; "not surely worse" is by the intervals of BLEU.</small></p>
"""


def _parts(groups: Sequence[Group], folder: Path) -> str:
    """The section on what latencies are made of, with its picture; empty where none is known."""
    first = {group.label: group.rows[0].parts_ms for group in groups if group.rows[0].parts_ms}
    if not first:
        return ""
    paths = with_svg(folder / f"{PARTS_PICTURE}.png")
    parts_plot(first, *paths)
    return f"""<h2>Where the time goes</h2>
{picture(paths[0], "time of each part of a translation")}
<p><small>What each part of a translation adds to those before it, of each system's first
model: the encoder, the decoder's layers, the output layer, the rest of the beam search.</small></p>
"""


def figure(groups: Sequence[Group]) -> Any:
    """BLEU against latency in each precision, with the fronts of dense models and mixtures.

    Latencies are shares of the reference's where all are known: what was timed at different times
    is compared by them. Else they are in ms.
    """
    timed = [x for group in groups for row in group.rows for x in row.precisions.values()]
    shares = all(x.of_reference is not None for x in timed if x.ms is not None)
    shown = [p for p in PRECISIONS if any(_point(group, p, shares=shares) for group in groups)]
    shown = shown or ["fp32"]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(5.6 * len(shown), 4.8), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    colors = plt.get_cmap("tab20")
    systems = list(dict.fromkeys(group.rows[0].system for group in groups))
    for precision, panel in zip(shown, axes[0], strict=True):
        for kind, color in (("dense", "tab:gray"), ("mixture", "tab:red")):
            own = [g for g in groups if g.rows[0].mixture == (kind == "mixture")]
            points = [p for g in own if (p := _point(g, precision, shares=shares))]
            best = sorted(points[i] for i in front([(x, -y) for x, y in points]))
            panel.step(*zip(*best, strict=True) if best else ([], []), where="post", color=color,
                       linewidth=1, label=f"best {kind}")  # fmt: skip
        for group in groups:
            nth = systems.index(group.rows[0].system)
            if point := _point(group, precision, shares=shares):
                _, low, high = group.bleu(precision) or (None, None, None)
                low, high = (point[1] if end is None else end for end in (low, high))
                panel.errorbar(
                    *point, yerr=[[max(point[1] - low, 0)], [max(high - point[1], 0)]],
                    xerr=_spread(group, precision, shares=shares),
                    fmt=_MARKERS[nth % len(_MARKERS)], color=colors(nth % 20), markersize=6,
                    linewidth=0.8, label=group.rows[0].system,
                )  # fmt: skip
        unit = "share of the reference's" if shares else "ms"
        panel.set_xlabel(f"latency, {precision} ({unit})")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("BLEU")
    handles, labels = axes[0][0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _point(group: Group, precision: str, *, shares: bool) -> tuple[float, float] | None:
    x = group.share(precision) if shares else group.ms(precision)
    bleu = group.bleu(precision)
    return None if x is None or bleu is None else (x, bleu[0])


def _spread(group: Group, precision: str, *, shares: bool) -> list[list[float]] | None:
    """Below and above the latency: of one seed by the interval of its share, else by the seeds."""
    own = [row.precisions[precision] for row in group.rows if precision in row.precisions]
    latencies = [score.share if shares else score.ms for score in own]
    known = [x for x in latencies if x is not None]
    if not known:
        return None
    if len(known) == 1 and own[0].of_reference is not None:
        value, low, high = own[0].of_reference
        return [[max(known[0] - known[0] * low / value, 0)],
                [max(known[0] * high / value - known[0], 0)]]  # fmt: skip
    mean = float(np.mean(known))
    return [[mean - min(known)], [max(known) - mean]]


def _shares(rows: Sequence[Row]) -> str:
    """Where searched mixtures have their experts."""
    # Systems that train another's subnet have the same one.
    subnets = [row.subnet for row in rows if row.budget and row.mixture]
    searched = [x for i, x in enumerate(subnets) if x not in subnets[:i]]
    if not searched:
        return ""
    found = statistics(searched)
    return f"""<p><small>Of the {len(searched)} different searched mixtures:
{found["encoder_share"]:.0%} of the experts are in encoders, {found["several_share"]:.0%} of the
layers have several, and
{found["mixed_share"]:.0%} of those have experts of different sizes.</small></p>
"""


def _card(row: Row) -> str:
    return card(row.subnet, f"{row.label}, seed {row.seed}" if row.seed else row.label)


def _trainings(groups: Sequence[Group], runs: dict[str, curves.Lines]) -> str:
    """The section on how models were trained: of each study the first seeds', and each run's."""
    figures = {}
    for study in dict.fromkeys(group.rows[0].study for group in groups):
        first = (group.rows[0] for group in groups if group.rows[0].study == study)
        known = {row.label: row.losses for row in first if row.losses}
        figures[study or "Models"] = curves.losses(known)
    figures |= {name: curves.figures(lines) for name, lines in runs.items()}
    shown = "".join(f"<h3>{html.escape(k)}</h3>{own}" for k, own in figures.items() if own)
    return f"<h2>Trainings</h2>{shown}" if shown else ""


def _uses(runs: Mapping[str, tuple[dict[str, Any], Path]]) -> str:
    """Of each run which experts the tokens use; empty where no run has several in a layer."""
    found = {name: expert_use.sections(*own, level=3) for name, own in runs.items()}
    return "".join(
        f"<h2>Experts of {html.escape(name)}</h2>{own}" for name, own in found.items() if own
    )


def _examples(groups: Sequence[Group], examples: Mapping[str, Sequence[dict[str, str]]]) -> str:
    """What each system makes of some sentences of its study, with its first seed."""
    firsts = [group.rows[0] for group in groups]
    parts = []
    for study, sentences in examples.items():
        shown = [row for row in firsts if row.study == study and row.translations]
        for i, example in enumerate(sentences if shown else ()):
            lines = [["", example["source"]], ["reference", example["reference"]]]
            lines += [[x.label, x.translations[i]] for x in shown if i < len(x.translations)]
            parts.append(f"<details{' open' * (not parts)}><summary>"
                         f"{html.escape(example['source'])}</summary>{html_table('text', lines)}"
                         "</details>")  # fmt: skip
    return f"<h2>Examples</h2>{''.join(parts)}\n" if parts else ""


_STYLE = """
details { margin: .5rem 0; }
summary { cursor: pointer; }
"""
