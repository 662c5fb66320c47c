"""Runs survive kills, and a disk that fills up."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import quick_compilation
from conftest import ROOT
from programs import launch
from tiny import tiny_flags

FLAGS = tiny_flags()


def killed(kills: int) -> dict:
    """The result of `benchmarks/resume.py`."""
    command = [sys.executable, "benchmarks/resume.py", f"--kills={kills}", "--json"]
    env = {**os.environ, "XLA_FLAGS": quick_compilation.FLAGS}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, kills: int):
    assert found["kills"] == kills
    assert found["metrics"] > 20
    assert [goal["value"] for goal in found["goals"].values()] == [0, 0], found


@pytest.mark.slow
def test_a_killed_run_equals_the_uninterrupted_one():
    """SIGKILL at a moment of the process's life."""
    check(killed(1), 1)


@pytest.mark.slow
def test_twenty_kills():
    check(killed(20), 20)


@pytest.fixture
def small_disk(tmp_path):
    """Makes folders that are disks of some MB; needs the rights to mount them."""
    mounted = []

    def make(megabytes: int):
        folder = tmp_path / f"disk_{megabytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("a small disk cannot be mounted here (it takes root)")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk, leave: int):
    """Leaves some bytes of a disk."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(free - leave, 0)))


def one_line(done: subprocess.CompletedProcess) -> str:
    """The last line of what a program says that has failed."""
    error = done.stderr.decode()
    assert done.returncode == 2, error
    assert "Traceback" not in error
    assert "Error" not in error.rpartition("\n")[0]
    return error.strip().splitlines()[-1]


def test_a_disk_that_is_full_while_text_is_prepared(small_disk):
    disk = small_disk(5)
    prepare = "prepare", *FLAGS, "--workdir", str(disk / "run")
    fill(disk, 20_000)
    line = one_line(launch(*prepare))
    assert "the disk is full" in line
    assert "free some space, and the same command goes on" in line
    (disk / "ballast").unlink()
    done = launch(*prepare)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_checkpoint_is_due_and_during_search(small_disk, tmp_path):
    disk = small_disk(200)
    first = launch("train", *FLAGS, "--workdir", str(disk / "run"), "--config.training.steps=3")
    assert first.returncode == 0, first.stderr.decode()
    shutil.rmtree(disk / "run" / "supernet")
    fill(disk, 200_000)
    line = one_line(launch("train", *FLAGS, "--workdir", str(disk / "run")))
    assert "free some space, and the same command goes on" in line
    (disk / "ballast").unlink()
    done = launch("train", *FLAGS, "--workdir", str(disk / "run"))
    assert done.returncode == 0, done.stderr.decode()

    limit = ["--config.search.constraint.latency_ratio=0", "--config.search.constraint.gflops=0.01"]
    search = [*FLAGS, *limit, "--workdir", str(disk / "run")]
    fill(disk, 20_000)
    assert "the disk is full" in one_line(launch("search", *search))
    (disk / "ballast").unlink()
    done = launch("search", *search)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_a_disk_that_fills_up_during_export_and_translate(small_disk, tmp_path):
    run = tmp_path / "run"
    assert launch("train", *FLAGS, "--workdir", str(run)).returncode == 0
    subnet = tmp_path / "subnet.json"
    export = [*FLAGS, "--workdir", str(run), f"--subnet={subnet}"]
    layer = {"heads": 4, "experts": [8, 16]}
    decoder = {"self_heads": 4, "cross_heads": 4, "cross_span": 1, "experts": [8]}
    subnet.write_text(json.dumps({
        "qkv_dim": 8, "encoder": {"embed_dim": 8, "layers": [layer] * 2},
        "decoder": {"embed_dim": 8, "layers": [decoder]},
    }))  # fmt: skip
    disk = small_disk(2)
    fill(disk, 30_000)
    line = one_line(launch("export", *export, f"--out={disk / 'export'}"))
    assert "the disk is full" in line
    assert not (disk / "export").exists()
    done = launch("export", *export, f"--out={tmp_path / 'export'}")
    assert done.returncode == 0, done.stderr.decode()
    (disk / "ballast").unlink()
    shutil.rmtree(disk / ".export.tmp", ignore_errors=True)
    fill(disk, 0)
    text = b"today is monday.\n" * 50
    with (disk / "out.txt").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "launch/translate.py", f"--export={tmp_path / 'export'}"],
            cwd=ROOT, input=text, stdout=out, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert "the disk is full" in one_line(done)
