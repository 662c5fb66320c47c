"""Two processes with two devices each are one with four."""

import signal
import time

import pytest
from pods import SMALL, losses, start, train
from quick_compilation import FLAGS


def test_two_processes_of_two_devices_are_one_of_four(tmp_path):
    pod = train(SMALL, tmp_path / "pod", processes=2, devices=2, xla=FLAGS)
    one = train(SMALL, tmp_path / "one", processes=1, devices=4, xla=FLAGS)
    assert (6, "valid/loss_largest") in pod
    assert pod.keys() == one.keys()
    for key, value in pod.items():
        assert value == pytest.approx(one[key], rel=1e-5), key


@pytest.mark.slow
def test_a_notice_to_one_process_stops_all(tmp_path):
    """They save the same step and end with 143; the same command goes on as if nothing was."""
    flags = [*SMALL, "--config.training.steps=300", "--config.training.checkpoint_every=1000"]
    folder = tmp_path / "stopped"
    pod = {"processes": 2, "devices": 2, "xla": FLAGS}
    processes = start(flags, folder, **pod)
    metrics = folder / "supernet" / "metrics.jsonl"
    while not (metrics.exists() and losses(folder)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    step = max(step for step, _ in losses(folder))
    assert step < 300
    assert train(flags, folder, **pod) == train(flags, tmp_path / "whole", **pod)
