"""Writes the tables and pictures of the pages from the result files in benchmarks/.

python docs/make_results.py                     # all of them
python docs/make_results.py --check             # exits with 1 where a table is not what this writes
python docs/make_results.py --search=RUN        # takes the picture's file from a pipeline first
python docs/make_results.py --quickstart=RUN    # takes quickstart's results from its run first

A table stands in a page between `<!-- table NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, StrMethodFormatter
from result_tables import (
    QUICKSTART,
    RESULTS,
    ROOT,
    STUDIES,
    TABLES,
    Table,
    experts_by_updates,
    study,
)

from automoe_jax.report import comparison, plots, systems
from automoe_jax.system import files

SEARCH = RESULTS / "search_tatoeba.jsonl"
PICTURE = ROOT / "docs" / "images" / "search.png"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LATENCY = "latency_ms"
_TABLE = re.compile(r"(<!-- table (\w+) -->\n)(?:\|.*\n)*(<!-- end -->)")


def markdown(rows: Table) -> str:
    """A table; its first row is the header."""
    text = [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in rows]
    return "\n".join([text[0], "|" + "---|" * len(rows[0]), *text[1:]]) + "\n"


def written(page: Path) -> str:
    """A page with its tables as the results are now."""
    text = page.read_text("utf-8")
    marks = {x[1] for x in re.finditer(r"<!-- table (\w+)", text)}
    if whole := marks ^ {x[2] for x in _TABLE.finditer(text) if x[2] in TABLES}:
        sys.exit(f"{page.name}: table {min(whole)} is unknown or has no <!-- end --> after it")
    return _TABLE.sub(lambda x: x[1] + markdown(TABLES[x[2]]()) + x[3], text)


def record_search(search: Path):
    """Writes the picture's file from the folder of a search under a limit in ms."""
    result = files.read_json(search / "result.json", "search result")
    found = result["best"][0]
    shown = {"found": found, **result["corners"]}
    marked = {name: [x["costs"][LATENCY], x["sample_loss"]] for name, x in shown.items()}
    front = files.read_json(search / "front.json", "front")["subnets"]
    about = {
        "limit_ms": result["limits"][LATENCY]["most"],
        "how": result["limits"][LATENCY]["how"],
        "marked": marked,
        "front": [[x["costs"][LATENCY], x["loss"]] for x in front],
        "verified": found["verified"],
    }
    scored = [about]
    for line in files.parse_json_lines(search / "history.jsonl"):
        own = {"iteration": line["iteration"], "loss": line["loss"]}
        scored.append({**own, "costs": {LATENCY: line["costs"][LATENCY]}})
    files.write_text(SEARCH, "".join(json.dumps(line) + "\n" for line in scored))


def record_quickstart(report: Path):
    """Takes what the table shows from the report of a run."""
    found = files.read_json(report / "results.json", "report")
    kept = ("rows", "test", "gain_over_random", "latency", "limit_ratio", "seconds")
    files.write_json(QUICKSTART, {name: found[name] for name in kept})


def draw():
    """Draws the pictures from their files."""
    about, *scored = files.parse_json_lines(SEARCH)
    marked: dict[str, Any] = {name: tuple(point) for name, point in about["marked"].items()}
    front = [tuple(point) for point in about["front"]]
    limit = about["limit_ms"]
    plots.search_plot(scored, LATENCY, PICTURE, limit=limit, marked=marked, on_front=front)
    for corpus in STUDIES:
        figure = comparison.figure(systems.grouped(study(corpus)))
        plots.save(figure, PICTURE.with_name(f"systems_{corpus}.png"))
    draw_experts()


def draw_experts():
    """Draws what eight experts gain over one FFN: learning curves, and the gain at their ends."""
    one, eight = (experts_by_updates(n) for n in (1, 8))
    figure, (curves, gain) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, found, style in (("one FFN", one, "o-"), ("eight experts", eight, "s--")):
        for nth, (updates, line) in enumerate(found.items()):
            points = [(int(x), loss) for x, loss in line["losses"].items()]
            label = f"{name}, {updates:,} updates"
            curves.plot(*zip(*points, strict=True), style, color=f"C{nth}", markersize=4,
                        linewidth=1, label=label)  # fmt: skip
    curves.set(xlabel="updates", ylabel="validation loss (nats a token)")
    curves.legend(fontsize=8)
    both = sorted(one.keys() & eight)
    gains = [one[n]["losses"][str(n)] - eight[n]["losses"][str(n)] for n in both]
    gain.plot(both, gains, "o-", color="tab:red")
    gain.set(xlabel="updates of the whole training", ylim=(0, None),
             ylabel="gain of eight experts (nats a token)")  # fmt: skip
    for axes in (curves, gain):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([min(both) // 4, min(both) // 2, *both]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.3)
    plots.save(figure, PICTURE.with_name("experts.png"))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--search", type=Path, help="workdir of a finished pipeline")
    parser.add_argument("--quickstart", type=Path, help="workdir of a finished quickstart")
    args = parser.parse_args()
    if args.check:
        stale = [page.name for page in PAGES if written(page) != page.read_text("utf-8")]
        if stale:
            sys.exit(f"{', '.join(stale)}: stale tables; run: make docs")
        return
    if args.search:
        record_search(args.search / "search")
    if args.quickstart:
        record_quickstart(args.quickstart / "report")
    for page in PAGES:
        files.write_text(page, written(page))
    draw()


if __name__ == "__main__":
    main()
