"""Error of latency predictions: for unseen subnets on this machine and for published tables.

python benchmarks/latency_model.py --json

Makes a latency model of the paper's full-size space (random weights), predicts random subnets that
it has not seen, and times them with 100 runs each. Fits the published tables of latencies with the
same model and with ordinary least squares. Takes half an hour on 2 cores.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import measure

from automoe_jax.config import base, resolve
from automoe_jax.latency.policy import MeasurementPolicy
from automoe_jax.latency.prober import Prober
from automoe_jax.latency.records import LATENCY, MEASUREMENTS, ReplayLog
from automoe_jax.phases.export import SupernetExporter
from automoe_jax.phases.latency_model import fit_latency_model
from automoe_jax.phases.run import LATENCY_MODEL, Run
from automoe_jax.phases.weights import random_weights
from automoe_jax.predictor import design, tables
from automoe_jax.predictor import fit as predictor
from automoe_jax.predictor import model as predictor_model
from automoe_jax.predictor.scores import agreement
from automoe_jax.report import plots

VOCAB = 32_768
# Not the seed that draws the model's own subnets.
SEED = 7
TABLES = ("wmt14ende_cpu_xeon_all.csv", "wmt14ende_gpu_titanxp_all.csv")
MINUTES, MAPE, TAU = 20, 5, 0.9


class Notes:
    """Progress on stderr."""

    def note(self, text: str):
        print(text, file=sys.stderr, flush=True)

    def task(self, name: str, total: int):
        return self

    def update(self, done: int, **fields: object):
        self.note(f"timed {done}")

    def close(self):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--subnets", type=int, default=40, help="unseen subnets to time")
    parser.add_argument("--runs", type=int, default=100, help="timed runs of each")
    parser.add_argument("--workdir", help="keeps measurements, and resumes from them")
    args = parser.parse_args()
    config = resolve(base())
    folder = Path(args.workdir or tempfile.mkdtemp(prefix="latency_model_"))
    vocab_sizes = (VOCAB, VOCAB)
    notes = Notes()

    start = time.monotonic()
    run = Run(config, folder, notes)
    inherited = SupernetExporter(run, random_weights(config, vocab_sizes), "random")
    path = folder / LATENCY_MODEL
    measurements = path.with_suffix(".measurements")
    begun = measurements.exists()
    if path.exists():
        model = predictor_model.load(path)
    else:
        model = fit_latency_model(run, inherited, vocab_sizes, path)
    minutes = (time.monotonic() - start) / 60

    seen = list(ReplayLog(measurements / MEASUREMENTS).stored(LATENCY))
    unseen = design.unseen(config.space, args.subnets, seen, SEED)
    # The model's reference latency cancels the drift since it was made.
    log = ReplayLog(folder / "unseen" / MEASUREMENTS)
    reference, smallest = model.reference, config.space.smallest()
    assert reference is not None
    log.get(LATENCY, smallest, lambda: {"value": reference["ms"], "how": "of the model"})
    policy = MeasurementPolicy(runs=args.runs)
    write, exports = inherited.export_for_timing, folder / "unseen" / ".timing"
    prober = Prober(config.latency, policy, write, smallest, exports)
    values = predictor.measure_all(unseen, smallest, prober, policy.group, log, notes)
    prober.close()
    predicted = [model.predict(s) for s in unseen]
    measured = [values[s].ms for s in unseen]
    found = agreement(predicted, measured)
    pairs = [(model.predict(s), m.ms, m.low, m.high) for s, m in values.items()]
    plots.predicted_plot(pairs, folder / "latency.png")
    goals = {
        "MAPE %": measure.goal(found.mape, MAPE),
        "Kendall's tau": measure.goal(found.tau or 0.0, TAU, at_most=False),
    }
    if not begun:  # a resumed run would time only a part of the work
        goals["minutes to make"] = measure.goal(minutes, MINUTES)
    result = {
        "benchmark": "latency_model",
        **measure.machine(),
        "made_for": model.made_for,
        "fitted": model.fitted,
        "held_out": dataclasses.asdict(model.error),
        "unseen": dataclasses.asdict(found),
        "runs": args.runs,
        "unseen_ms": measure.spread(measured),
        "coefficients": model.coefficients,
        "tables": {},
    }
    shared = Path(os.environ.get("AUTOMOE_SHARED", "../shared")) / "published" / "latency"
    for name in TABLES:
        if not (shared / name).exists():
            notes.note(f"{shared / name} is absent; left out")
            continue
        own, ordinary = tables.fit(shared / name)
        result["tables"][name] = {
            "ours": dataclasses.asdict(own.error),
            "least_squares": dataclasses.asdict(ordinary),
        }
        kind = name.split("_")[2]
        goals[f"{kind} RMSE ms"] = measure.goal(own.error.rmse, ordinary.rmse)
        goals[f"{kind} MAPE %"] = measure.goal(own.error.mape, ordinary.mape)
    if args.workdir is None:
        shutil.rmtree(folder)
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
