"""Loss and learning rate against the published implementation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import smoothed_cross_entropy

from automoe_jax.system.errors import UserError
from automoe_jax.training.config import OptimizerConfig
from automoe_jax.training.optimizer import apply, make, rate
from automoe_jax.training.step import decoder_input


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


def test_schedules_by_hand():
    """Warm-up of 4 of 20 updates to 8e-3, then by schedule; the last is not below `final_rate`."""
    common = {"steps": 20, "warmup_steps": 4, "initial_rate": 0.0, "peak_rate": 8e-3}
    inverse = rate(OptimizerConfig(**common, schedule="inverse_sqrt", final_rate=1e-3))
    linear = rate(OptimizerConfig(**common, schedule="linear", final_rate=0.0))
    for schedule in (inverse, linear):
        assert [float(schedule(n)) for n in (0, 2, 4)] == pytest.approx([0, 4e-3, 8e-3])
    found = [float(inverse(n)) for n in (16, 64, 1024)]
    assert found == pytest.approx([4e-3, 2e-3, 1e-3])  # of 1024: 0.5e-3
    assert [float(linear(n)) for n in (8, 12, 20, 30)] == pytest.approx([6e-3, 4e-3, 0, 0])


def test_wrong_schedule():
    with pytest.raises(UserError, match="warmup_steps is 20"):
        OptimizerConfig(steps=10, warmup_steps=20)


def test_apply_is_what_optax_does():
    """Three updates, by the loops and by the transformation's own update."""
    tx = make(OptimizerConfig(steps=5, warmup_steps=2, peak_rate=0.1))
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "b": {"c": jnp.ones(4)}}
    ours = theirs = (params, tx.init(params))
    update = jax.jit(lambda g, p, s: apply(tx, g, s, p, jnp.bool_(True)))
    for _ in range(3):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
        ours = update(gradient, *ours)
        change, state = tx.update(gradient, theirs[1], theirs[0])
        theirs = optax.apply_updates(theirs[0], change), state
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    assert np.abs(ours[0]["a"] - params["a"]).max() > 0.05


@pytest.mark.parametrize("tx", [make(OptimizerConfig()), optax.adam(0.1)], ids=["loops", "optax"])
def test_a_skipped_update_changes_nothing(tx):
    """Nor the ones after it: weights, moments and counters are what they were."""
    params = {"a": jnp.ones((5, 3)), "b": jnp.zeros(4)}
    update = jax.jit(lambda g, s, p, finite: apply(tx, g, s, p, finite))
    good = jax.tree.map(lambda x: x + 0.5, params)
    bad = {"a": jnp.full((5, 3), jnp.nan), "b": jnp.full(4, jnp.inf)}
    before = update(good, tx.init(params), params, jnp.bool_(True))
    after = update(bad, before[1], before[0], jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_update_makes_no_copy_of_the_state():
    """In place: besides the donated state only scalars."""
    tx = make(OptimizerConfig())
    params = {"a": jax.ShapeDtypeStruct((512, 640), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(
        lambda p, s, g, finite: apply(tx, g, s, p, finite), donate_argnums=(0, 1)
    ).lower(params, state, params, jax.ShapeDtypeStruct((), jnp.bool_))  # fmt: skip
    memory = step.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 512 * 640 / 10
