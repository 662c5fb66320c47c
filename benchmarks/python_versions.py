"""Whether the project runs under several versions of Python, each with the newest jax for it.

python benchmarks/python_versions.py --json                            # 4 minutes for each
python benchmarks/python_versions.py --json --pythons=python3.11,/opt/python3.13/bin/python3

For each interpreter: a new virtual environment, the project installed into it as a package, all
commands imported, and, outside the clone, a small model trained for two updates, exported and
translated with. An interpreter that is not found is told, not an error.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trainings
from measure import finish, goal, machine
from trainings import ROOT

PYTHONS = "python3.11,python3.12,python3.13"
IMPORTS = """
import importlib, json, platform
import jax
from automoe_jax.cli import main, process
process.prepare(compiling=False)
from absl import flags
for name in main.COMMANDS:
    before = set(flags.FLAGS)
    importlib.import_module(f"automoe_jax.cli.{name}")
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
print(json.dumps({"python": platform.python_version(), "jax": jax.__version__}))
"""
SETTINGS = {
    "data.train_pairs": 300,
    "data.valid_pairs": 20,
    "data.test_pairs": 20,
    "tokenizer.vocab_size": 500,
    "subnet_training.steps": 2,
    "subnet_training.warmup_steps": 1,
    "subnet_training.tokens_per_batch": 256,
    "subnet_training.buckets": 1,
    "export.beam_sizes": "1,",
}


def tried(python: str, folder: Path) -> dict[str, Any]:
    """What was run with one interpreter, up to the first failure."""
    begin = time.monotonic()
    found: dict[str, Any] = {"interpreter": python, "works": False}
    environment = folder / "environment"
    own = str(environment / "bin" / "python")
    command = str(environment / "bin" / "automoe")
    run = ["--config=quickstart", f"--workdir={folder / 'run'}", *trainings.flags(SETTINGS)]
    subnet = folder / "subnet.json"
    subnet.write_text(json.dumps(_smallest()))
    steps = {
        "environment": [python, "-m", "venv", str(environment)],
        "install": [own, "-m", "pip", "install", "--quiet", str(ROOT)],
        "imports": [own, "-c", IMPORTS],
        "train": [command, "train", *run, f"--subnet={subnet}"],
        "export": [command, "export", *run],
        "translate": [command, "translate", f"--export={folder / 'run' / 'export'}"],
    }
    for name, step in steps.items():
        done = subprocess.run(
            step, cwd=folder, capture_output=True, text=True, input="Today is Monday.\n",
            check=False,
        )  # fmt: skip
        if done.returncode:
            return {**found, "failed": name, "error": (done.stderr or done.stdout)[-1000:]}
        if name == "imports":
            found |= json.loads(done.stdout.splitlines()[-1])
    lines = len(done.stdout.splitlines())
    return {**found, "works": lines == 1, "seconds": round(time.monotonic() - begin)}


def _smallest() -> dict[str, Any]:
    """A subnet of the quickstart's space."""
    encoder = {"heads": 4, "experts": [128, 256]}
    decoder = {"self_heads": 4, "cross_heads": 4, "cross_span": 1, "experts": [128]}
    return {
        "version": 1,
        "qkv_dim": 128,
        "encoder": {"embed_dim": 128, "layers": [encoder] * 2},
        "decoder": {"embed_dim": 96, "layers": [decoder]},
    }


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--pythons", default=PYTHONS, help="interpreters, with commas")
    args = parser.parse_args()
    rows = []
    for name in args.pythons.split(","):
        python = shutil.which(name)
        if python is None:
            rows.append({"interpreter": name, "works": None, "error": "not found"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(tried(python, Path(folder)))
        print(json.dumps(rows[-1]), file=sys.stderr)
    there = [row for row in rows if row["works"] is not None]
    goals = {"interpreters that work": goal(sum(row["works"] for row in there), len(there),
                                            at_most=False)}  # fmt: skip
    finish({"benchmark": "python_versions", "rows": rows, **machine()}, goals)


if __name__ == "__main__":
    main()
