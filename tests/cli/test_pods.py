"""Two processes with two devices each are one with four."""

import pytest
from pods import SMALL, train
from quick_compilation import FLAGS


def test_two_processes_of_two_devices_are_one_of_four(tmp_path):
    pod = train(SMALL, tmp_path / "pod", processes=2, devices=2, xla=FLAGS)
    one = train(SMALL, tmp_path / "one", processes=1, devices=4, xla=FLAGS)
    assert (6, "valid/loss_largest") in pod
    assert pod.keys() == one.keys()
    for key, value in pod.items():
        assert value == pytest.approx(one[key], rel=1e-5), key
