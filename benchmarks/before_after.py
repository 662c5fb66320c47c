"""Two commits of this repository compared: speed as ratios, results value by value.

python benchmarks/before_after.py --before=39192b6 --json
python benchmarks/before_after.py --before=v1 --after=main --only=search,training

Checks both commits out into a folder and runs them in turns (A B, B A, ...) with this interpreter
and its installed dependencies, whatever versions the commits ask for; PYTHONPATH alone decides
whose code is imported. Parts, with minutes on 2 cores:

- train_step (12): full-size updates, the largest subnet and the mean of five random ones, by each
  commit's benchmarks/train_step.py. Takes 16 GB of memory.
- cpu_latency (8): Transformer-Base in fp32 and int8, batch 1, beam 5, 30 tokens in and out, by each
  commit's benchmarks/translators.py.
- search (11): 200 candidates under a FLOPs limit with seed 0, as a whole process; their history.
- training (4): 40 updates of a small supernet; its metrics and the arrays of its checkpoint.
- translations (6): 200 sentences by exports of one checkpoint, texts and scores.
- quickstart (26): launch/pipeline.py in a new folder, two rounds, by each commit's own config.

Other programs take the earlier commit's configs/quickstart.py.

Speed goals bound the median over rounds of after / before; result goals count differences. Finished
parts are lines of WORKDIR/record.jsonl: the same command resumes, and a new --workdir measures
again. Progress goes to stderr, output of the commits' programs to WORKDIR/{before,after}/log.txt.
The last line is JSON; the exit code is 1 where a goal is missed.
"""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commits import ROOT, Comparison, Outcome, Record, check_out, full_hash, git, note
from compare_results import training, translations
from compare_speed import cpu_latency, quickstart, search, train_step
from measure import finish, machine

PARTS: dict[str, Callable[[Comparison], Outcome]] = {
    "search": search,
    "training": training,
    "translations": translations,
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
        "'--config.training.steps=40 --config.training.warmup_steps=10'",
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
