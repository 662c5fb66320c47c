"""Kills a training at random moments, resumes it, and compares it with one that was left alone.

python benchmarks/resume.py --kills=20 --json

Both train the same small supernet with the same command. SIGKILL comes at moments drawn from the
whole life of the process: while it starts, compiles, steps, saves and evaluates. Equal means: every
line of `metrics.jsonl` but times and memory, and every byte of the weights and the optimizer.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import differences
import measure
import trainings
from trainings import ROOT

SETTINGS = {
    "data.train_pairs": 2000, "data.valid_pairs": 60, "data.test_pairs": 20,
    "tokenizer.vocab_size": 600, "tokenizer.max_sentences": 2000,
    "space.encoder_embed_dims": "(16,32)", "space.decoder_embed_dims": "(16,32)",
    "space.qkv_dim": 32, "space.encoder_ffn_dims": "(32,64)", "space.decoder_ffn_dims": "(32,64)",
    "model.dropout": 0.1, "training.warmup_steps": 5, "training.log_every": 7,
    "training.eval_every": 10, "training.checkpoint_every": 4, "training.eval_pairs": 60,
}  # fmt: skip


def command(workdir: Path, steps: int) -> list[str]:
    flags = trainings.flags({**SETTINGS, "training.steps": steps})
    return trainings.command("configs/quickstart.py", workdir, *flags)


def run(workdir: Path, steps: int):
    """A training to its end."""
    done = subprocess.run(
        command(workdir, steps), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the training ended with {done.returncode}:\n{done.stderr[-3000:]}")


def killed(workdir: Path, steps: int, kills: int, seconds: float, rng: random.Random) -> list[int]:
    """Trains with kills, and returns the newest checkpoint at each; ends as it likes."""
    at = []
    for _ in range(kills):
        process = subprocess.Popen(
            command(workdir, steps), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1]
        if process.returncode not in (0, -signal.SIGKILL):
            sys.exit(f"a resumed training ended with {process.returncode}:\n{error[-3000:]}")
        saved = (workdir / "supernet" / "checkpoints").glob("[0-9]*")
        at.append(max((int(p.name) for p in saved if p.name.isdigit()), default=0))
        if at[-1] == steps:
            break
    return at


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    args = parser.parse_args()
    rng = random.Random(args.seed)
    moments: list[list[int]] = []
    different_lines = different_arrays = 0
    with tempfile.TemporaryDirectory() as temporary:
        whole, workdir = Path(temporary) / "whole", Path(temporary) / "killed"
        start = time.monotonic()
        run(whole, args.steps)
        cold = time.monotonic() - start
        expected = differences.metric_lines(whole / "supernet")
        arrays = differences.checkpoint(whole / "supernet")
        while (left := args.kills - sum(map(len, moments))) > 0:
            shutil.rmtree(workdir, ignore_errors=True)
            # The first kills fall into the first compilations.
            moments.append(killed(workdir, args.steps, left, cold, rng))
            run(workdir, args.steps)
            own = workdir / "supernet"
            different_lines += differences.metric_lines(own) != expected
            found = differences.compare(arrays, differences.checkpoint(own))
            different_arrays += found["different"]
            kills = sum(map(len, moments))
            print(f"{kills} of {args.kills} kills; {different_lines} trainings with other metrics, "
                  f"{different_arrays} other arrays", file=sys.stderr)  # fmt: skip
    result = {
        "benchmark": "resume",
        **measure.machine(),
        "kills": sum(map(len, moments)),
        "checkpoint_at_each_kill": moments,
        "metrics": len(expected),
    }
    goals = {
        "trainings whose metrics differ": measure.goal(different_lines, 0),
        "arrays that differ": measure.goal(different_arrays, 0),
    }
    measure.finish(result, goals)


if __name__ == "__main__":
    main()
