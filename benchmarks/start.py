"""How soon a training starts, and how long small trainings take with all compilations.

python benchmarks/start.py --json                         # all parts, 15 minutes on 2 cores
python benchmarks/start.py --json --only=supernet,warm    # some

Each part is a process of `launch/train.py` with its own workdir and an empty cache:
supernet: the first and the fiftieth step of configs/multi30k.py. warm: the first step with the
cache that `supernet` left. experts, dense: a subnet of 3 + 2 layers of width 128, with experts of
768, 512 and 256 in each layer, or one FFN of 512, for its 1,500 steps. quickstart: the supernet of
configs/quickstart.py, its 1,200 steps. Prints a line for each part that is done on stderr.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import trainings
from trainings import ROOT

MULTI30K, QUICKSTART = "configs/multi30k.py", "configs/quickstart.py"
EXPERTS = {"experts": [768, 512, 256], "dense": [512]}
STEPS = 50
# Seconds, on 2 cores.
GOALS = {
    "supernet: first step": 20, "supernet: fiftieth step": 90, "warm: first step": 5,
    "experts: 1,500 steps": 400, "dense: 1,500 steps": 260, "quickstart: 1,200 steps": 60,
}  # fmt: skip


def seconds_to_steps(config: str, workdir: Path, steps: tuple[int, ...]) -> list[float]:
    """Seconds from the start of the process to the end of each of these steps of a supernet."""
    log = workdir / "supernet" / "metrics.jsonl"
    start = time.monotonic()
    process = subprocess.Popen(
        trainings.command(config, workdir, "--config.training.log_every=1"),
        cwd=ROOT,
        stdout=sys.stderr,
    )
    found: list[float] = []
    while len(found) < len(steps):
        if process.poll() is not None:
            sys.exit(f"the training ended with {process.returncode} before step {steps[-1]}")
        text = log.read_text() if log.exists() else ""
        if f'"step": {steps[len(found)]},' in text:
            found.append(time.monotonic() - start)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait()
    return found


def seconds_of(config: str, workdir: Path, *more: str) -> float:
    """Seconds of a whole training."""
    start = time.monotonic()
    done = subprocess.run(
        trainings.command(config, workdir, *more), cwd=ROOT, stdout=sys.stderr, check=False
    )
    if done.returncode:
        sys.exit(f"the training ended with {done.returncode}")
    return time.monotonic() - start


def last(folder: Path, name: str) -> float:
    """The last value of a metric of a training."""
    return list(trainings.values(folder, name).values())[-1]


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parts = ("supernet", "warm", "experts", "dense", "quickstart")
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas")
    args = parser.parse_args()
    chosen = measure.names(args.only, parts)
    seconds: dict[str, float] = {}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if {"supernet", "warm"} & set(chosen):
            first, fiftieth = seconds_to_steps(MULTI30K, folder / "supernet", (1, STEPS))
            seconds |= {"supernet: first step": first, "supernet: fiftieth step": fiftieth}
        if "warm" in chosen:
            shutil.rmtree(folder / "supernet" / "supernet")
            (again,) = seconds_to_steps(MULTI30K, folder / "supernet", (1,))
            seconds["warm: first step"] = again
        for name in set(chosen) & set(EXPERTS):
            subnet = folder / f"{name}.json"
            subnet.write_text(json.dumps(trainings.architecture(EXPERTS[name])))
            took = seconds_of(MULTI30K, folder / name, f"--subnet={subnet}")
            seconds[f"{name}: 1,500 steps"] = took
            losses[name] = last(folder / name / "subnet", "valid/loss_subnet")
        if "quickstart" in chosen:
            took = seconds_of(QUICKSTART, folder / "quickstart")
            seconds["quickstart: 1,200 steps"] = took
            losses["quickstart"] = last(folder / "quickstart" / "supernet", "valid/loss_largest")
    rounded = {name: round(took, 1) for name, took in seconds.items()}
    result = {"benchmark": "start", **measure.machine(), "seconds": rounded, "losses": losses}
    goals = {name: measure.goal(took, GOALS[name]) for name, took in seconds.items()}
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
