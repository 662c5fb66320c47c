"""Shared by the benchmarks that train: the command, a small architecture, and what a run logged."""

import concurrent.futures
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from automoe_jax.system.ray_workers import RayWorkers

Core = int | RayWorkers  # one of this machine, or any of a cluster
ROOT = Path(__file__).resolve().parent.parent
# Of configs/msdocs.py, what the benchmarks of experts set otherwise: experts alone vary.
EXPERTS_SETTINGS = {
    "space.decoder_embed_dims": 128,
    "space.encoder_depths": 3,
    "space.decoder_depths": 2,
    "space.encoder_experts": "1,2,4,8",
    "space.decoder_experts": "1,2,4,8",
    "space.encoder_ffn_dims": "256,512",
    "space.decoder_ffn_dims": "256,512",
    "sampling.depth_bias": 0,  # a biased draw moves the stream even where depths are fixed
}


def command(config: str, workdir: Path, *more: str) -> list[str]:
    """`launch/train.py` of this project."""
    program = str(ROOT / "launch" / "train.py")
    return [sys.executable, program, "--config", config, "--workdir", str(workdir), *more]


def flags(settings: dict[str, Any]) -> list[str]:
    """The flags that set fields of a config."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def architecture(experts: list[int]) -> dict[str, Any]:
    """A subnet of 3 + 2 layers of width 128 with these experts in each layer."""
    return _subnet(experts, (128, 128), (3, 2))


def dense(widths: tuple[int, int], depths: tuple[int, int], ffn: int) -> dict[str, Any]:
    """A subnet with one FFN in each layer; widths and depths of encoder and decoder."""
    return _subnet([ffn], widths, depths)


def _subnet(experts: list[int], widths: tuple[int, int], depths: tuple[int, int]) -> dict[str, Any]:
    encoder = {"heads": 4, "experts": experts}
    decoder = {"self_heads": 4, "cross_heads": 4, "cross_span": 1, "experts": experts}
    return {
        "version": 1,
        "qkv_dim": 128,
        "encoder": {"embed_dim": widths[0], "layers": [encoder] * depths[0]},
        "decoder": {"embed_dim": widths[1], "layers": [decoder] * depths[1]},
    }


def export(config: str, workdir: Path, core: Core, out: str, *more: str) -> Path:
    """The export, in folder `out` of a workdir, of its subnet.

    `more` are the flags of its space, and which weights are exported.
    """
    program = [sys.executable, str(ROOT / "launch" / "export.py"), "--config", config]
    folder = workdir / out
    run_on_core(core, [*program, f"--workdir={workdir}", f"--out={folder}", *more])
    return folder


def test_bleu(workdir: Path, core: Core | None, exported: Path, *more: str) -> float:
    """BLEU (cased, 13a) of an export on the workdir's test text, beam 5."""
    program = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--json", *more]
    printed = run_on_core(core, [*program, f"--export={exported}", f"--workdir={workdir}"])
    return json.loads(printed.splitlines()[-1])["bleu"]


def values(folder: Path, name: str) -> dict[int, float]:
    """The values of a metric of a training, by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["value"] for line in lines if line["name"] == name}


def run_on_core(core: Core | None, command: list[str]) -> str:
    """What a command prints, run on one core, or for None on all that there are.

    Ends this program with the command's last words if it fails.
    """
    if isinstance(core, RayWorkers):
        [(_, (code, printed, error))] = core.each(_run, [command])
    else:
        # Set from outside: this process has threads of JAX, and must not fork on its own.
        where = [] if core is None else ["taskset", "-c", str(core)]
        code, printed, error = _run([*where, *command])
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{error[-3000:]}")
    return printed


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def on_each_core(
    job: Callable[[Any, Core], None], inputs: Sequence[Any], workers: RayWorkers | None = None
) -> None:
    """Runs `job(input, core)` for every input, in order, one at a time on each core.

    The cores are those of this machine, or of a Ray cluster, whose nodes have the project and the
    workdir at the same paths.
    """
    cores: queue.Queue[Core] = queue.Queue()
    found = [workers] * workers.slots() if workers else sorted(os.sched_getaffinity(0))
    for core in found:
        cores.put(core)

    def one(own: Any) -> None:
        core = cores.get()
        try:
            job(own, core)
        finally:
            cores.put(core)

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        jobs = [pool.submit(one, own) for own in inputs]
        try:
            for job_done in concurrent.futures.as_completed(jobs):
                job_done.result()
        except BaseException:  # no more of them: the first failure ends the program
            pool.shutdown(wait=False, cancel_futures=True)
            raise
