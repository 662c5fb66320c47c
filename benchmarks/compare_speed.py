"""Parts of before_after.py that time both commits; the search's history is compared as well."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from child import Child
from commits import (
    QUICKSTART,
    Checkout,
    Comparison,
    Outcome,
    difference_goals,
    in_turns,
    note,
    overrides,
)
from differences import compare, history
from measure import goal, spread
from translators import REST_S, protocol_source

MOST_RATIO = 1.03
# Pairs of processes that time latencies.
PROCESSES = 6
SEARCH = {
    "algorithm": "evolution", "seed": 0, "iterations": 5, "population": 50, "parents": 15,
    "mutations": 15, "crossovers": 15, "constraint.latency_ratio": 0, "constraint.gflops": 0.045,
}  # fmt: skip
RANDOM_EXPORT = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
from translators import random_export
random_export(Path("configs/subnets/transformer_base.json"), Path(sys.argv[1]), sys.argv[2])
"""


def compare_seconds(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Spread of before, of after, and of after / before within each round.

    The ratio of the fastest rounds is what other work on the machine disturbs least.
    """
    before, after = (spread([r[name] for r in rounds]) for name in ("before", "after"))
    return {
        "before": before,
        "after": after,
        "ratio": spread([r["after"] / r["before"] for r in rounds]),
        "ratio_of_fastest": after["min"] / before["min"],
        "rounds": len(rounds),
    }


def ratio_goals(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The goals of `compare_seconds` results by name."""
    return {
        f"{name}, after / before": goal(figure["ratio"]["median"], MOST_RATIO)
        for name, figure in figures.items()
    }


def train_step(comparison: Comparison) -> Outcome:
    """Seconds of full-size updates; each commit compiles once, in a process of its own."""
    random = [f"random_{i}" for i in range(5)]
    server = Path(__file__).with_name("train_step_server.py")

    def measure() -> list[dict[str, dict[str, float]]]:
        with contextlib.ExitStack() as stack:
            children = {
                name: stack.enter_context(checkout.child(server, checkout.source))
                for name, checkout in comparison.pair.items()
            }
            in_turns(children, partial(Child.ask, subnet="largest"))  # compiles, warms up
            rounds = []
            for turn in range(comparison.rounds or 6):
                rounds.append(
                    {
                        subnet: in_turns(children, partial(Child.ask, subnet=subnet), turn)
                        for subnet in ("largest", *random)
                    }
                )
                note(f"train_step: round {turn + 1}, largest {rounds[-1]['largest']}")
            return rounds

    rounds = comparison.record.once("train_step", measure)
    means = [
        {name: float(np.mean([r[subnet][name] for subnet in random])) for name in comparison.pair}
        for r in rounds
    ]
    figures = {
        "train step, largest": compare_seconds([r["largest"] for r in rounds]),
        "train step, mean of five": compare_seconds(means),
    }
    return figures, ratio_goals(figures)


def cpu_latency(comparison: Comparison) -> Outcome:
    """Seconds of a sentence by Transformer-Base, over several pairs of processes.

    Each process places the weights elsewhere in memory, which alone moves latencies by percents.
    """
    kinds = {"fp32": "none", "int8": "int8"}
    cpus = sorted(os.sched_getaffinity(0))[:2]
    threads = {"NPROC": str(len(cpus)), "OMP_NUM_THREADS": str(len(cpus))}
    source = protocol_source()

    def export(checkout: Checkout):
        for quantize in kinds.values():
            folder = checkout.work / f"transformer_base_{quantize}"
            shutil.rmtree(folder, ignore_errors=True)
            checkout.python("-c", RANDOM_EXPORT, folder, quantize)

    def measure() -> list[dict[str, dict[str, float]]]:
        with contextlib.ExitStack() as stack:
            children = {
                name: stack.enter_context(
                    checkout.child(
                        checkout.source / "benchmarks" / "translators.py",
                        "ours",
                        ",".join(map(str, cpus)),
                        JAX_PLATFORMS="cpu",
                        **threads,
                    )
                )
                for name, checkout in comparison.pair.items()
            }

            def seconds(quantize: str, checkout: Checkout) -> float:
                time.sleep(REST_S)
                path = checkout.work / f"transformer_base_{quantize}"
                request = {"call": "latency", "path": str(path), "compute": "", "source": source}
                return children[checkout.name].ask(**request) / 1000

            rounds = [
                {
                    kind: in_turns(comparison.pair, partial(seconds, quantize), turn)
                    for kind, quantize in kinds.items()
                }
                for turn in range(2 + (comparison.rounds or 15))
            ]
            return rounds[2:]  # the first two warm up

    comparison.each("cpu_latency: export", export)
    rounds = []
    for i in range(PROCESSES):
        rounds += comparison.record.once(f"cpu_latency: processes {i + 1} of {PROCESSES}", measure)
    figures = {f"cpu_latency, {k}": compare_seconds([r[k] for r in rounds]) for k in kinds}
    return figures, ratio_goals(figures)


def search(comparison: Comparison) -> Outcome:
    """Seconds of a whole search of an untrained supernet, and the candidates it scores."""
    flags = [
        comparison.config,
        *overrides({f"search.{name}": value for name, value in SEARCH.items()}),
    ]

    def run(out: str, checkout: Checkout) -> float:
        workdir = checkout.work / "search"
        shutil.rmtree(workdir / out, ignore_errors=True)
        return checkout.launch(
            "search", *flags, f"--workdir={workdir}", f"--out={out}", "--random_weights"
        )

    comparison.each("search: compiling run", partial(run, "first"))
    rounds = [
        comparison.each(f"search: round {i + 1}", partial(run, "timed"), i)
        for i in range(comparison.rounds or 6)
    ]
    time_figures = {"search": compare_seconds(rounds)}
    before, after = (
        history(checkout.work / "search" / "first") for checkout in comparison.pair.values()
    )
    found = {"search history": compare(before, after)}
    # A change of order alone has the same lines.
    lines = [sorted(json.dumps(v, sort_keys=True) for v in h.values()) for h in (before, after)]
    found["search history"]["same_but_for_order"] = lines[0] == lines[1]
    return {**time_figures, **found}, {**ratio_goals(time_figures), **difference_goals(found)}


def quickstart(comparison: Comparison) -> Outcome:
    """Seconds of the pipeline in a new folder, and of its phases."""
    flags = comparison.quickstart_flags
    part = " ".join(["quickstart", *flags])

    def run(turn: int, checkout: Checkout) -> dict[str, float]:
        workdir = checkout.work / f"quickstart_{turn}"
        shutil.rmtree(workdir, ignore_errors=True)
        total = checkout.launch(
            "pipeline", f"--config={QUICKSTART}", f"--workdir={workdir}", *flags
        )
        timing = json.loads((workdir / "seconds.json").read_text(encoding="utf-8"))
        return {"total": total, **timing["seconds"]}

    rounds = [
        comparison.each(f"{part}: round {i + 1}", partial(run, i), i)
        for i in range(comparison.rounds or 2)
    ]
    # A phase may be shorter than the 0.1 s that its seconds are rounded to.
    figures = {
        name: compare_seconds(
            [{side: max(seconds[name], 0.1) for side, seconds in r.items()} for r in rounds]
        )
        for name in rounds[0]["before"]
    }
    return {"quickstart": figures}, ratio_goals({"quickstart": figures["total"]})
