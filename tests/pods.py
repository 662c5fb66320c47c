"""Trains in several processes, as the hosts of a pod do."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT

from automoe_jax.training import metrics

# Of configs/quickstart.py; its space, with less to compile.
SMALL = [
    "--config", "configs/quickstart.py", "--config.data.train_pairs=400",
    "--config.data.valid_pairs=40", "--config.tokenizer.vocab_size=300",
    "--config.space.encoder_depths=1", "--config.space.decoder_depths=1",
    "--config.training.steps=6", "--config.training.warmup_steps=2",
    "--config.training.tokens_per_batch=256", "--config.training.batches_per_step=4",
    "--config.training.buckets=1", "--config.training.eval_every=0",
    "--config.training.log_every=1", "--config.training.eval_subnets=1",
]  # fmt: skip
Losses = dict[tuple[int, str], float]


def train(flags: list[str], workdir: Path, **pod: Any) -> Losses:
    """The losses, by step and name, of a supernet trained by a pod that `start` starts."""
    for process in start(flags, workdir, **pod):
        _, error = process.communicate(timeout=900)
        assert process.returncode == 0, error.decode()
    return losses(workdir)


def losses(workdir: Path) -> Losses:
    """The losses that a supernet's training has written so far."""
    return {
        (line["step"], line["name"]): line["value"]
        for line in metrics.read(workdir / "supernet")
        if "loss" in line["name"]
    }


def start(
    flags: list[str],
    workdir: Path,
    *,
    processes: int,
    devices: int,
    xla: str = "",
    bucket: bool = False,
) -> list[subprocess.Popen]:
    """Processes that train a supernet together, with so many devices each.

    `xla` is more flags of XLA. With `bucket` the workdir is a URL, of which each has a copy.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"{xla} --xla_force_host_platform_device_count={devices}"
    program = [
        sys.executable,
        "launch/train.py",
        *flags,
        f"--workdir={'file://' * bucket}{workdir}",
    ]
    pod = [f"--coordinator={address}", f"--processes={processes}"] if processes > 1 else []
    return [
        subprocess.Popen(
            [*program, *pod, *([f"--process={i}"] if pod else [])],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**env, "XDG_CACHE_HOME": f"{workdir}_{i}"} if bucket else env,
        )
        for i in range(processes)
    ]  # fmt: skip
