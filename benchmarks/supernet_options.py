"""What options of a supernet's training are worth, on documentation text.

python benchmarks/supernet_options.py --json                   # hours; goes on where it was stopped
python benchmarks/supernet_options.py --json --only=plain,gate --updates=600

Trains a supernet by configs/msdocs.py (of width 128, 3 + 2 layers; 1, 2, 4 or 8 experts of 256 or
512) with each option, one training per core, and scores with inherited weights: standard subnets of
1, 2, 4 and 8 experts of 512 in every layer, and 30 fixed random ones. `gain` is the loss of one
expert less that of eight. "from_trained" starts from one FFN of 512 that was trained alone for as
many updates, so it has twice the updates of the others. It ends with 1 where no option makes random
subnets 3 % better than plain sampling, or eight experts 0.125 nats better than one. A finished
training is a line of the results file, and is not run again; unfinished ones go on from their
checkpoints in --workdir.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np
import trainings
from trainings import ROOT

from automoe_jax import config as settings
from automoe_jax.architecture.subnet import Subnet, from_json
from automoe_jax.cli.terminal import TerminalProgress
from automoe_jax.data.tokens import PreparedData
from automoe_jax.phases import first_weights
from automoe_jax.phases.prepare import prepare
from automoe_jax.phases.run import SUPERNET, Run, open_run
from automoe_jax.phases.weights import supernet_params, target
from automoe_jax.system import files, workdir
from automoe_jax.training import sampling
from automoe_jax.training.config import INHERITED_EXPERTS
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.population import PopulationScorer

CONFIG = "configs/msdocs.py"
RESULTS = ROOT / "benchmarks" / "results" / "supernet_options.jsonl"
COUNTS, FFN, RANDOM = (1, 2, 4, 8), 512, 30

# Four subnets of a quarter of the tokens: an update takes as long as others'.
SANDWICH = {"sampling.rule": "sandwich", "training.tokens_per_batch": 768}
# Settings of each option beside those of the config.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Not for use: which dimension makes a supernet learn slower than a model of its own.
    "sizes_alone": {"space.encoder_experts": 1, "space.decoder_experts": 1},
    "numbers_alone": {"space.encoder_ffn_dims": FFN, "space.decoder_ffn_dims": FFN},
    "nothing_elastic": {
        "space.encoder_experts": 1,
        "space.decoder_experts": 1,
        "space.encoder_ffn_dims": FFN,
        "space.decoder_ffn_dims": FFN,
    },
    "own": {"space.sharing": "own"},
    "means": {"space.sharing": "means"},
    "common": {"space.sharing": "common"},
    "gate_normalised": {"space.gate": "normalised"},
    "gate_count": {"space.gate": "count"},
    "experts_bias": {"sampling.experts_bias": 1.0},
    "alike_half": {"sampling.alike_share": 0.5},
    "flops_draws": {"sampling.flops_draws": 16},
    "largest_half": {"sampling.largest_share": 0.5},
    "sandwich": SANDWICH,
    "sandwich_distillation": {**SANDWICH, "sampling.distillation": 0.5},
    "largest_first": {},
    "largest_first_half": {},
    "random_experts": {"sampling.random_experts": True},
    "sandwich_conflicts": {**SANDWICH, "sampling.project_conflicts": True},
    "from_trained": {},
    "balance_z": {"training.load_balance": 0.03, "training.router_z": 0.001},
    # Of each decoder layer, whose routers decide, and of no encoder layer.
    "balance_layers": {
        "training.encoder_load_balance": (0.0, 0.0, 0.0),
        "training.decoder_load_balance": (0.03, 0.03),
    },
    "jitter": {"model.router_jitter": 0.01},  # as Switch Transformers have it
}
# These score subnets of another space, or have twice the updates.
ELSEWHERE = ("sizes_alone", "numbers_alone", "nothing_elastic", "from_trained")
SHARE = 0.97  # of plain sampling's loss of random subnets, at most
GAIN = 0.125  # nats of eight experts: half of 0.25, their gain from scratch without scaled branches
# The share of the updates that train the largest subnet alone, at the start.
ALONE = {"largest_first": 0.25, "largest_first_half": 0.5}


def stored_config(folder: Path) -> settings.RunConfig:
    """The config of the supernet in a workdir."""
    return settings.from_stored(workdir.settings(folder / SUPERNET, SUPERNET))


def _opened(folder: Path) -> tuple[Run, PreparedData]:
    """The run of a trained supernet, by its own settings, and its text."""
    run = open_run(stored_config(folder), folder, TerminalProgress())
    return run, prepare(run)


def inherited(folder: Path, subnets: Sequence[Subnet]) -> list[float]:
    """Losses of subnets of the supernet in a workdir, on all validation text."""
    run, data = _opened(folder)
    params, _ = supernet_params(run, data.tokenizer.vocab_sizes)
    scorer = PopulationScorer(
        target(run.config, data.tokenizer.vocab_sizes), run.config.training, params
    )
    return scorer.losses(scorer.prepare(data.valid), subnets)


def score(folder: Path) -> dict[str, Any]:
    """Losses of the standard and the random subnets of the supernet in a workdir."""
    space = stored_config(folder).space
    counts = [n for n in COUNTS if n in space.encoder_experts]
    standard = [from_json(trainings.architecture([FFN] * n)) for n in counts]
    losses = inherited(folder, [*standard, *sampling.fixed_set(space, 0, RANDOM)])
    random = float(np.mean(losses[len(counts) :]))
    by_count = dict(zip(map(str, counts), losses[: len(counts)], strict=True))
    gain = {"gain": by_count["1"] - by_count["8"]} if "8" in by_count else {}
    return {"losses": by_count, **gain, "random": random}


def kept(folder: Path) -> dict[str, Any]:
    """Losses of standard subnets by which of the supernet's experts they keep."""
    run, data = _opened(folder)
    losses: dict[str, dict[str, float]] = {}
    for n in COUNTS:
        subnet = from_json(trainings.architecture([FFN] * n))
        own = target(run.config, data.tokenizer.vocab_sizes, subnet)
        scorer = Evaluator(own, data.valid, run.config.training, 0)
        for kind in INHERITED_EXPERTS:
            training = dataclasses.replace(run.config.subnet_training, inherited_experts=kind)
            config = dataclasses.replace(run.config, subnet_training=training)
            source = dataclasses.replace(run, config=config)
            params = first_weights.of_subnet(source, own, folder / "subnet", data)
            replicated = jax.tree.map(lambda x: x[None], params)
            losses.setdefault(kind, {})[str(n)] = scorer.loss(replicated, subnet)
    return losses


def train(
    option: str, updates: int, seed: int, folder: Path, core: trainings.Core
) -> dict[str, Any]:
    """One supernet to its end on one core, and what its subnets reach."""
    own = {
        "seed": seed,
        "training.steps": updates,
        "training.warmup_steps": min(updates // 4, 400),
        "training.eval_every": updates // 2,
        "training.eval_subnets": 0,
        "sampling.largest_first": round(ALONE.get(option, 0) * updates),
        **trainings.EXPERTS_SETTINGS,
        **OPTIONS[option],
    }
    flags = trainings.flags(own)
    if option == "from_trained":
        dense = folder.parent / f"dense-{updates}-{seed}"
        train_dense(updates, seed, dense, core)
        flags.append(f"--init_from={dense}")
    trainings.run_on_core(core, trainings.command(CONFIG, folder, *flags))
    printed = trainings.run_on_core(core, [sys.executable, __file__, f"--score={folder}"])
    seconds = trainings.values(folder / SUPERNET, "train/step_s")
    about = {"option": option, "updates": updates, "seed": seed}
    found = json.loads(printed.splitlines()[-1])
    step = {"step_s": float(np.median(list(seconds.values())))} if seconds else {}
    return {**about, **found, **step, **measure.machine()}


def train_dense(updates: int, seed: int, folder: Path, core: trainings.Core) -> None:
    """One FFN of 512 in each layer on its own, on one core."""
    own = {
        "seed": seed,
        "subnet_training.steps": updates,
        "subnet_training.warmup_steps": min(updates // 4, 400),
        "subnet_training.eval_every": updates // 2,
        **trainings.EXPERTS_SETTINGS,
    }
    subnet = folder.with_suffix(".json")
    files.write_json(subnet, trainings.architecture([FFN]))
    flags = [f"--subnet={subnet}", *trainings.flags(own)]
    trainings.run_on_core(core, trainings.command(CONFIG, folder, *flags))


def key(line: dict[str, Any]) -> tuple[str, int, int]:
    """What a training is known by."""
    return line["option"], line["updates"], line["seed"]


def finished() -> dict[tuple[str, int, int], dict[str, Any]]:
    """The lines of all finished trainings."""
    lines = files.read_json_lines(RESULTS)
    return {key(line): line for line in lines}


def goals_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Goals of what options of one space reach with as many updates, means over seeds."""
    means = {
        option: tuple(np.mean([[x["random"], x["gain"]] for x in own], axis=0))
        for option in OPTIONS
        if option not in ELSEWHERE and (own := [x for x in rows if x["option"] == option])
    }
    goals = {}
    if len(means) > 1 and "plain" in means:
        least = min(random for random, _ in means.values()) / means["plain"][0]
        goals["random subnets: least loss, share of plain's"] = measure.goal(float(least), SHARE)
    if means:
        most = max(gain for _, gain in means.values())
        goals["eight experts: most gain, nats"] = measure.goal(float(most), GAIN, at_most=False)
    return goals


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--only", default=",".join(OPTIONS), help="options, with commas")
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "supernet_options")
    parser.add_argument("--score", type=Path, help="score the supernet in a workdir, no more")
    parser.add_argument(
        "--kept", type=Path, help="score what subnets keep of a workdir's supernet, no more"
    )
    args = parser.parse_args()
    if args.kept:
        print(json.dumps(kept(args.kept)))
        return
    if args.score:
        print(json.dumps(score(args.score)))
        return
    chosen = measure.names(args.only, OPTIONS)
    RESULTS.parent.mkdir(exist_ok=True)
    wanted = [(option, args.updates, seed) for seed in range(args.seeds) for option in chosen]

    def one(training: tuple[str, int, int], core: trainings.Core) -> None:
        name = "-".join(map(str, training))
        line = train(*training, args.workdir.absolute() / name, core)
        files.append_json_line(RESULTS, line)
        losses = ", ".join(f"{n}: {loss:.3f}" for n, loss in line["losses"].items())
        print(f"{name}: {losses}; random {line['random']:.3f}", file=sys.stderr)

    known = finished()
    trainings.on_each_core(one, [t for t in wanted if t not in known])
    known = finished()
    rows = [known[t] for t in wanted]
    measure.finish({"benchmark": "supernet_options", "rows": rows}, goals_of(rows))


if __name__ == "__main__":
    main()
