"""What a training shows of itself: its clock, a profile, and `launch/watch.py`."""

import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from programs import launch, mistake
from tiny import tiny_flags

from automoe_jax.report import curves
from automoe_jax.training.clock import COMPILING, DATA, Clock

NAMES = ["--config", "configs/quickstart.py"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a small training, of which two steps were traced."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    done = launch("train", *tiny_flags(), "--workdir", str(folder), "--profile=3:4")
    assert done.returncode == 0, done.stderr.decode()
    return folder


def test_the_clock_knows_what_a_run_waits_for():
    clock = Clock()
    with clock.spent(DATA):
        time.sleep(0.05)
    with clock.spent(COMPILING):
        time.sleep(0.02)
    time.sleep(0.03)
    shares = clock.shares()
    assert shares["run/share_data"] > shares["run/share_compiling"] > 0
    assert shares["run/share_saving"] == 0
    assert sum(shares.values()) == pytest.approx(1)
    assert 0.1 < shares["run/goodput"] < 0.5


def test_a_training_logs_where_its_time_goes(run):
    lines = [json.loads(x) for x in (run / "supernet" / "metrics.jsonl").read_text().splitlines()]
    last = {x["name"]: x["value"] for x in lines}
    shares = [value for name, value in last.items() if name.startswith("run/share_")]
    assert len(shares) == 5
    assert last["run/goodput"] + sum(shares) == pytest.approx(1)
    assert 0.1 < last["run/memory_gb"] < 100


def test_a_training_logs_the_load_of_its_experts(run):
    lines = [json.loads(x) for x in (run / "supernet" / "metrics.jsonl").read_text().splitlines()]
    last = {x["name"]: x["value"] for x in lines}
    layers = {x.rpartition("/")[0].partition("_")[2] for x in last if x.startswith("valid/load_")}
    assert {"largest/encoder_1", "largest/decoder_3"} <= layers
    assert any(layer.startswith("random_0/") for layer in layers)
    for layer in layers:
        loads, sizes = (
            {name.rpartition("/")[2]: x for name, x in last.items()
             if name.startswith(f"valid/{kind}_{layer}/")}
            for kind in ("load", "size")
        )  # fmt: skip
        assert len(loads) == 3 if layer.startswith("largest") else len(loads) in (2, 3)
        assert sum(loads.values()) == pytest.approx(1)
        assert sum(sizes.values()) == pytest.approx(1)
        assert set(sizes) <= {"8", "16"}


def test_a_profile_is_written(run):
    (trace,) = (run / "supernet" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    for given in ("5", "5:", "0:3", "4:3", "a:b"):
        assert f"--profile is {given}; give two steps" in mistake(
            "train", *NAMES, f"--profile={given}"
        )


def test_watch_prints_a_table(run):
    done = launch("watch", f"--workdir={run}")
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    for words in ("6 of 6", "validation loss, largest", "goodput", "memory, GB", "supernet"):
        assert words in text
    assert "learning rate" in text
    assert "skipped" not in text  # there were none


def test_watch_writes_a_page(run, tmp_path):
    page = tmp_path / "curves.html"
    assert launch("watch", f"--workdir={run}", f"--html={page}").returncode == 0
    text = page.read_text()
    # Losses, load balance, speed, time, entropies and loads in two subnets.
    assert text.count("<svg") == 8
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org", "")  # names of SVG's namespaces


def test_watch_says_what_is_missing(tmp_path):
    assert "--workdir is missing" in mistake("watch")
    assert "does not exist" in mistake("watch", f"--workdir={tmp_path / 'none'}")
    assert "nothing was trained there yet" in mistake("watch", f"--workdir={tmp_path}")


def test_watching_ends_with_ctrl_c(run):
    """On a terminal, where the table refreshes."""
    code = (
        "import pty, sys\n"
        f"sys.exit(pty.spawn([{sys.executable!r}, 'launch/watch.py', '--workdir={run}', "
        "'--every=0.2']) >> 8)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    text = b""
    while b"memory, GB" not in text:
        text += process.stdout.read1(1 << 16)
    process.stdin.write(b"\x03")  # what the terminal turns into SIGINT
    process.stdin.flush()
    rest = process.communicate(timeout=60)[0]
    assert b"Traceback" not in text + rest
    assert process.returncode == 0


def test_curves_of_random_subnets_are_their_mean():
    lines = [
        {"step": 5, "wall_s": 1.0, "name": f"valid/loss_random_{i}", "value": value}
        for i, value in enumerate((2.0, 3.0))
    ]
    assert curves.series(lines)["valid/loss_random"] == [(5, 2.5)]
    table = curves.table({"supernet": lines}, {"supernet": 10})
    assert table[:2] == [["", "supernet"], ["step", "5 of 10"]]
    assert ["validation loss, random", "2.500"] in table
