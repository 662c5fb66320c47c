"""The paper's systems, trained alike on one corpus at a scaled-down size, side by side.

python benchmarks/paper_tables.py --corpus=multi30k --list
python benchmarks/paper_tables.py --corpus=msdocs --json         # many hours; goes on where it was
python benchmarks/paper_tables.py --corpus=msdocs --json --only=automoe,hat --seeds=1
python benchmarks/paper_tables.py --corpus=msdocs --json --budgets=0.5 --kinds=supernet,model

Systems stand in configs/systems.py (searched spaces) and configs/systems/ (architectures made by
hand). Each model is trained from scratch with the same text (of some corpora a teacher's
translations beside it), updates and recipe; scored on test text in fp32 and int8; timed in turns
with the largest dense Transformer, of whose latency the budgets are shares; and, where --only names
automoe, compared with its model directly: sentence by sentence, and timed in turns. The search of
automoe_calibrated is corrected by 16 trained subnets, as many updates as four models. Trainings run
one on each core; what is timed runs alone. Every finished part is a line of
benchmarks/results/paper_CORPUS.jsonl, and is not done again; with --kinds all that is timed
(largest, search, latency, difference) can wait for a machine that has nothing else to do.
Unfinished trainings and searches go on from what is in --workdir.
It ends with 1 where all that is done and timed misses what it is to show (`Corpus.goals`).
"""

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import trainings
from paper_study import Study
from paper_systems import CORPORA, KINDS, TOGETHER, Corpus, Part, batches, needs, parts, systems
from trainings import ROOT

from automoe_jax.phases.comparison import of_study
from automoe_jax.report import gains
from automoe_jax.report.systems import Row
from automoe_jax.system import files
from automoe_jax.system.ray_workers import RayWorkers

SPEED, FLOPS = 1.3, 1.5  # times HAT's at equal BLEU; one of the two is the goal


def key(line: dict[str, Any]) -> Part:
    """The part that a line is of."""
    return Part(line["kind"], line["name"], line["budget"], line["seed"])


def read(path: Path) -> dict[Part, dict[str, Any]]:
    """The lines of all finished parts."""
    return {key(line): line for line in files.read_json_lines(path)}


def run(study: Study, wanted: list[Part], results: Path, workers: RayWorkers | None):
    """Does the parts that have no line yet, in order; trainings on a Ray cluster, if any.

    What measures latencies runs here. Lines come as parts finish: a kill loses none of them.
    """

    lines, lock = read(results), threading.Lock()

    def one(part: Part, core: trainings.Core | None):
        begin = time.monotonic()
        with lock:
            known = dict(lines)
        found = study.do(part, core, known)
        seconds = {"seconds": round(time.monotonic() - begin, 1)}
        line = {**part._asdict(), **found, **seconds, **measure.machine()}
        with lock:
            files.append_json_line(results, line)
            lines[part] = line
        print(f"{part.title}: {time.monotonic() - begin:.0f} s", file=sys.stderr)

    for batch in batches([part for part in wanted if part not in lines]):
        if any(batch[0].kind in kinds for kinds in TOGETHER):
            trainings.on_each_core(one, batch, workers)
        else:
            for part in batch:
                one(part, None)


def require(corpus: Corpus, wanted: list[Part], lines: dict[Part, dict[str, Any]]):
    """Ends the program if a part needs one that is neither done nor wanted."""
    for part in wanted:
        for needed in needs(corpus, part):
            if part not in lines and needed not in lines and needed not in wanted:
                sys.exit(f"{part.title} needs {needed.title}: give {needed.kind} to --kinds, too")


def show(wanted: list[Part], lines: dict[Part, dict[str, Any]]):
    """All parts, what they took, and what is left."""
    took: dict[str, list[float]] = {}
    for part, line in lines.items():
        took.setdefault(part.kind, []).append(line["seconds"])
    missing = 0.0
    for part in wanted:
        usual = took.get(part.kind)
        if part in lines:
            state = f"done, {lines[part]['seconds'] / 60:.1f} min"
        else:
            missing += sum(usual) / len(usual) if usual else 0.0
            state = f"to do, about {sum(usual) / len(usual) / 60:.0f} min" if usual else "to do"
        print(f"{part.title:44} {state}")
    done = sum(part in lines for part in wanted)
    print(f"{done} of {len(wanted)} done; what is left and has been timed: {missing / 3600:.1f} h")


def goals_of(corpus: Corpus, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The goals of a corpus, by all its models that were timed: BLEU of mixtures found by search
    over others, as a mean of seeds; their speed over HAT's at equal BLEU; the best within a time.
    """
    found = {}
    for gain in gains.gains(rows):
        if gain.as_fast is None:
            continue
        name = f"{gain.what}, {gain.budget}"
        if gain.what == gains.AS_GOOD and corpus.goals:
            faster, fewer = (1 / float(np.mean(x)) for x in (gain.latencies, gain.flops))
            goal = measure.goal(max(faster / SPEED, fewer / FLOPS), 1.0, at_most=False)
            found[f"{name}: speed or FLOPs, share of the goal"] = {
                **goal, "met": goal["met"] and gain.as_good,  # not bought with BLEU
            }  # fmt: skip
        elif gain.what in corpus.goals:
            mean = float(np.mean(gain.bleus))
            goal = measure.goal(mean, corpus.goals[gain.what], at_most=False)
            found[name] = {**goal, "met": goal["met"] and gain.as_fast}  # nor with latency
    scores = [own for row in rows for own in row.precisions.values() if own.ms is not None]
    if corpus.best and scores:
        bleu, ms = corpus.best
        fast = [x.bleu[0] for x in scores if x.ms is not None and x.ms <= ms]
        name = f"the best BLEU within {ms:g} ms"
        found[name] = measure.goal(max(fast, default=0.0), bleu, at_most=False)
    return found


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--corpus", required=True, choices=CORPORA)
    parser.add_argument("--list", action="store_true", help="list the parts and what is done")
    parser.add_argument("--only", help="systems, with commas; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="of systems that a claim rests on")
    parser.add_argument("--budgets", help="some of the corpus's shares of latency, with commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of parts, with commas")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "paper")
    parser.add_argument("--results", type=Path, help="file (default: benchmarks/results/)")
    parser.add_argument("--ray", default="", help="cluster to train on: auto, or HOST:PORT")
    parser.add_argument(
        "--ray_cores", type=int, default=RayWorkers.cores, help="cores of a training there"
    )
    parser.add_argument(
        "--ray_memory_gb", type=float, default=RayWorkers.memory_gb, help="its memory, GiB"
    )
    args = parser.parse_args()
    corpus = CORPORA[args.corpus]
    known, own = systems(corpus), [f"{budget:g}" for budget in corpus.budgets]
    names = measure.names(args.only or ",".join(known), known)
    budgets = [float(x) for x in measure.names(args.budgets or ",".join(own), own, "--budgets")]
    kinds = measure.names(args.kinds, KINDS, "--kinds")
    results = args.results or ROOT / "benchmarks" / "results" / f"paper_{args.corpus}.jsonl"
    wanted = [p for p in parts(corpus, names, args.seeds, budgets) if p.kind in kinds]
    if args.list:
        show(wanted, read(results))
        return
    require(corpus, wanted, read(results))
    results.parent.mkdir(exist_ok=True)
    workers = RayWorkers(args.ray, args.ray_cores, args.ray_memory_gb) if args.ray else None
    run(Study(corpus, args.workdir.absolute() / args.corpus), wanted, results, workers)
    lines = read(results)
    rows = [lines[part] for part in wanted]
    result = {"benchmark": "paper_tables", "corpus": args.corpus, "rows": rows}
    trained = any(part.kind == "model" for part in lines)
    measure.finish(result, goals_of(corpus, of_study(results)[0]) if trained else {})


if __name__ == "__main__":
    main()
