"""What a recipe of training is worth: one small dense model on Multi30k, trained in several ways.

python benchmarks/distillation.py --json                    # hours; goes on where it was stopped
python benchmarks/distillation.py --json --only=plain,word --seeds=1

The student has width 128, 4 + 2 layers and FFNs of 512, and is trained from scratch for 1,500
updates on the text of configs/multi30k.py. Recipes:
  old       without scaled branches, at a peak rate of 2e-3, which they allow
  plain     with the scales of the config, at a peak rate of 4e-3
  word      half of the loss is the predictions of a teacher of width 128 and 192 (encoder and
            decoder), 6 + 3 layers and FFNs of 1,024, trained for 2,500 updates
  sequence  the teacher's translations of the training text stand beside it
  both      word and sequence
Each is tested with the weights of its last update, the average of its last checkpoints and their
moving average. A training runs on a core of its own. A finished one is a line of the results file,
and is not run again; unfinished ones go on from their checkpoints in --workdir. Differences from
the old recipe, with intervals, are lines of a second file.
"""

import argparse
import dataclasses
import sys
import threading
from pathlib import Path
from typing import Any

import measure
import numpy as np
import trainings
from trainings import ROOT

from automoe_jax.decoding import evaluation
from automoe_jax.phases.prepare import stored_split
from automoe_jax.system import files

CONFIG = "configs/multi30k.py"
RESULTS = ROOT / "benchmarks" / "results" / "distillation.jsonl"
DIFFERENCES = RESULTS.with_name("distillation_differences.jsonl")
UPDATES, TEACHER_UPDATES = 1500, 2500
GOAL = 1.5  # BLEU of the best recipe over the old one
RECIPES = ("old", "plain", "word", "sequence", "both")
WEIGHTS = ("last", "average", "ema")
COMMON = {
    "subnet_training.peak_rate": 4e-3,
    "subnet_training.warmup_steps": 400,
    "subnet_training.eval_every": 250,
    "subnet_training.checkpoint_every": 50,
    "subnet_training.keep_checkpoints": 8,
    "subnet_training.averaged_checkpoints": 8,
    "subnet_training.ema_decay": 0.998,
}
OLD = {"space.ffn_scale": 1.0, "space.attention_scale": 1.0, "subnet_training.peak_rate": 2e-3}


@dataclasses.dataclass(frozen=True)
class Student:
    """One training."""

    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.seed}"


class Trainings:
    """The teacher, its translations and the students, in a folder."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        student = trainings.dense((128, 128), (4, 2), 512)
        teacher = trainings.dense((128, 192), (6, 3), 1024)
        for name, subnet in (("student", student), ("teacher", teacher)):
            files.write_json(folder / f"{name}.json", subnet)

    def teacher(self, core: trainings.Core) -> Path:
        """The teacher's export, int8, made by whoever needs it first."""
        run = self._folder / "teacher"
        with self._lock:
            if not (run / "export" / "manifest.json").exists():
                settings = {**COMMON, "subnet_training.steps": TEACHER_UPDATES}
                self._train(core, run, "teacher", settings)
                self._export(core, run, "export", "average", COMMON, "int8")
        return run / "export"

    def distilled(self, core: trainings.Core) -> Path:
        """The corpus of the teacher's translations."""
        teacher, folder = self.teacher(core), self._folder / "distilled"
        with self._lock:
            if not (folder / "distilled.json").exists():
                program = [sys.executable, str(ROOT / "launch" / "distill.py"), "--config", CONFIG]
                run = ["--workdir", str(self._folder / "teacher")]
                trainings.run_on_core(
                    core, [*program, *run, f"--teacher={teacher}", f"--out={folder}"]
                )
        return folder

    def student(self, student: Student, core: trainings.Core) -> dict[str, Any]:
        """A student's losses and scores."""
        settings = {**COMMON, "seed": student.seed, "subnet_training.steps": UPDATES}
        more = []
        if student.recipe == "old":
            settings |= OLD
        if student.recipe in ("word", "both"):
            more.append(f"--teacher={self.teacher(core)}")
        if student.recipe in ("sequence", "both"):
            settings["data.path"] = str(self.distilled(core))
        run = self._folder / student.name
        self._train(core, run, "student", settings, *more)
        losses = trainings.values(run / "subnet", "valid/loss_subnet")
        seconds = trainings.values(run / "subnet", "train/step_s")
        tested = {}
        for weights in WEIGHTS:
            exported = self._export(core, run, f"export_{weights}", weights, settings)
            output = f"--output={run / f'test_{weights}.de'}"
            tested[weights] = trainings.test_bleu(run, core, exported, output)
        return {
            **dataclasses.asdict(student), "updates": UPDATES, "loss": losses[UPDATES],
            "losses": losses, "step_s": float(np.median(list(seconds.values()))), "bleu": tested,
            **measure.machine(),
        }  # fmt: skip

    def _train(
        self, core: trainings.Core, run: Path, subnet: str, settings: dict[str, Any], *more: str
    ):
        flags = [f"--subnet={self._folder / subnet}.json", *trainings.flags(settings), *more]
        trainings.run_on_core(core, trainings.command(CONFIG, run, *flags))

    def _export(
        self,
        core: trainings.Core,
        run: Path,
        out: str,
        weights: str,
        settings: dict[str, Any],
        kind="none",
    ) -> Path:
        """The export of a run with these final weights, of a kind of quantisation."""
        own = {"export.quantize": kind, "subnet_training.final_weights": weights}
        return trainings.export(CONFIG, run, core, out, *trainings.flags({**settings, **own}))


def finished() -> dict[Student, dict[str, Any]]:
    """The lines of all finished trainings."""
    lines = files.read_json_lines(RESULTS)
    return {Student(line["recipe"], line["seed"]): line for line in lines}


def compare(lines: dict[Student, dict[str, Any]], folder: Path) -> dict[str, dict[int, float]]:
    """BLEU by which each recipe's averaged weights are better than the old one's last, by seeds.

    Where the translations of both are in the folder and have not been compared yet, the difference
    is a line of DIFFERENCES, with its 95 % interval: a paired bootstrap over sentences.
    """
    found: dict[str, dict[int, float]] = {}
    known = {
        (x["recipe"], x["seed"], round(x["bleu"], 4)) for x in files.read_json_lines(DIFFERENCES)
    }
    for student, line in lines.items():
        old = Student("old", student.seed)
        if student.recipe == "old" or old not in lines:
            continue
        gain = line["bleu"]["average"] - lines[old]["bleu"]["last"]
        found.setdefault(student.recipe, {})[student.seed] = gain
        paths = [folder / student.name / "test_average.de", folder / old.name / "test_last.de"]
        compared = (student.recipe, student.seed, round(gain, 4)) in known
        if not compared and all(path.exists() for path in paths):
            ours, others = (files.lines(path.read_text(encoding="utf-8")) for path in paths)
            _, references = evaluation.read_split(stored_split(folder / old.name, "test"))
            difference = evaluation.paired_difference(ours, others, references)
            own = dataclasses.asdict(student) | dataclasses.asdict(difference)
            files.append_json_line(DIFFERENCES, own)
    return found


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "distillation")
    args = parser.parse_args()
    chosen = measure.names(args.only, RECIPES)
    RESULTS.parent.mkdir(exist_ok=True)
    wanted = [Student(recipe, seed) for seed in range(args.seeds) for recipe in chosen]
    folder = args.workdir.absolute()
    runs = Trainings(folder)

    def one(student: Student, core: trainings.Core) -> None:
        line = runs.student(student, core)
        files.append_json_line(RESULTS, line)
        scores = ", ".join(f"{kind} {bleu:.2f}" for kind, bleu in line["bleu"].items())
        print(f"{student.name}: {line['loss']:.3f} nats; BLEU {scores}", file=sys.stderr)

    known = finished()
    trainings.on_each_core(one, [s for s in wanted if s not in known])
    known = finished()
    rows = [known[s] for s in wanted]
    gains = compare(known, folder)
    means = {recipe: float(np.mean(list(by_seed.values()))) for recipe, by_seed in gains.items()}
    goals = {}
    if means:
        best = max(means, key=means.__getitem__)
        name = f"{best}, averaged, against old, BLEU"
        goals[name] = measure.goal(means[best], GOAL, at_most=False)
    result = {"benchmark": "distillation", "rows": rows, "against_old": gains}
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
