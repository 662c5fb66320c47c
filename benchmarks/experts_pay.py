"""What experts are worth: validation losses of models trained from scratch on documentation text.

python benchmarks/experts_pay.py --json                # hours; goes on where it was stopped
python benchmarks/experts_pay.py --json --only=scale   # the runs of one question

Models of width 128 with 3 + 2 layers, each with the same number of equal experts, by
configs/msdocs.py. Top-1 routing: all have the same active FLOPs. Questions:
  scale    is the gain of a mixture the experts', or the scale of the FFN's output by p?
  form     gates that have the scale of a dense FFN; experts as a common one plus differences
  updates  how the gain changes as training goes on, with the scales of the config
  ceiling  one FFN as large as all experts together, so with several times the active FLOPs: what
           could experts gain at most?
Each training runs on a core of its own. A finished one is a line of the results file, and is not
run again; unfinished ones go on from their checkpoints in --workdir.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import measure
import trainings
from trainings import ROOT

from automoe_jax.system import files

CONFIG = "configs/msdocs.py"
RESULTS = ROOT / "benchmarks" / "results" / "experts_pay.jsonl"
FFN = 512
RATE = 4e-3
TRANSLATED = 2400  # updates from which test text is translated too
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
    sharing: str = "front"
    ffn: int = FFN  # of each expert

    @property
    def name(self) -> str:
        *numbers, gate, sharing, ffn = dataclasses.astuple(self)
        words = [*[gate] * (gate != "probability"), *[sharing] * (sharing != "front")]
        words += [f"ffn{ffn}"] * (ffn != FFN)
        return "-".join([*(f"{value:g}" for value in numbers), *words])

    @property
    def dense(self) -> "Training":
        """The same with one FFN a layer, which has no gate."""
        return dataclasses.replace(self, experts=1, gate="probability", sharing="front", ffn=FFN)

    def command(self, workdir: Path, subnet: Path) -> list[str]:
        group = "subnet_training" if self.sharing == "front" else "training"
        settings = {
            "seed": self.seed,
            f"{group}.steps": self.updates,
            f"{group}.warmup_steps": min(self.updates // 4, 400),
            f"{group}.peak_rate": RATE,
            f"{group}.eval_every": self.updates // 4,
        }
        if self.sharing == "front":
            flags = [f"--subnet={subnet}", *trainings.flags(settings)]
            return trainings.command(CONFIG, workdir, *flags, *self.space_flags())
        settings["training.eval_subnets"] = 0
        return trainings.command(CONFIG, workdir, *trainings.flags(settings), *self.space_flags())

    def space_flags(self) -> list[str]:
        """The flags of what a model's weights mean."""
        settings: dict[str, Any] = {
            **trainings.EXPERTS_SETTINGS,
            "space.ffn_scale": self.ffn_scale,
            "space.attention_scale": self.attention_scale,
            "space.gate": self.gate,
        }
        one = self.sharing != "front"  # a supernet of one architecture
        for side in ("encoder", "decoder"):
            if one or self.ffn != FFN:
                settings[f"space.{side}_ffn_dims"] = self.ffn
            if one:
                settings |= {f"space.{side}_experts": self.experts, "space.sharing": self.sharing}
        return trainings.flags(settings)


QUESTIONS = {
    "scale": [
        Training(experts, 600, ffn, attention)
        for ffn, attention in ((1.0, 1.0), (0.25, 0.5), (0.25, 1.0), (1.0, 0.5))
        for experts in (1, 8)
    ],
    "form": [
        Training(1, 1200, 0.25, 0.5),
        Training(8, 1200, 0.25, 0.5),
        Training(8, 1200, 0.25, 0.5, sharing="common"),
        Training(8, 1200, 0.25, 0.5, sharing="common", gate="normalised"),
        Training(8, 1200, 0.25, 0.5, gate="normalised"),
        Training(8, 1200, 0.25, 0.5, gate="count"),
        Training(8, 1200, 0.25, 0.5, sharing="common", gate="count"),
    ],
    "ceiling": [Training(1, 1200, 0.25, 0.5, ffn=ffn) for ffn in (FFN, 2 * FFN, 8 * FFN)],
    "updates": [
        Training(experts, updates, 0.25, 0.5)
        for experts, updates in [
            *((e, u) for u in (600, 2400, 4800, 1200) for e in (1, 8)),
            *itertools.product((2, 4), (1200, 2400, 4800)),
        ]
    ],
}


def train(training: Training, workdir: Path, core: trainings.Core) -> dict:
    """A training to its end on one core; its validation losses by update."""
    folder, subnet = workdir / training.name, workdir / f"{training.name}.json"
    files.write_json(subnet, trainings.architecture([training.ffn] * training.experts))
    trainings.run_on_core(core, training.command(folder, subnet))
    supernet = training.sharing != "front"
    trained, name = (folder / "supernet", "largest") if supernet else (folder / "subnet", "subnet")
    losses = trainings.values(trained, f"valid/loss_{name}")
    line = {**dataclasses.asdict(training), "losses": losses, **measure.machine()}
    if training.updates >= TRANSLATED and not supernet:
        exported = trainings.export(CONFIG, folder, core, "export", *training.space_flags())
        line["bleu"] = trainings.test_bleu(folder, core, exported)
    return line


def run(wanted: list[Training], workdir: Path) -> None:
    """Trains what has no line in the results yet, one training per core."""

    def one(training: Training, core: trainings.Core) -> None:
        line = train(training, workdir, core)
        files.append_json_line(RESULTS, line)
        print(f"{training.name}: {line['losses'][training.updates]:.3f}", file=sys.stderr)

    trainings.on_each_core(one, wanted)


def lines() -> list[dict]:
    """The lines of all finished trainings."""
    return files.read_json_lines(RESULTS)


def training_of(line: dict) -> Training:
    """What was trained; lines of before a setting lack it."""
    names = [field.name for field in dataclasses.fields(Training)]
    return Training(**{name: line[name] for name in names if name in line})


def finished() -> dict[Training, float]:
    """The last losses of all finished trainings."""
    return {training_of(line): line["losses"][str(line["updates"])] for line in lines()}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions, with commas")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "experts_pay")
    args = parser.parse_args()
    chosen = measure.names(args.only, QUESTIONS)
    RESULTS.parent.mkdir(exist_ok=True)
    wanted = list(dict.fromkeys(t for name in chosen for t in QUESTIONS[name]))
    known = finished()
    run([t for t in wanted if t not in known], args.workdir.absolute())
    known = finished()
    losses = {t.name: round(known[t], 4) for t in wanted}
    bleu = {training_of(line).name: line["bleu"] for line in lines() if "bleu" in line}
    gains = {
        f"{t.experts} of {t.ffn}, {t.updates} updates, scales {t.ffn_scale:g} and "
        f"{t.attention_scale:g}, gate {t.gate}, sharing {t.sharing}": round(
            known[t.dense] - known[t], 4
        )
        for t in wanted
        if t != t.dense
    }
    result = {"benchmark": "experts_pay", "losses": losses, "bleu": bleu, "gains_nats": gains}
    goals = {}
    if mixtures := [t for t in wanted if t.experts == 8]:
        longest = max(mixtures, key=lambda t: t.updates)
        gain = known[longest.dense] - known[longest]
        name = f"8 experts against 1, {longest.updates:,} updates, nats"
        goals[name] = measure.goal(gain, GAIN, at_most=False)
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
