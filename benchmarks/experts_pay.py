"""What experts are worth: validation losses of models trained from scratch on documentation text.

python benchmarks/experts_pay.py --json                # hours; goes on where it was stopped
python benchmarks/experts_pay.py --json --only=scale   # the runs of one question

Models of width 128 with 3 + 2 layers, each with the same number of equal experts, by
configs/msdocs.py. Top-1 routing: all have the same active FLOPs. Questions:
  scale    is the gain of a mixture the experts', or the scale of the FFN's output by p?
  gate     the same with gates that have the scale of a dense FFN
  updates  how the gain changes as training goes on, with the scales of the config
Each training runs on a core of its own. A finished one is a line of the results file, and is not
run again; unfinished ones go on from their checkpoints in --workdir.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import measure
import trainings
from trainings import ROOT

from automoe_jax.system import files

CONFIG = "configs/msdocs.py"
RESULTS = ROOT / "benchmarks" / "results" / "experts_pay.jsonl"
FFN = 512
RATE = 4e-3
GAIN = 0.16  # nats that are about 2 BLEU on this text


@dataclasses.dataclass(frozen=True)
class Training:
    """One training from scratch."""

    experts: int  # of each layer
    updates: int
    ffn_scale: float
    attention_scale: float
    seed: int = 0
    gate: str = "probability"

    @property
    def name(self) -> str:
        *numbers, gate = dataclasses.astuple(self)
        return "-".join([*(f"{value:g}" for value in numbers), *[gate] * (gate != "probability")])

    @property
    def dense(self) -> "Training":
        """The same with one FFN a layer, which has no gate."""
        return dataclasses.replace(self, experts=1, gate="probability")

    def command(self, workdir: Path, subnet: Path) -> list[str]:
        settings = {
            "seed": self.seed,
            "space.ffn_scale": self.ffn_scale,
            "space.attention_scale": self.attention_scale,
            "space.gate": self.gate,
            "subnet_training.steps": self.updates,
            "subnet_training.warmup_steps": min(self.updates // 4, 400),
            "subnet_training.peak_rate": RATE,
            "subnet_training.eval_every": self.updates // 4,
        }
        flags = trainings.flags(settings)
        return trainings.command(CONFIG, workdir, f"--subnet={subnet}", *flags)


QUESTIONS = {
    "scale": [
        Training(experts, 600, ffn, attention)
        for ffn, attention in ((1.0, 1.0), (0.25, 0.5), (0.25, 1.0), (1.0, 0.5))
        for experts in (1, 8)
    ],
    "gate": [
        Training(experts, 600, 0.25, 0.5, gate=gate)
        for gate, experts in (
            ("probability", 1),
            ("probability", 8),
            ("normalised", 8),
            ("count", 8),
        )
    ],
    "updates": [
        Training(experts, updates, 0.25, 0.5)
        for experts, updates in [
            *((e, u) for u in (600, 2400, 4800, 1200) for e in (1, 8)),
            *itertools.product((2, 4), (2400, 4800)),
        ]
    ],
}


def train(training: Training, workdir: Path, core: int) -> dict:
    """A training to its end on one core; its validation losses by update."""
    folder, subnet = workdir / training.name, workdir / f"{training.experts}.json"
    files.write_json(subnet, trainings.architecture([FFN] * training.experts))
    trainings.run_on_core(core, training.command(folder, subnet))
    losses = trainings.values(folder / "subnet", "valid/loss_subnet")
    return {**dataclasses.asdict(training), "losses": losses, **measure.machine()}


def run(wanted: list[Training], workdir: Path) -> None:
    """Trains what has no line in the results yet, one training per core."""

    def one(training: Training, core: int) -> None:
        line = train(training, workdir, core)
        files.append_json_line(RESULTS, line)
        print(f"{training.name}: {line['losses'][training.updates]:.3f}", file=sys.stderr)

    trainings.on_each_core(one, wanted)


def finished() -> dict[Training, float]:
    """The last losses of all finished trainings."""
    names = [field.name for field in dataclasses.fields(Training)]
    found = {}
    for line in files.read_json_lines(RESULTS) if RESULTS.exists() else []:
        training = Training(**{name: line[name] for name in names if name in line})
        found[training] = line["losses"][str(training.updates)]
    return found


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions, with commas")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "experts_pay")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(QUESTIONS):
        sys.exit(f"--only names {', '.join(sorted(unknown))}; allowed: {', '.join(QUESTIONS)}")
    RESULTS.parent.mkdir(exist_ok=True)
    wanted = list(dict.fromkeys(t for name in chosen for t in QUESTIONS[name]))
    known = finished()
    run([t for t in wanted if t not in known], args.workdir.absolute())
    known = finished()
    losses = {t.name: round(known[t], 4) for t in wanted}
    gains = {
        f"{t.experts} experts, {t.updates} updates, scales {t.ffn_scale:g} and "
        f"{t.attention_scale:g}, gate {t.gate}": round(known[t.dense] - known[t], 4)
        for t in wanted
        if t.experts > 1
    }
    longest = max((t for t in wanted if t.experts == 8), key=lambda t: t.updates)
    gain = known[longest.dense] - known[longest]
    result = {"benchmark": "experts_pay", "losses": losses, "gains_nats": gains}
    name = f"8 experts against 1, {longest.updates:,} updates, nats"
    measure.finish(result, {name: measure.goal(gain, GAIN, at_most=False)})


if __name__ == "__main__":
    main()
