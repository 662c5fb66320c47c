"""Distilling on a Ray cluster of two nodes with a core each, against one process on one core.

python benchmarks/distill_ray.py --json --teacher=runs/multi30k/export --text=DIR

The nodes are processes of this machine, beside a head without cores. Each of --rounds rounds
translates the first --sentences pairs of the config's training text three times, in turns: here, on
the cluster, and on the cluster with one node killed when a third is translated. The corpora must
have the same bytes. Needs 2 cores and pip install 'automoe_jax[ray]'.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
from trainings import ROOT

from automoe_jax.phases import distill

RATIO = 1.7
GIB = 2**30
NODE: dict[str, Any] = {"memory": 3 * GIB, "object_store_memory": 200_000_000, "num_gpus": 0}


def corpus(text: Path, folder: Path, languages: tuple[str, str], sentences: int):
    """A corpus with the first `sentences` training pairs of another one."""
    folder.mkdir()
    for split in ("train", "valid"):
        for language in languages:
            lines = (text / f"{split}.{language}").read_bytes().split(b"\n")[:sentences]
            (folder / f"{split}.{language}").write_bytes(b"\n".join(lines) + b"\n")


def start(args: argparse.Namespace, text: Path, out: Path, *more: str) -> subprocess.Popen:
    """`launch/distill.py` with kernels and JAX on one core."""
    program = [sys.executable, str(ROOT / "launch" / "distill.py"), "--config", args.config]
    settings = [f"--workdir={out}_run", f"--teacher={args.teacher}", f"--out={out}"]
    data = ["--config.data.kind=parallel_text", f"--config.data.path={text}", "--nooriginal"]
    # Not pinned: both nodes are children of this process, and share its cores.
    environment = {**os.environ, "NPROC": "1"}
    return subprocess.Popen(
        [*program, *settings, *data, *more], cwd=ROOT, env=environment, stdout=sys.stderr
    )


def seconds(process: subprocess.Popen, begun: float) -> float:
    if process.wait():
        sys.exit(f"{' '.join(process.args)} ended with {process.returncode}")  # pyright: ignore
    return time.monotonic() - begun


def here(args: argparse.Namespace, text: Path, out: Path) -> float:
    begun = time.monotonic()
    return seconds(start(args, text, out), begun)


def on_cluster(args: argparse.Namespace, text: Path, out: Path, *, lose: bool) -> float:
    """Seconds of the command, without those of starting the cluster."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, **NODE) for _ in range(2)]
    cluster.wait_for_nodes()
    begun = time.monotonic()
    process = start(args, text, out, f"--ray={cluster.address}", "--ray_memory_gb=2")
    parts = -(-args.sentences // distill.CHUNK)
    while lose and process.poll() is None:
        if len(list((out / "parts").glob("*.json"))) > parts / 3:
            cluster.remove_node(nodes[1], allow_graceful=False)
            break
        time.sleep(0.1)
    took = seconds(process, begun)
    cluster.shutdown()
    return took


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("train.*")}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="accepted; the last line is JSON in any case"
    )
    parser.add_argument("--teacher", type=Path, required=True, help="export that translates")
    parser.add_argument("--config", default="configs/quickstart.py", help="for its languages")
    parser.add_argument("--text", type=Path, required=True, help="folder of parallel text")
    parser.add_argument("--languages", default="en,de")
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.teacher = args.teacher.absolute()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of clusters that end with this program
    times: dict[str, list[float]] = {"here": [], "cluster": [], "a node killed": []}
    same = True
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text"
        source, target = args.languages.split(",")
        corpus(args.text, text, (source, target), args.sentences)
        for i in range(args.rounds):
            outs = [Path(temporary) / f"{name}_{i}" for name in ("here", "cluster", "lost")]
            times["here"].append(here(args, text, outs[0]))
            times["cluster"].append(on_cluster(args, text, outs[1], lose=False))
            times["a node killed"].append(on_cluster(args, text, outs[2], lose=True))
            same &= content(outs[0]) == content(outs[1]) == content(outs[2]) != {}
            print({name: f"{x[-1]:.1f} s" for name, x in times.items()}, file=sys.stderr)
    ratios = [a / b for a, b in zip(times["here"], times["cluster"], strict=True)]
    ratio = statistics.median(ratios)
    about = {"sentences": args.sentences, "seconds": times, "ratios": ratios}
    goals = {
        "times as fast on two nodes": measure.goal(ratio, RATIO, at_most=False),
        "same bytes": measure.goal(float(same), 1, at_most=False),
    }
    measure.finish({"benchmark": "distill_ray", **measure.machine(), **about}, goals)


if __name__ == "__main__":
    main()
