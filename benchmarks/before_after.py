"""Two commits of this repository compared: speed as ratios, results value by value.

python benchmarks/before_after.py --before=39192b6 --json
python benchmarks/before_after.py --before=v1 --after=main --only=search,training

Checks both commits out into a folder and runs them in turns (A B, B A, ...) with this interpreter
and its installed dependencies, whatever versions the commits ask for; PYTHONPATH alone decides
whose code is imported. Parts, with minutes on 2 cores:

- train_step (12): full-size updates, the largest subnet and the mean of five random ones, by each
  commit's benchmarks/train_step.py. Takes 16 GB of memory.
- cpu_latency (5): Transformer-Base in fp32 and int8, batch 1, beam 5, 30 tokens in and out, by each
  commit's benchmarks/translators.py.
- search (6): 200 candidates under a FLOPs limit with seed 0, as a whole process; their history.
- training (4): 40 updates of a small supernet; its metrics and the arrays of its checkpoint.
- translations (5): 200 sentences by exports of one checkpoint, texts and scores.
- quickstart (26): launch/pipeline.py in a new folder, two rounds.

Speed goals bound the median over rounds of after / before; result goals count differences. Finished
parts are lines of WORKDIR/record.jsonl: the same command resumes, and a new --workdir measures
again. Progress goes to stderr, output of the commits' programs to WORKDIR/{before,after}/log.txt.
The last line is JSON; the exit code is 1 where a goal is missed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from child import Child
from commits import (
    ROOT,
    Checkout,
    Record,
    check_out,
    compare_seconds,
    full_hash,
    git,
    in_turns,
    note,
)
from differences import checkpoint, compare, history, metrics, translations
from measure import finish, goal, machine
from translators import REST_S, protocol_source

MOST_RATIO = 1.03
# Pairs of processes that time latencies.
PROCESSES = 4
CONFIG = "--config=configs/quickstart.py"
SEARCH = {
    "algorithm": "evolution", "seed": 0, "iterations": 5, "population": 50, "parents": 15,
    "mutations": 15, "crossovers": 15, "constraint.latency_ratio": 0, "constraint.gflops": 0.045,
}  # fmt: skip
TRAINING = {
    "training.steps": 40, "training.warmup_steps": 10, "training.checkpoint_every": 40,
    "training.log_every": 1, "training.batches_per_step": 2, "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
}  # fmt: skip
# Long enough for translations that differ from sentence to sentence.
TRANSLATED_STEPS, SENTENCES = 600, 200
SUBNET = {
    "version": 1, "qkv_dim": 128,
    "encoder": {"embed_dim": 128, "layers": [
        {"heads": 4, "experts": [384, 256]}, {"heads": 2, "experts": [128]}]},
    "decoder": {"embed_dim": 96, "layers": [
        {"self_heads": 4, "cross_heads": 4, "cross_span": 2, "experts": [256, 384, 256]},
        {"self_heads": 2, "cross_heads": 4, "cross_span": 1, "experts": [384]}]},
}  # fmt: skip
RANDOM_EXPORT = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
from translators import random_export
random_export(Path("configs/subnets/transformer_base.json"), Path(sys.argv[1]), sys.argv[2])
"""
WRITE_SENTENCES = """
import sys
from automoe_jax.data.phrases import pairs
with open(sys.argv[1], "w", encoding="utf-8") as f:
    f.writelines(source + "\\n" for source, _ in pairs("test", int(sys.argv[2])))
"""
TRANSLATE = """
import json, sys
from automoe_jax import Translator
export, sentences, output = sys.argv[1:]
found = []
with open(sentences, encoding="utf-8") as f:
    lines = f.read().splitlines()
for kernels in ("auto", "xla"):
    translator = Translator.load(export, kernels=kernels)
    for translation in translator.translate(lines, beam_size=5, num_hypotheses=5):
        found.append([[h.text, float(h.score)] for h in translation.hypotheses])
with open(output, "w", encoding="utf-8") as f:
    json.dump(found, f)
"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two checkouts and how to compare them.

    Attributes:
      pair: the checkouts by name, "before" and "after".
      record: finished parts.
      workdir: folder of the comparison.
      rounds: of each timed part; 0 for the part's own number.
      quickstart_flags: added to those of launch/pipeline.py.
    """

    pair: dict[str, Checkout]
    record: Record
    workdir: Path
    rounds: int
    quickstart_flags: tuple[str, ...]

    def each(self, part: str, call: Callable[[Checkout], Any], turn: int = 0) -> dict[str, Any]:
        """What `call` returns for both checkouts, by name; once."""
        return self.record.once(part, lambda: in_turns(self.pair, call, turn))


# Figures, and goals by name.
Outcome = tuple[dict[str, Any], dict[str, dict[str, Any]]]


def ratio_goals(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The goals of `compare_seconds` results by name."""
    return {
        f"{name}, after / before": goal(figure["ratio"]["median"], MOST_RATIO)
        for name, figure in figures.items()
    }


def difference_goals(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The goals of `differences.compare` results by name."""
    return {f"{name}, different": goal(figure["different"], 0) for name, figure in figures.items()}


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
            rounds = []
            for turn in range(1 + (comparison.rounds or 5)):
                rounds.append(
                    {
                        subnet: in_turns(children, partial(Child.ask, subnet=subnet), turn)
                        for subnet in ("largest", *random)
                    }
                )
                note(f"train_step: round {turn}, largest {rounds[-1]['largest']}")
            return rounds[1:]  # the first warms up

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

    Weights lie elsewhere in the memory of each process, which alone moves latencies by percents.
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

            def seconds(name: str, quantize: str) -> float:
                time.sleep(REST_S)
                path = comparison.pair[name].work / f"transformer_base_{quantize}"
                request = {"call": "latency", "path": str(path), "compute": "", "source": source}
                return children[name].ask(**request) / 1000

            names = {name: name for name in children}
            rounds = [
                {
                    kind: in_turns(names, partial(seconds, quantize=quantize), turn)
                    for kind, quantize in kinds.items()
                }
                for turn in range(2 + (comparison.rounds or 9))
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
    flags = [CONFIG, *config_flags({f"search.{name}": value for name, value in SEARCH.items()})]

    def run(out: str, checkout: Checkout) -> float:
        workdir = checkout.work / "search"
        shutil.rmtree(workdir / out, ignore_errors=True)
        return checkout.launch(
            "search", *flags, f"--workdir={workdir}", f"--out={out}", "--random_weights"
        )

    comparison.each("search: compiling run", partial(run, "first"))
    rounds = [
        comparison.each(f"search: round {i + 1}", partial(run, "timed"), i)
        for i in range(comparison.rounds or 5)
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


def training(comparison: Comparison) -> Outcome:
    """Metrics and last checkpoint of a short training."""
    flags = [CONFIG, *config_flags(TRAINING)]

    def run(checkout: Checkout) -> float:
        shutil.rmtree(checkout.work / "training", ignore_errors=True)
        return checkout.launch("train", *flags, f"--workdir={checkout.work / 'training'}")

    seconds = comparison.each("training", run)
    folders = [c.work / "training" / "supernet" for c in comparison.pair.values()]
    figures = {
        "training metrics": compare(*map(metrics, folders)),
        "training checkpoint": compare(*map(checkpoint, folders)),
    }
    return {**figures, "training seconds, compiling included": seconds}, difference_goals(figures)


def translate(comparison: Comparison) -> Outcome:
    """Translations by exports that both commits make of one checkpoint, trained before."""
    work = comparison.workdir / "translations"
    sentences, subnet = work / "sentences.txt", work / "subnet.json"
    before, after = comparison.pair.values()

    def train() -> float:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        subnet.write_text(json.dumps(SUBNET), encoding="utf-8")
        before.python("-c", WRITE_SENTENCES, sentences, str(SENTENCES))
        flags = config_flags({"training.steps": TRANSLATED_STEPS})
        seconds = before.launch("train", CONFIG, *flags, f"--workdir={work / 'before'}")
        shutil.copytree(work / "before", work / "after")
        return seconds

    def export(quantize: str, checkout: Checkout) -> float:
        workdir, out = work / checkout.name, work / f"export_{checkout.name}_{quantize}"
        shutil.rmtree(out, ignore_errors=True)
        return checkout.launch(
            "export", CONFIG, f"--workdir={workdir}", f"--subnet={subnet}", f"--out={out}",
            f"--quantize={quantize}",
        )  # fmt: skip

    def translated(checkout: Checkout, made_by: Checkout, quantize: str) -> dict[str, Any]:
        export = work / f"export_{made_by.name}_{quantize}"
        output = work / f"{checkout.name}_by_{export.name}.json"
        part = f"translations: {output.stem}"
        comparison.record.once(
            part, lambda: checkout.python("-c", TRANSLATE, export, sentences, output)
        )
        return translations(output)

    comparison.record.once("translations: train", train)
    figures = {}
    for kind, quantize in (("fp32", "none"), ("int8", "int8")):
        comparison.each(f"translations: export {kind}", partial(export, quantize))
        expected = translated(before, before, quantize)
        shared = compare(expected, translated(after, before, quantize))
        own = compare(expected, translated(after, after, quantize))
        figures[f"translations of the export made before, {kind}"] = shared
        figures[f"translations of each commit's own export, {kind}"] = own
    return figures, difference_goals(figures)


def quickstart(comparison: Comparison) -> Outcome:
    """Seconds of the pipeline in a new folder, and of its phases."""
    flags = comparison.quickstart_flags
    part = " ".join(["quickstart", *flags])

    def run(turn: int, checkout: Checkout) -> dict[str, float]:
        workdir = checkout.work / f"quickstart_{turn}"
        shutil.rmtree(workdir, ignore_errors=True)
        total = checkout.launch("pipeline", CONFIG, f"--workdir={workdir}", *flags)
        timing = json.loads((workdir / "seconds.json").read_text(encoding="utf-8"))
        return {"total": total, **timing["seconds"]}

    rounds = [
        comparison.each(f"{part}: round {i + 1}", partial(run, i), i)
        for i in range(comparison.rounds or 2)
    ]
    figures = {
        name: compare_seconds(
            [{side: max(seconds[name], 0.1) for side, seconds in r.items()} for r in rounds]
        )
        for name in rounds[0]["before"]
    }
    return {"quickstart": figures}, ratio_goals({"quickstart": figures["total"]})


def config_flags(values: dict[str, Any]) -> list[str]:
    """Flags that set fields of a config."""
    return [f"--config.{name}={value}" for name, value in values.items()]


PARTS: dict[str, Callable[[Comparison], Outcome]] = {
    "search": search,
    "training": training,
    "translations": translate,
    "cpu_latency": cpu_latency,
    "train_step": train_step,
    "quickstart": quickstart,
}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", required=True, help="commit, branch or tag")
    parser.add_argument("--after", default="HEAD", help="the same; changes not committed are not")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--workdir", help="default: runs/before_after/BEFORE_AFTER")
    parser.add_argument("--rounds", type=int, default=0, help="of timed parts; 0: each its own")
    parser.add_argument(
        "--quickstart_flags", default="", help="more flags of launch/pipeline.py, as for a trial "
        "'--config.training.steps=40'",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the last line is JSON in any case")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := [name for name in only if name not in PARTS]:
        parser.error(f"--only has {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    if args.rounds < 0:
        parser.error(f"--rounds is {args.rounds}; it cannot be negative")

    commits = {"before": full_hash(args.before), "after": full_hash(args.after)}
    if args.after == "HEAD" and git("status", "--porcelain", "--untracked-files=no"):
        note("the working tree has changes that are not committed; HEAD is compared without them")
    default = ROOT / "runs" / "before_after" / "_".join(c[:10] for c in commits.values())
    workdir = Path(args.workdir or default).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    record = Record(workdir / "record.jsonl")
    if (known := record.once("commits", lambda: commits)) != commits:
        parser.error(f"--workdir {workdir} compares {known}; give another folder")
    note(f"in {workdir}")
    pair = {name: check_out(name, commit, workdir) for name, commit in commits.items()}
    comparison = Comparison(
        pair, record, workdir, args.rounds, tuple(shlex.split(args.quickstart_flags))
    )
    figures: dict[str, Any] = {}
    goals: dict[str, dict[str, Any]] = {}
    for name in only:
        found, wanted = PARTS[name](comparison)
        figures |= found
        goals |= wanted
        for label, value in wanted.items():
            note(f"{label}: {value['value']}, {'met' if value['met'] else 'missed'}")
    finish({"benchmark": "before_after", **commits, **machine(), **figures}, goals)


if __name__ == "__main__":
    main()
