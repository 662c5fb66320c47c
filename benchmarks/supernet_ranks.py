"""Whether supernets rank experts by what they are worth, on documentation text.

python benchmarks/supernet_ranks.py --json                  # hours; goes on where it was stopped
python benchmarks/supernet_ranks.py --json --options=plain,largest_half

Trains subnets that differ in nothing but numbers and sizes of experts, from scratch, one per core,
and compares their validation losses with those that each supernet of supernet_options.py, trained
for as many updates, gives them with inherited weights: Kendall's tau, and what more experts and
wider ones change in both. A subnet or a scored supernet is a line of the results file, and is not
measured again.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import measure
import numpy as np
import supernet_options
import trainings
from trainings import ROOT

from automoe_jax.architecture.subnet import Subnet, from_json, to_json
from automoe_jax.phases.rank import spread, trust
from automoe_jax.search.sensitivity import effects
from automoe_jax.system import files

RESULTS = ROOT / "benchmarks" / "results" / "supernet_ranks.jsonl"
OPTIONS = ("plain", "largest_half")
TAU = 0.6
SUPERNETS = ROOT / "runs" / "supernet_options"


def lines(**wanted: Any) -> list[dict[str, Any]]:
    """The lines of the results file that have these values."""
    found = files.read_json_lines(RESULTS)
    return [x for x in found if all(x.get(name) == value for name, value in wanted.items())]


def supernet(option: str, updates: int, supernets: Path) -> Path:
    """The workdir of the supernet that was trained with an option."""
    folder = supernets / f"{option}-{updates}-0"
    if not folder.is_dir():
        sys.exit(
            f"{folder} is missing; train it with: python benchmarks/supernet_options.py "
            f"--only={option} --updates={updates}"
        )
    return folder


def train(subnet: Subnet, updates: int, folder: Path, core: trainings.Core) -> float:
    """The last validation loss of a subnet trained from scratch on one core."""
    settings = {
        "subnet_training.steps": updates,
        "subnet_training.warmup_steps": min(updates // 4, 400),
        "subnet_training.eval_every": updates,
        **trainings.EXPERTS_SETTINGS,
    }
    described = folder.with_suffix(".json")
    files.write_json(described, to_json(subnet))
    flags = [f"--subnet={described}", *trainings.flags(settings)]
    trainings.run_on_core(core, trainings.command(supernet_options.CONFIG, folder, *flags))
    return trainings.values(folder / "subnet", "valid/loss_subnet")[updates]


def train_all(subnets: list[Subnet], updates: int, workdir: Path) -> None:
    """Trains what has no line in the results yet, one subnet per core."""
    done = [line["subnet"] for line in lines(updates=updates) if "trained" in line]

    def one(i: int, core: trainings.Core) -> None:
        loss = train(subnets[i], updates, workdir / f"{i + 1}-{updates}", core)
        about = {"updates": updates, "subnet": to_json(subnets[i]), "trained": loss}
        files.append_json_line(RESULTS, {**about, **measure.machine()})
        print(f"subnet {i + 1} of {len(subnets)}: {loss:.4f}", file=sys.stderr)

    trainings.on_each_core(one, [i for i, s in enumerate(subnets) if to_json(s) not in done])


def inherited(option: str, updates: int, subnets: list[Subnet], supernets: Path) -> list[float]:
    """Losses of subnets in the supernet that was trained with an option."""
    described = [to_json(subnet) for subnet in subnets]
    for line in lines(updates=updates, option=option):
        if line["subnets"] == described:
            return line["inherited"]
    losses = supernet_options.inherited(supernet(option, updates, supernets), subnets)
    line = {"updates": updates, "option": option, "subnets": described, "inherited": losses}
    files.append_json_line(RESULTS, line)
    return losses


def agreement(option: str, updates: int, supernets: Path) -> dict[str, Any]:
    """How a supernet's losses agree with those of all subnets that were trained."""
    trained = [line for line in lines(updates=updates) if "trained" in line]
    subnets = [from_json(line["subnet"]) for line in trained]
    losses = [line["trained"] for line in trained]
    own = inherited(option, updates, subnets, supernets)
    found = dataclasses.asdict(trust(np.array(own), np.array(losses)))
    changes = [dataclasses.asdict(effect) for effect in effects(subnets, own, losses)]
    return {"subnets": len(subnets), **found, "effects": changes}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--options", default=",".join(OPTIONS), help="supernets, with commas")
    parser.add_argument("--subnets", type=int, default=16, help="how many are trained")
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "supernet_ranks")
    parser.add_argument("--supernets", type=Path, default=SUPERNETS, help="of supernet_options.py")
    args = parser.parse_args()
    options = measure.names(args.options, supernet_options.OPTIONS, "--options")
    RESULTS.parent.mkdir(exist_ok=True)
    workdir = args.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    supernets = args.supernets.absolute()
    first = supernet(options[0], args.updates, supernets)
    subnets = spread(supernet_options.stored_config(first).space, args.subnets, seed=0)
    train_all(subnets, args.updates, workdir)
    rows = {option: agreement(option, args.updates, supernets) for option in options}
    best = max(row["tau"] for row in rows.values())
    goals = {"Kendall's tau of the best option": measure.goal(best, TAU, at_most=False)}
    measure.finish({"benchmark": "supernet_ranks", "updates": args.updates, **rows}, goals)


if __name__ == "__main__":
    main()
