"""Draws docs/images/search.png, the picture of the README, from a committed result file.

python docs/make_pictures.py              # from benchmarks/results/search_tatoeba.jsonl
python docs/make_pictures.py --run=RUN    # takes that file from a finished pipeline first
"""

import argparse
import json
from pathlib import Path
from typing import Any

from automoe_jax.report import plots
from automoe_jax.system import files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search_tatoeba.jsonl"
PICTURE = ROOT / "docs" / "images" / "search.png"
LATENCY = "latency_ms"


def record(search: Path):
    """Writes the results file from the folder of a search under a limit in ms."""
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
    lines = [about]
    for line in files.parse_json_lines(search / "history.jsonl"):
        own = {"iteration": line["iteration"], "loss": line["loss"]}
        lines.append({**own, "costs": {LATENCY: line["costs"][LATENCY]}})
    files.write_text(RESULTS, "".join(json.dumps(line) + "\n" for line in lines))


def draw():
    """Draws the picture from the results file."""
    about, *lines = files.parse_json_lines(RESULTS)
    marked: dict[str, Any] = {name: tuple(point) for name, point in about["marked"].items()}
    front = [tuple(point) for point in about["front"]]
    limit = about["limit_ms"]
    plots.search_plot(lines, LATENCY, PICTURE, limit, marked, on_front=front)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="workdir of a finished pipeline")
    args = parser.parse_args()
    if args.run:
        record(args.run / "search")
    draw()


if __name__ == "__main__":
    main()
