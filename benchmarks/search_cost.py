"""Cost of a search with the paper's settings, and evolution against random search.

python benchmarks/search_cost.py --json --workdir=runs/multi30k

Trains the supernet of configs/multi30k.py where the workdir has none (half an hour on 2 cores), and
makes a latency model of this machine. Then one search of 15 iterations and a population of 125
under a verified latency limit, timed; and for five seeds evolution and random search of the same
budget under a FLOPs limit.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import measure

ROOT = Path(__file__).resolve().parent.parent
PAPER = {
    "iterations": 15, "population": 125, "parents": 25, "mutations": 50, "crossovers": 50,
    "measurements": 60, "keep": 5, "latency": "verified",
}  # fmt: skip
# A tenth of the paper's, for five seeds of two algorithms.
SMALL = {"iterations": 5, "population": 30, "parents": 8, "mutations": 13, "crossovers": 13}
SEEDS = (1, 2, 3, 4, 5)
MINUTES, MEASUREMENTS, WINS = 15, 60, 4


def launch(program: str, *args: str) -> str:
    """Standard output of a program of `launch/`; its progress goes to stderr."""
    command = [sys.executable, str(ROOT / "launch" / f"{program}.py"), *args]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--workdir", default="runs/multi30k")
    parser.add_argument("--config", default="configs/multi30k.py")
    parser.add_argument("--ratio", type=float, default=0.6, help="of the largest's latency")
    args = parser.parse_args()
    run = Path(args.workdir).absolute()
    common = ["--config", args.config, "--workdir", str(run)]
    launch("train", *common)
    out = run / "search_cost"
    shutil.rmtree(out, ignore_errors=True)

    start = time.monotonic()
    if not (run / "latency_model.json").exists():
        launch("fit_latency", *common)
    model_minutes = (time.monotonic() - start) / 60

    def search(name: str, settings: dict[str, object], *more: str) -> dict:
        settings = {"constraint.latency_ratio": 0, **settings}
        flags = [f"--config.search.{k}={v}" for k, v in settings.items()]
        return json.loads(launch("search", *common, *flags, *more, f"--out={name}", "--json"))

    start = time.monotonic()
    found = search("search_cost/paper", {**PAPER, "constraint.latency_ratio": args.ratio})
    minutes = (time.monotonic() - start) / 60
    best = found["best"][0]

    seeds = f"--seeds={','.join(map(str, SEEDS))}"
    gflops = float(f"{best['costs']['gflops']:.3g}")  # a limit that excludes many subnets
    algorithms = {}
    for algorithm in ("evolution", "random_search"):
        settings = {**SMALL, "algorithm": algorithm, "constraint.gflops": gflops}
        compared = search(f"search_cost/{algorithm}", settings, seeds)
        algorithms[algorithm] = {s: row["best"] for s, row in compared["seeds"].items()}
    wins = sum(algorithms["evolution"][str(s)] < algorithms["random_search"][str(s)] for s in SEEDS)
    result = {
        "benchmark": "search_cost",
        **measure.machine(),
        "scored": found["scored"],
        "minutes": round(minutes, 2),
        "latency_model_minutes": round(model_minutes, 2),
        "measurements": found["measurements"],
        "limits": found["limits"],
        "best": best,
        "random": {k: found["random"][k] for k in ("count", "median_loss", "best_loss")},
        "best_losses": algorithms,
    }
    goals = {
        "minutes": measure.goal(minutes, MINUTES),
        "measurements": measure.goal(found["measurements"], MEASUREMENTS),
        "recompilations": measure.goal(found["recompilations"], 0),
        "latency ratio, upper end": measure.goal(best["verified"]["ratio_high"], args.ratio),
        "seeds that evolution wins": measure.goal(wins, WINS, at_most=False),
    }
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
