"""A training whose workdir is a URL; a folder behind file:// behaves as a bucket."""

import os
import shutil
import subprocess
import sys

from conftest import ROOT
from pods import SMALL
from quick_compilation import FLAGS

from automoe_jax.training import metrics


def losses(folder):
    return [x for x in metrics.read(folder / "supernet") if "loss" in x["name"]]


def test_a_run_goes_on_from_its_bucket(tmp_path):
    """On another machine, without the first one's copy; it is watched from a third."""
    bucket = f"file://{tmp_path}/bucket/run"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS}

    def run(machine: str, program: str, *args: str) -> str:
        done = subprocess.run(
            [sys.executable, f"launch/{program}.py", *args, f"--workdir={bucket}"],
            cwd=ROOT, env={**env, "XDG_CACHE_HOME": str(tmp_path / machine)}, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("a", "train", *SMALL)
    (copy,) = (tmp_path / "a" / "automoe_jax" / "workdirs").iterdir()
    first = losses(copy)
    assert first[-1]["step"] == 6
    shutil.rmtree(tmp_path / "a")
    assert "supernet trained" in run("b", "train", *SMALL)
    (copy,) = (tmp_path / "b" / "automoe_jax" / "workdirs").iterdir()
    assert losses(copy) == first  # nothing was trained again
    assert "supernet" in run("c", "watch", "--once")
