"""Loss and learning rate against the published implementation."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from automoe_jax.errors import UserError
from automoe_jax.training.loss import decoder_input, smoothed_cross_entropy
from automoe_jax.training.optimizer import OptimizerConfig, rate


def test_label_smoothing_fixture(shared):
    with np.load(shared / "fixtures/label_smoothing.npz") as f:
        arrays = dict(f)
    sums = smoothed_cross_entropy(arrays["lprobs"][None], arrays["target"][None], 0.1)
    assert float(sums.loss) == pytest.approx(float(arrays["loss"]), rel=1e-5)
    assert float(sums.nll) == pytest.approx(float(arrays["nll"]), rel=1e-5)
    assert float(sums.tokens) == np.sum(arrays["target"] != 1)


def test_loss_of_uniform_logits_is_log_v():
    target = jnp.asarray([[5, 2, 1]])
    sums = smoothed_cross_entropy(jnp.zeros((1, 3, 10)), target, 0.1)
    assert float(sums.loss) == pytest.approx(2 * np.log(10), rel=1e-6)


def test_decoder_input():
    target = jnp.asarray([[5, 6, 2, 1], [7, 2, 1, 1]])
    np.testing.assert_array_equal(decoder_input(target), [[2, 5, 6, 1], [2, 7, 1, 1]])


def test_schedule_fixture(shared):
    """Every row but the last: the published code jumps back to the peak there, ours does not."""
    rows = json.loads((shared / "fixtures/lr_schedule.json").read_text())
    for name, warmup in (("super_W10000_U40000", 10_000), ("sub_W4000_U40000", 4_000)):
        schedule = rate(OptimizerConfig(steps=40_000, warmup_steps=warmup))
        for step, published in rows[name].items():
            ours = float(schedule(int(step)))
            expected = 1e-7 if step == "40000" else published
            assert ours == pytest.approx(expected, rel=1e-6), (name, step)  # fp32


def test_wrong_schedule():
    with pytest.raises(UserError, match="warmup_steps is 20"):
        OptimizerConfig(steps=10, warmup_steps=20)
