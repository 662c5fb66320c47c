"""A training whose workdir is a URL; a folder behind file:// behaves as a bucket."""

import shutil

from pods import SMALL
from programs import launch

from automoe_jax.training import metrics


def losses(folder):
    return [x for x in metrics.read(folder / "supernet") if "loss" in x["name"]]


def test_a_run_goes_on_from_its_bucket(tmp_path):
    """On another machine, without the first one's copy; it is watched from a third."""
    bucket = f"file://{tmp_path}/bucket/run"

    def run(machine: str, program: str, *args: str) -> str:
        env = {"XDG_CACHE_HOME": str(tmp_path / machine)}
        done = launch(program, *args, f"--workdir={bucket}", env=env)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    run("a", "train", *SMALL)
    (copy,) = (tmp_path / "a" / "automoe_jax" / "workdirs").iterdir()
    first = losses(copy)
    assert first[-1]["step"] == 6
    shutil.rmtree(tmp_path / "a")
    assert "supernet trained" in run("b", "train", *SMALL)
    (copy,) = (tmp_path / "b" / "automoe_jax" / "workdirs").iterdir()
    assert losses(copy) == first  # nothing was trained again
    assert "supernet" in run("c", "watch", "--once")
