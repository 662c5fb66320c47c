"""Speed of the input pipeline on one core, and how long a training waits for it.

python benchmarks/input_pipeline.py --json

Batches of Multi30k's training text as configs/multi30k.py takes them, assembled from tokens by one
core and thrown away; then that training itself for some steps.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import numpy as np

from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.config import resolve
from automoe_jax.data import batches as batching
from automoe_jax.data.batches import Share
from automoe_jax.data.plan import Plan, choose_buckets
from automoe_jax.data.tokens import load

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/multi30k.py"
TOKENS_PER_S, WAIT = 300_000, 0.03


def train(workdir: Path, steps: int) -> dict[str, float]:
    """The last value of each metric of a training of `steps` steps."""
    command = [
        sys.executable, str(ROOT / "launch" / "train.py"), "--config", CONFIG, "--workdir",
        str(workdir), f"--config.training.steps={steps}", "--config.training.eval_every=0",
        "--config.training.warmup_steps=10", "--config.training.eval_pairs=50",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    text = (workdir / "supernet" / "metrics.jsonl").read_text()
    return {x["name"]: x["value"] for x in map(json.loads, text.splitlines())}


def tokens_per_second(folder: Path, epochs: int) -> list[float]:
    """Target tokens a second of each epoch, on one core."""
    tokens = load(folder)
    source, target = tokens.source.lengths, tokens.target.lengths
    training = resolve(runpy.run_path(str(ROOT / CONFIG))["get_config"]()).training
    buckets = choose_buckets(source, target, training.buckets, training.tokens_per_batch)
    plan = Plan(source, target, buckets, training.batches_per_step, seed=1)
    share, n = Share(0, 1, 1), plan.steps_per_epoch
    rates = []
    for epoch in range(epochs):
        start = time.perf_counter()
        found = 0
        for batch in batching.batches(tokens, plan, share, epoch * n, (epoch + 1) * n):
            found += int(np.count_nonzero(batch["target"] != PAD_ID))
        rates.append(found / (time.perf_counter() - start))
    return rates


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="timed, of 29,000 pairs")
    parser.add_argument("--steps", type=int, default=250, help="of the training")
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        last = train(Path(temporary), args.steps)
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        rates = tokens_per_second(Path(temporary) / "tokens" / "train", args.epochs)
        os.sched_setaffinity(0, cores)
    # Compiling and evaluating, a training waits for no data.
    wait = last["run/share_data"] / (last["run/share_data"] + last["run/goodput"])
    result = {
        "benchmark": "input_pipeline",
        **measure.machine(),
        "target_tokens_per_s": measure.spread(rates),
        "training": {name: value for name, value in last.items() if name.startswith("run/")},
    }
    goals = {
        "target tokens/s, one core": measure.goal(
            result["target_tokens_per_s"]["median"], TOKENS_PER_S, at_most=False
        ),
        "waiting for data, of steps and waiting": measure.goal(wait, WAIT),
    }
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
