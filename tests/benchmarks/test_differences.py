"""The exact comparison behind benchmarks/before_after.py."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks import differences
from benchmarks.differences import compare


def test_equal_values_have_no_difference():
    def values():
        return {"loss": float("nan"), "w": np.float32([1, 2]), "line": {"a": [0.1, None], "b": 1}}

    after = values()
    after["line"] = {"b": 1, "a": [0.1, None]}  # the order of keys does not count
    assert compare(values(), after) == {"compared": 3, "different": 0, "first": None}


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [
        ({"a": [1, {"b": 0.1}]}, {"a": [1, {"b": np.nextafter(0.1, 1)}]}, "x: a: 1: b: 0.1 before"),
        ([1, 2], [1, 2, 3], "x: [1, 2] before, [1, 2, 3] after"),
        (np.float32([0.0]), np.float32([-0.0]), "x: values differ by up to 0"),
        (np.float32([1]), np.float64([1]), "x: float32[1] before, float64[1] after"),
        (np.float32([1]), None, "x: float32[1] before, nothing after"),
    ],
)
def test_first_difference_is_named(before, after, first):
    found = compare({"same": 1, "x": before, "y": 1}, {"same": 1, "x": after, "y": 2})
    assert (found["compared"], found["different"]) == (3, 2)
    assert found["first"].startswith(first)


def test_a_value_missing_on_one_side_differs():
    assert compare({"x": 1}, {"x": 1, "y": 2})["first"] == "y: nothing before, 2 after"


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, {})


def test_times_are_not_compared(tmp_path):
    names = ("train/loss", "train/step_s", "train/target_tokens_per_s", "run/goodput")
    lines = [{"step": 1, "wall_s": 2.5, "name": name, "value": 3.5} for name in names]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences.metrics(tmp_path) == {"step 1 train/loss": 3.5}


def test_arrays_of_the_last_checkpoint(tmp_path):
    for step in (9, 10):
        folder = tmp_path / "checkpoints" / str(step) / "params"
        ocp.PyTreeCheckpointer().save(folder, {"layer": {"kernel": np.full((2,), step)}})
    (found,) = differences.checkpoint(tmp_path).items()
    assert found[0] == "params['layer']['kernel']"
    np.testing.assert_array_equal(found[1], [10, 10])
