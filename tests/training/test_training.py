"""The pmap step on four simulated devices, and runs that are killed and resumed."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, elastic_space, random_params, standalone_of, supernet_of, token_batch
from jax.sharding import Mesh
from small_training import CONFIG, DATA, TINY, KillAt, Killed, run_training

from automoe_jax.architecture import counts
from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.config import RunConfig
from automoe_jax.data.batches import Share
from automoe_jax.model import elastic_stack, stacked
from automoe_jax.model.attention import Linear
from automoe_jax.model.extract import extract
from automoe_jax.system import interrupt
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training import checkpoints, loop, metrics, parallel, sampling, sharding
from automoe_jax.training.config import ModelConfig, SamplingConfig, TrainingConfig
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.monitor import Window
from automoe_jax.training.step import (
    StepMetrics,
    StepOptions,
    TeacherModel,
    TrainState,
    batch_loss,
    decoder_input,
    make_eval_step,
    make_train_step,
    reconciled,
)
from automoe_jax.training.steps import micro_batches
from automoe_jax.training.target import TrainingTarget, abstract_state

SPACE = elastic_space(
    encoder_embed_dims=(16,),  # every width is compiled: the model's tests have two
    encoder_depths=(1, 2), decoder_depths=(1, 2), cross_spans=(1, 2),
)  # fmt: skip
WIDE_ENCODER = elastic_space(  # the words' shared table is wider than the decoder
    encoder_embed_dims=(24,), decoder_embed_dims=(16,), encoder_depths=(1,), decoder_depths=(1,),
    cross_spans=(1,),
)  # fmt: skip
HULL = SPACE.hull()
MODEL = supernet_of(SPACE)
SMOOTHING = 0.1


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(SPACE))


def gradients_only() -> optax.GradientTransformation:
    """`params - gradient`: the change of a step is its gradient."""
    return optax.sgd(1.0)


@pytest.fixture(scope="module")
def four_devices():
    assert jax.device_count() == 4
    return parallel.map_train_step(make_train_step(MODEL, gradients_only(), SMOOTHING, 0.0))


def device_batches(n_micro=1):
    """A batch per device and micro-batch, of different numbers of real tokens."""
    rng = np.random.default_rng(0)
    pairs = [token_batch(rng) for _ in range(4 * n_micro)]
    for i, (_, tgt) in enumerate(pairs):
        tgt[0, 6 - i % 3 :] = PAD_ID
    return {
        name: np.stack([p[k] for p in pairs]).reshape(4, n_micro, *pairs[0][k].shape)
        for k, name in enumerate(("source", "target"))
    }


def summed_gradient(model):
    """Gradient of the summed loss of one batch, on one device."""

    @jax.jit
    def gradient(params, batch, subnet):
        def objective(p):
            sums, _ = batch_loss(model, p, batch, subnet, None, SMOOTHING)
            return sums.loss, sums

        return jax.grad(objective, has_aux=True)(params)

    return gradient


@pytest.fixture(scope="module")
def single():
    return summed_gradient(MODEL)


def step_gradient(step, params, batch, subnets):
    state = TrainState(jnp.int32(0), params, gradients_only().init(params))
    # No dropout in this model: the key is not used.
    new, out = step(parallel.replicate(state), batch, subnets, jax.random.key(0))
    new = parallel.taken(new, state, sharding.Layout())
    assert int(new.step) == 1
    return jax.tree.map(lambda old, n: np.asarray(old) - n, params, new.params), out


def assert_close(a, b):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(b))
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            x, y, atol=1e-5 * scale, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


def test_same_subnet_everywhere_is_one_device_with_the_whole_batch(params, four_devices, single):
    batch = device_batches()
    subnet = SPACE.sample(np.random.default_rng(3))
    subnets = sampling.stack([[subnet]] * 4, HULL, Share(0, 4, 4))
    ours, out = step_gradient(four_devices, params, batch, subnets)
    whole = {k: v.reshape(12, -1) for k, v in batch.items()}
    gradient, sums = single(params, whole, to_active(subnet, HULL))
    assert_close(ours, jax.tree.map(lambda g: np.asarray(g / sums.tokens), gradient))
    assert float(out.loss[0]) == pytest.approx(float(sums.loss / sums.tokens), rel=1e-5)
    assert float(out.target_tokens[0]) == np.sum(batch["target"] != PAD_ID)


@pytest.mark.parametrize("n_micro", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_different_subnets_give_the_token_weighted_sum(params, four_devices, single, n_micro):
    batch = device_batches(n_micro)
    rng = np.random.default_rng(4)
    drawn = [[SPACE.sample(rng) for _ in range(n_micro)] for _ in range(4)]
    ours, _ = step_gradient(
        four_devices, params, batch, sampling.stack(drawn, HULL, Share(0, 4, 4))
    )
    total, n_tokens = None, 0.0
    for d in range(4):
        for m in range(n_micro):
            one = {k: v[d, m] for k, v in batch.items()}
            gradient, sums = single(params, one, to_active(drawn[d][m], HULL))
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
            n_tokens += float(sums.tokens)
    assert_close(ours, jax.tree.map(lambda g: np.asarray(g) / n_tokens, total))


def test_the_step_over_a_mesh_is_the_mapped_step(params, four_devices):
    """What is compiled for TPUs that are not here computes what `pmap` does here."""
    batch, rng = device_batches(2), np.random.default_rng(5)
    drawn = [[SPACE.sample(rng) for _ in range(2)] for _ in range(4)]
    subnets = sampling.stack(drawn, HULL, Share(0, 4, 4))
    mesh = Mesh(np.array(jax.devices()), (parallel.AXIS,))
    step = make_train_step(MODEL, gradients_only(), SMOOTHING, 0.0)
    over_mesh = parallel.map_train_step_over(step, mesh)
    ours, out = step_gradient(over_mesh, params, batch, subnets)
    theirs, mapped = step_gradient(four_devices, params, batch, subnets)
    assert_close(ours, theirs)
    assert float(out.loss[3]) == pytest.approx(float(mapped.loss[3]), rel=1e-6)


def test_a_step_that_is_not_finite_changes_nothing(params, four_devices):
    """Infinite weights: loss and gradient are lost on all devices; the weights stay."""
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), params)
    subnet = SPACE.sample(np.random.default_rng(3))
    subnets = sampling.stack([[subnet]] * 4, HULL, Share(0, 4, 4))
    with np.errstate(invalid="ignore"):
        change, out = step_gradient(four_devices, broken, device_batches(), subnets)
    assert np.asarray(out.skipped).tolist() == [1] * 4
    finite = jax.tree.map(lambda x: x[np.isfinite(x)], change)
    assert all(np.all(x == 0) for x in jax.tree.leaves(finite))


@pytest.mark.parametrize("backend", ["loop", pytest.param("pallas", marks=pytest.mark.slow)])
def test_bfloat16_has_the_losses_and_gradients_of_float32(params, backend):
    """Within what rounding to 8 bits allows; gradients are summed in float32.

    A rounding is off by 2**-8 at most, 0.17 % (root mean square), in either direction. In these
    3 + 3 layers a gradient passes about 50 of them, four a layer forward and four back, which as a
    random walk make 1.2 %. Measured: 0.23 to 0.44 %, as most of them are of what is added to a
    residual stream.
    """
    source, target = token_batch(np.random.default_rng(6))
    batch = {"source": source, "target": target}

    def program(model):
        def loss(params, subnet):
            sums, _ = batch_loss(model, params, batch, subnet, None, SMOOTHING)
            return sums.loss / sums.tokens

        return jax.jit(jax.value_and_grad(loss))

    def compare(model, params, *subnets):
        programs = [program(model.clone(dtype=dtype)) for dtype in ("bfloat16", "float32")]
        for subnet in subnets:
            results = [own(params, subnet) for own in programs]
            (value, gradient), (exact, exact_gradient) = (
                (float(loss), jax.tree.leaves(tree)) for loss, tree in results
            )
            assert {x.dtype for x in gradient} == {jnp.dtype("float32")}
            assert value != exact
            assert value == pytest.approx(exact, rel=2e-3)
            off = [a - b for a, b in zip(gradient, exact_gradient, strict=True)]
            assert optax.tree.norm(off) < 0.012 * optax.tree.norm(exact_gradient)

    ends = (to_active(subnet, HULL) for subnet in (SPACE.largest(), SPACE.smallest()))
    compare(MODEL.clone(backend=backend), params, *ends)
    if backend == "loop":
        subnet = SPACE.largest()
        compare(standalone_of(SPACE, subnet), extract(params, subnet, HULL), None)


def loss_of(weights, model, which):
    """The loss of a batch by one key of dropout."""
    source, target = token_batch(np.random.default_rng(6))
    batch = {"source": source, "target": target}
    sums, _ = batch_loss(model, weights, batch, which, jax.random.key(1), SMOOTHING)
    return sums.loss / sums.tokens


@pytest.mark.slow
def test_layers_computed_again_have_the_same_gradients(params):
    """With dropout, whose masks must be the same again."""
    subnet = SPACE.sample(np.random.default_rng(7))
    alone = standalone_of(SPACE, subnet).clone(dropout=0.1)
    active, own = to_active(subnet, HULL), extract(params, subnet, HULL)
    for model, weights, which in ((MODEL.clone(dropout=0.1), params, active), (alone, own, None)):
        gradients = [
            jax.jit(jax.grad(loss_of), static_argnums=1)(weights, model.clone(remat=remat), which)
            for remat in (True, False)
        ]
        assert_close(*gradients)


def test_layers_computed_again_store_nothing(params, monkeypatch):
    active = to_active(SPACE.sample(np.random.default_rng(7)), HULL)
    stored = mock.Mock(side_effect=elastic_stack._empty_buffers)
    monkeypatch.setattr(elastic_stack, "_empty_buffers", stored)
    for remat, times in ((True, 0), (False, 2)):
        model = MODEL.clone(remat=remat)
        jax.eval_shape(jax.grad(functools.partial(loss_of, model=model)), params, which=active)
        assert stored.call_count == times


def test_biases_have_their_gradients_summed_in_float32():
    """8 bits could not count the 4,096 tokens of a batch."""
    layer = Linear(8, (8, 8))
    x = jnp.ones((64, 64, 8), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda p: jnp.sum(layer.apply(p, x).astype(jnp.float32)))(params)
    np.testing.assert_array_equal(gradient["params"]["bias"], 64 * 64)


def test_one_compilation_for_a_thousand_subnets(params, compilations):
    """Invariant 2, for the train and evaluation steps."""
    step = parallel.map_train_step(make_train_step(MODEL, optax.adam(1e-3), SMOOTHING, 0.01))
    evaluate = parallel.map_eval_step(make_eval_step(MODEL))
    batch = device_batches()
    eval_batch = {k: v[:, 0] for k, v in batch.items()}
    share, rng = Share(0, 4, 4), np.random.default_rng(0)
    state = TrainState(jnp.int32(0), params, optax.adam(1e-3).init(params))
    state = parallel.replicate(state)
    counts = []
    for i in range(250):  # four subnets each
        drawn = [[SPACE.sample(rng)] for _ in range(4)]
        subnets = sampling.stack(drawn, HULL, share)
        state, out = step(state, batch, subnets, jax.random.key(i))
        evaluate(state.params, eval_batch, to_active(drawn[0][0], HULL))
        # As in training, few steps on the way: simulated devices lock each other out otherwise.
        jax.block_until_ready(out)
        if i in (0, 249):
            counts.append(compilations())
    assert counts[0] == counts[1]


def test_units_of_sampling():
    def drawn(unit, step=5):
        return sampling.draw(SPACE, 1, step, 4, 3, SamplingConfig(unit))

    flat = [s for row in drawn("micro_batch") for s in row]
    assert len(set(flat)) == 12
    by_device = drawn("device")
    assert all(len(set(row)) == 1 for row in by_device)
    assert len({row[0] for row in by_device}) == 4
    assert len({s for row in drawn("update") for s in row}) == 1
    assert drawn("micro_batch") == drawn("micro_batch")
    assert drawn("micro_batch", 6) != drawn("micro_batch")
    equal = drawn("equal_compute")
    for micro in zip(*equal, strict=True):
        assert len({counts.count(subnet).flops for subnet in micro}) == 1
        assert {(s.encoder.embed_dim, len(s.encoder.layers)) for s in micro} == {
            (micro[0].encoder.embed_dim, len(micro[0].encoder.layers))
        }
    several = [drawn("equal_compute", step) for step in range(20)]
    assert max(len({s for row in one for s in row}) for one in several) > 3
    for row in equal:
        for subnet in row:
            SPACE.validate(subnet)
    fixed = elastic_space(encoder_depths=(2,), encoder_experts=(1, 2), encoder_placement=(1, 2))
    with pytest.raises(UserError, match=r"config\.space has a placement"):
        RunConfig(space=fixed, sampling=SamplingConfig("equal_compute"))
    with pytest.raises(UserError, match=r"sampling\.unit is 'gpu'"):
        SamplingConfig("gpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling": SamplingConfig("device")}, r"sampling\.unit is 'device'.*unit=update"),
        ({"sharing": "means"}, r"space\.sharing is 'means'"),
        ({"expert_parallel": 3}, "layer 1 of the encoder has 4 .* which 3 devices cannot"),
        (
            {"sampling": SamplingConfig("update", "sandwich", project_conflicts=True)},
            r"project_conflicts is true, which needs whole gradients",
        ),
        ({"subnet": 2}, "only a supernet's experts can be spread"),
    ],
)
def test_what_experts_over_devices_need(fields, message):
    space = elastic_space(
        encoder_experts=(1, 4), decoder_experts=(1, 4), sharing=fields.get("sharing", "front")
    )
    training = TrainingConfig(expert_parallel=fields.get("expert_parallel", 2))
    with pytest.raises(UserError, match=message):
        RunConfig(
            space=space,
            sampling=fields.get("sampling", SamplingConfig("update")),
            training=training,
            subnet_training=TrainingConfig(expert_parallel=fields.get("subnet", 1)),
        )
    with pytest.raises(UserError, match="expert_parallel is 3, which does not divide the 4"):
        micro_batches(TrainingConfig(expert_parallel=3), 4)


def test_a_sandwich_has_the_largest_the_smallest_and_random_ones():
    config = SamplingConfig(rule="sandwich", sandwich=4, largest_first=3)
    assert sampling.draw(SPACE, 1, 2, 2, 3, config) == [[SPACE.largest()] * 3] * 2
    rows = sampling.draw(SPACE, 1, 3, 2, 3, config)
    assert [len(row) for row in rows] == [12, 12]
    for row in rows:
        assert row[0::4] == [SPACE.largest()] * 3
        assert row[1::4] == [SPACE.smallest()] * 3
    random = [s for row in rows for k in (2, 3) for s in row[k::4]]
    assert len(set(random)) == 12
    # The first random one is that of the published rule.
    assert [row[2::4] for row in rows] == sampling.draw(SPACE, 1, 3, 2, 3, SamplingConfig())
    same = sampling.draw(SPACE, 1, 3, 2, 3, dataclasses.replace(config, unit="update"))
    assert len({s for row in same for s in row[2::4]}) == 1


def test_the_largest_has_its_share_of_random_draws():
    config = SamplingConfig(largest_share=0.25)
    rows = sampling.draw(SPACE, 1, 5, 100, 4, config)
    count = sum(subnet == SPACE.largest() for row in rows for subnet in row)
    assert 70 <= count <= 130  # 400 draws: over 3 standard deviations either way


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit": "gpu"}, r"sampling\.unit is 'gpu'"),
        ({"rule": "all"}, r"sampling\.rule is 'all'"),
        ({"rule": "sandwich", "sandwich": 1}, r"sampling\.sandwich is 1"),
        ({"largest_share": 1.5}, r"sampling\.largest_share is 1\.5; allowed: 0 to 1"),
        ({"distillation": 0.5}, r"sampling\.distillation is 0\.5, but sampling\.rule is 'random'"),
        ({"project_conflicts": True}, r"sampling\.project_conflicts is True, but sampling\.rule"),
        ({"temperature": 0.0}, r"sampling\.temperature is 0\.0"),
        ({"experts_bias": -1.0}, r"sampling\.experts_bias is -1\.0"),
        ({"depth_bias": float("nan")}, r"sampling\.depth_bias is nan; allowed: 0 or more"),
        ({"alike_share": -0.5}, r"sampling\.alike_share is -0\.5; allowed: 0 to 1"),
        ({"flops_draws": 0}, r"sampling\.flops_draws is 0"),
    ],
)
def test_wrong_sampling(fields, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**fields)


def test_experts_and_layers_are_drawn_by_their_number():
    space = dataclasses.replace(SPACE, encoder_experts=(1, 2, 4), decoder_experts=(1, 2, 4))
    rows = sampling.draw(space, 1, 5, 100, 8, SamplingConfig(experts_bias=1.0, depth_bias=2.0))
    drawn = [subnet for row in rows for subnet in row]
    experts = [len(subnet.encoder.layers[0].experts) for subnet in drawn]
    _shares_are(experts, {1: 1 / 7, 2: 2 / 7, 4: 4 / 7})
    for side in ("encoder", "decoder"):
        depths = [len(getattr(subnet, side).layers) for subnet in drawn]
        _shares_are(depths, {1: 1 / 5, 2: 4 / 5})


def _shares_are(values, shares):
    for value, share in shares.items():
        spread = 3 * (share * (1 - share) / len(values)) ** 0.5
        assert values.count(value) / len(values) == pytest.approx(share, abs=spread)


def test_layers_are_alike_in_a_share_of_random_draws():
    some, plain = (
        [s for row in sampling.draw(SPACE, 1, 5, 100, 8, config) for s in row]
        for config in (SamplingConfig(alike_share=0.5), SamplingConfig())
    )
    pairs = [(s, _first_repeated(p), p) for s, p in zip(some, plain, strict=True)]
    assert all(subnet in choices for subnet, *choices in pairs)
    uneven = [subnet == alike for subnet, alike, drawn in pairs if drawn != alike]
    spread = 3 * (0.25 / len(uneven)) ** 0.5
    assert np.mean(uneven) == pytest.approx(0.5, abs=spread)
    for subnet in some:
        SPACE.validate(subnet)
    fixed = elastic_space(encoder_depths=(2,), encoder_experts=(1, 2), encoder_placement=(1, 2))
    with pytest.raises(UserError, match=r"alike_share is 0\.5, which makes layers alike"):
        RunConfig(space=fixed, sampling=SamplingConfig(alike_share=0.5))


def _first_repeated(subnet):
    """A subnet whose layers are all like the first of their stack."""
    stacks = {
        side: dataclasses.replace(stack, layers=stack.layers[:1] * len(stack.layers))
        for side, stack in subnet.stacks
    }
    return dataclasses.replace(subnet, **stacks)


def test_flops_spread_over_their_range():
    def quarters(config):
        """Shares of draws by quarter of the range."""
        ends = tuple(counts.count(x).flops for x in (SPACE.smallest(), SPACE.largest()))
        rows = sampling.draw(SPACE, 1, 5, 50, 8, config)
        flops = [counts.count(subnet).flops for row in rows for subnet in row]
        return np.histogram(flops, bins=4, range=ends)[0] / len(flops)

    plain, even = quarters(SamplingConfig()), quarters(SamplingConfig(flops_draws=16))
    assert even[-1] > 3 * plain[-1]
    assert np.abs(even - 0.25).sum() < 0.8 * np.abs(plain - 0.25).sum()


def test_a_sandwich_gives_the_mean_over_its_subnets(params, single):
    """Two devices' worth of batches, each through three subnets, on one device."""
    batch = {k: v[:1] for k, v in device_batches(2).items()}
    rng = np.random.default_rng(4)
    drawn = [[SPACE.sample(rng) for _ in range(6)]]
    step = parallel.map_train_step(make_train_step(MODEL, gradients_only(), SMOOTHING, 0.0))
    ours, out = one_device(step, params, batch, drawn)
    total, loss, n_tokens = None, 0.0, np.sum(batch["target"] != PAD_ID)
    for nth, subnet in enumerate(drawn[0]):
        one = {k: v[0, nth // 3] for k, v in batch.items()}
        gradient, sums = single(params, one, to_active(subnet, HULL))
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        loss += float(sums.loss)
    assert_close(ours, jax.tree.map(lambda g: np.asarray(g / (3 * n_tokens)), total))
    assert float(out.loss[0]) == pytest.approx(loss / (3 * n_tokens), rel=1e-5)
    assert float(out.target_tokens[0]) == n_tokens


@pytest.mark.parametrize(
    "space",
    [pytest.param(SPACE, marks=pytest.mark.slow), WIDE_ENCODER],
    ids=["alike", "wide encoder"],
)
def test_the_first_subnet_of_a_sandwich_teaches_the_others(space):
    model, hull, params = supernet_of(space), space.hull(), random_params(space)
    params, single = jax.tree.map(jnp.asarray, params), summed_gradient(model)
    batch = {k: v[:1] for k, v in device_batches(2).items()}
    rng, weight, temperature = np.random.default_rng(4), 0.7, 2.0
    drawn = [[space.largest(), space.sample(rng), space.smallest()] * 2]
    step = make_train_step(
        model, gradients_only(), SMOOTHING, 0.0, StepOptions(weight, temperature)
    )
    ours, _ = one_device(parallel.map_train_step(step), params, batch, drawn, hull)

    def log_softmax(p, one, active):
        ids = one["source"], decoder_input(one["target"])
        logits = model.apply({"params": p}, *ids, active).logits_BTV
        return jax.nn.log_softmax(logits / temperature)

    @jax.jit
    @jax.grad
    def soft_gradient(p, one, active, taught_BTV):
        soft_BT = -jnp.sum(jnp.exp(taught_BTV) * log_softmax(p, one, active), axis=-1)
        return temperature**2 * jnp.sum(soft_BT * (one["target"] != PAD_ID))

    taught, total = jax.jit(log_softmax), jax.tree.map(jnp.zeros_like, params)
    largest = to_active(space.largest(), hull)
    for nth, subnet in enumerate(drawn[0]):
        one, active = {k: v[0, nth // 3] for k, v in batch.items()}, to_active(subnet, hull)
        hard, _ = single(params, one, active)
        soft = soft_gradient(params, one, active, taught(params, one, largest))
        w = weight if nth % 3 else 0.0
        total = jax.tree.map(lambda t, h, s, w=w: t + (1 - w) * h + w * s, total, hard, soft)
    n_tokens = 3 * np.sum(batch["target"] != PAD_ID)
    assert_close(ours, jax.tree.map(lambda g: np.asarray(g / n_tokens), total))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_yields_where_gradients_oppose(sign):
    """On a hand-made pair: (3, 4) along (1, 0) and against it; and the sum where they agree."""
    first, others = [jnp.array([sign * 3.0]), jnp.array([4.0])], [jnp.ones(1), jnp.zeros(1)]
    both = [jnp.stack(pair) for pair in zip(first, others, strict=True)]
    # Opposed, (-3, 4) loses its part along (1, 0).
    expected = [4.0, 4.0] if sign > 0 else [1.0, 4.0]
    assert [float(x[0]) for x in reconciled(both)] == pytest.approx(expected)


def test_a_sandwich_reconciles_its_gradients(params, single):
    batch = {k: v[:1] for k, v in device_batches(2).items()}
    rng = np.random.default_rng(4)
    drawn = [[SPACE.largest(), SPACE.sample(rng), SPACE.smallest()] * 2]
    options = StepOptions(project_conflicts=True)
    step = make_train_step(MODEL, gradients_only(), SMOOTHING, 0.0, options)
    ours, _ = one_device(parallel.map_train_step(step), params, batch, drawn)
    zeros = jax.tree.map(jnp.zeros_like, params)
    sums, n_tokens = [zeros, zeros], np.sum(batch["target"] != PAD_ID)
    for nth, subnet in enumerate(drawn[0]):
        one = {k: v[0, nth // 3] for k, v in batch.items()}
        gradient, _ = single(params, one, to_active(subnet, HULL))
        which = int(nth % 3 > 0)
        sums[which] = jax.tree.map(jnp.add, sums[which], gradient)
    expected = reconciled(jax.tree.map(lambda a, b: jnp.stack([a, b]), *sums))
    assert_close(ours, jax.tree.map(lambda g: np.asarray(g / (3 * n_tokens)), expected))


def test_random_experts_are_drawn_once_for_what_runs_one_subnet():
    def taken(unit, step=5):
        config = SamplingConfig(unit, random_experts=True)
        experts = sampling.random_experts(1, step, config)
        space = dataclasses.replace(SPACE, encoder_experts=(2, 4), decoder_experts=(2, 4))
        rows = [[space.smallest()] * 3 for _ in range(4)]
        return sampling.stack(rows, space.hull(), Share(0, 4, 4), experts).encoder.taken_LE

    found = taken("micro_batch")
    np.testing.assert_array_equal(found, taken("micro_batch"))
    assert (found[:, :, 0].sum(axis=-1) == 2).all()
    assert len(np.unique(found[:, :, 0].reshape(12, -1), axis=0)) > 3
    assert (found != taken("micro_batch", 6)).any()
    by_device = taken("device")
    assert (by_device == by_device[:, :1]).all()
    assert (by_device != by_device[:1]).any()
    assert (taken("update") == taken("update")[:1, :1]).all()
    assert sampling.random_experts(1, 5, SamplingConfig()) is None


def test_a_trained_model_teaches_a_stand_alone_one():
    """A teacher of another architecture and another width, with a table of its own."""
    rng, weight, temperature = np.random.default_rng(4), 0.3, 2.0
    wide = dataclasses.replace(SPACE, encoder_embed_dims=(24,), decoder_embed_dims=(24,))
    pairs = [(SPACE, SPACE.sample(rng)), (wide, wide.largest())]
    (student, params), (teacher, taught_by) = (
        (
            standalone_of(space, subnet),
            jax.tree.map(jnp.asarray, extract(random_params(space, 1), subnet, space.hull())),
        )
        for space, subnet in pairs
    )
    batch = {k: v[:1] for k, v in device_batches(2).items()}
    step = make_train_step(
        student, gradients_only(), SMOOTHING, 0.0,
        StepOptions(teacher=TeacherModel(teacher, weight, temperature)),
    )  # fmt: skip
    state = TrainState(jnp.int32(0), params, gradients_only().init(params))
    state, others = jax.tree.map(lambda x: jnp.asarray(x)[None], (state, taught_by))
    mapped = parallel.map_train_step(step, taught=True)
    new, _ = mapped(state, batch, None, jax.random.key(0), others)
    ours = jax.tree.map(lambda old, n: np.asarray(old - n[0]), params, new.params)

    def objective(p, one):
        ids = one["source"], decoder_input(one["target"])
        hard = batch_loss(student, p, one, None, None, SMOOTHING)[0].loss
        logits = student.apply({"params": p}, *ids).logits_BTV
        taught = teacher.apply({"params": taught_by}, *ids).logits_BTV
        log_p = jax.nn.log_softmax(logits / temperature)
        soft_BT = -jnp.sum(jax.nn.softmax(taught / temperature) * log_p, axis=-1)
        soft = temperature**2 * jnp.sum(soft_BT * (one["target"] != PAD_ID))
        return (1 - weight) * hard + weight * soft

    gradient, n_tokens = jax.jit(jax.grad(objective)), np.sum(batch["target"] != PAD_ID)
    both = (gradient(params, {k: v[0, nth] for k, v in batch.items()}) for nth in range(2))
    assert_close(ours, jax.tree.map(lambda a, b: np.asarray(a + b) / n_tokens, *both))


def one_device(step, params, batch, drawn, hull=HULL):
    """As `step_gradient`, on the first device alone."""
    subnets = sampling.stack(drawn, hull, Share(0, 1, 1))
    state = TrainState(jnp.int32(0), params, gradients_only().init(params))
    state = jax.tree.map(lambda x: jnp.asarray(x)[None], state)
    new, out = step(state, batch, subnets, jax.random.key(0))
    return jax.tree.map(lambda old, n: np.asarray(old - n[0]), params, new.params), out


# --- the loop ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run_training(folder)


def test_killed_and_resumed_is_the_uninterrupted_run(uninterrupted, tmp_path):
    """Invariant 6: the same loss curve, to the last digit, whatever the moment.

    Checkpoints and log lines fall on different steps.
    """
    folder, whole = uninterrupted
    for step in (3, 4):
        with pytest.raises(Killed):
            run_training(tmp_path, KillAt(step))
    assert run_training(tmp_path) == whole
    steps = [line["step"] for line in metrics.read(tmp_path)]
    assert steps == sorted(steps)
    a, b = (
        checkpoints.load_params(
            TrainingTarget(TINY, (64, 64), ModelConfig()), CONFIG, f, pytest.fail
        )[0]
        for f in (folder, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert run_training(tmp_path) == whole  # finished: nothing happens


@pytest.mark.slow
def test_a_killed_run_of_sandwiches_is_the_uninterrupted_one(tmp_path):
    """Killed before and after the end of the largest subnet's own updates, which have a program."""
    rules = SamplingConfig(
        rule="sandwich", sandwich=3, largest_first=3, distillation=0.5, temperature=2.0
    )
    whole = run_training(tmp_path / "whole", rules=rules)
    for step in (3, 4):
        with pytest.raises(Killed):
            run_training(tmp_path / "killed", KillAt(step), rules=rules)
    assert run_training(tmp_path / "killed", rules=rules) == whole
    # What was drawn is what was trained: a sandwich has other losses than one subnet.
    assert whole != run_training(tmp_path / "random")


def test_an_optimizer_over_four_devices_is_the_whole_one(uninterrupted, tmp_path, monkeypatch):
    """Killed with its state in parts, the run goes on with a whole one, and the other way round."""
    monkeypatch.setattr(sharding, "LEAST", 64)
    _, whole = uninterrupted
    summed = mock.Mock(side_effect=sharding.summed)
    monkeypatch.setattr(sharding, "summed", summed)
    parts = dataclasses.replace(CONFIG, shard_optimizer=True)
    for first, second in ((parts, CONFIG), (CONFIG, parts)):
        folder = tmp_path / f"{first.shard_optimizer}"
        with pytest.raises(Killed):
            run_training(folder, KillAt(4), config=first)
        assert_alike(run_training(folder, config=second), whole)
    assert summed.called


@pytest.mark.slow
def test_a_cut_state_goes_on_with_fewer_devices(tmp_path, monkeypatch):
    """Killed on four devices, each with a part of it, the run ends on two."""
    monkeypatch.setattr(sharding, "LEAST", 64)
    parts = dataclasses.replace(CONFIG, shard_optimizer=True)
    # Of what each device draws by itself, nothing: one subnet an update, and no dropout.
    one = SamplingConfig(unit="update")
    train = functools.partial(run_training, dropout=0.0, config=parts, rules=one)
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", KillAt(4))
    program = """
import dataclasses, json, os, pathlib, sys
from small_training import CONFIG, KillAt, SamplingConfig, run_training  # sets flags of XLA
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
import jax
from unittest import mock
from automoe_jax.training import sharding
sharding.LEAST = 64
sharding.summed = mock.Mock(side_effect=sharding.summed)
config = dataclasses.replace(CONFIG, shard_optimizer=True)
rules = SamplingConfig(unit="update")
never, folder = KillAt(None), pathlib.Path(sys.argv[1])
found = run_training(folder, never, dropout=0.0, config=config, rules=rules)
cut = sharding.summed.called
lines = [[*key, value] for key, value in found.items()]
print(json.dumps([jax.device_count(), min(never.steps), cut, lines]))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "killed")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    devices, begin, cut, lines = json.loads(done.stdout.splitlines()[-1])
    assert (devices, cut) == (2, True)
    assert begin >= 2  # from a checkpoint
    assert_alike({(step, name): value for step, name, value in lines}, whole)


def assert_alike(found, whole):
    """The same metrics, but for roundings."""
    assert found.keys() == whole.keys()
    for key, value in found.items():
        assert value == pytest.approx(whole[key], rel=1e-4), key


SPREAD = {
    "two": pytest.param({}, {"expert_parallel": 2}, marks=pytest.mark.slow),
    "two, optimizer cut": pytest.param(
        {}, {"expert_parallel": 2, "shard_optimizer": True}, marks=pytest.mark.slow
    ),
    "four, all options": (
        {"rule": "sandwich", "sandwich": 3, "distillation": 0.5, "random_experts": True},
        {"expert_parallel": 4, "shard_optimizer": True, "remat": "layer"},
    ),
}


@pytest.mark.parametrize(("sampled", "how"), SPREAD.values(), ids=SPREAD)
def test_experts_over_devices_are_those_of_one(tmp_path, monkeypatch, sampled, how):
    """Losses, routing and gradients of experts on all devices are those of experts on each.

    Killed, the run goes on with another number of devices for them.
    """
    monkeypatch.setattr(sharding, "LEAST", 64)
    rules = SamplingConfig(unit="update", largest_share=0.5, **sampled)
    more = {"identity_experts": True, "encoder_top_k": (1, 2)}
    space = dataclasses.replace(TINY, encoder_experts=(1, 2, 4), decoder_experts=(1, 4), **more)
    run = functools.partial(run_training, rules=rules, space=space)
    config = dataclasses.replace(CONFIG, ema_decay=0.9 if sampled else 0.0)
    whole = run(tmp_path / "whole", config=config)
    parts = dataclasses.replace(config, **how)
    assert_alike(run(tmp_path / "parts", config=parts), whole)
    with pytest.raises(Killed):
        run(tmp_path / "killed", KillAt(4), config=parts)
    assert_alike(run(tmp_path / "killed", config=config), whole)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pallas", "blocked"])
def test_experts_over_devices_with_the_kernels_of_others(backend):
    """The products of TPUs and GPUs, on this CPU: spread experts take the step of whole ones."""
    space = dataclasses.replace(SPACE, encoder_experts=(1, 4), decoder_experts=(1, 4))
    params = jax.tree.map(jnp.asarray, random_params(space))
    subnets = sampling.stack([[space.largest()]] * 4, space.hull(), Share(0, 4, 4))
    found = []
    for n in (1, 2):
        model = supernet_of(space).clone(backend=backend, spread=n)
        layout = sharding.Layout(spread=n)
        step = make_train_step(model, gradients_only(), SMOOTHING, 0.1, StepOptions(layout=layout))
        state = TrainState(jnp.int32(0), params, gradients_only().init(params))
        placed = parallel.place(jax.tree.map(jnp.copy, state), layout)
        mapped = parallel.map_train_step(step)
        new, out = mapped(placed, device_batches(), subnets, jax.random.key(0))
        found.append((parallel.taken(new, state, layout).params, out.loss, out.gradient_norm))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [sharding.Layout(True), sharding.Layout(True, 2),
                                    sharding.Layout(False, 4)], ids=str)  # fmt: skip
def test_parts_are_put_together_again(monkeypatch, layout):
    monkeypatch.setattr(sharding, "LEAST", 64)
    rng = np.random.default_rng(0)
    shapes = {"first": (8, 16), "second": (6, 20), "none": (9, 15), "small": (4,)}
    experts = {
        "fc1": (24, 3),
        "fc1_bias": (24,),
        "fc2": (24, 3),
        "fc2_bias": (8, 3),
        "router": (9, 15),
    }

    def made(of):
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in of.items()}

    tree = {**made(shapes), "layers": {"experts": made(experts)}}
    share = Share(0, 4, 4)
    placed = sharding.place(layout, tree, share)
    expected = sharding.part_shapes(layout, tree, 4)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape[1:], y.shape), placed, expected)
    if layout.cut:
        assert {name: placed[name].shape for name in shapes} == {
            "first": (4, 2, 16), "second": (4, 6, 5), "none": (4, 9, 15), "small": (4, 4),
        }  # fmt: skip
    if layout.spread > 1:
        # Rows 3 i to 3 i + 2 are expert i's: the second device has experts 1, 1 + n and so on.
        n, own = layout.spread, placed["layers"]["experts"]
        assert own["fc1"].shape == (4, 24 // n, 3)
        whole = tree["layers"]["experts"]
        np.testing.assert_array_equal(own["fc2_bias"][1], whole["fc2_bias"][1::n])
        np.testing.assert_array_equal(own["fc1"][1][3:6], whole["fc1"][3 + 3 * n : 6 + 3 * n])
    found = sharding.collected(layout, placed, tree, share)
    jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_parts_of_a_process_that_begins_within_a_group():
    """Groups of four devices, and a process whose four begin at the third of a group."""
    rng, n = np.random.default_rng(0), 4
    tree = {"experts": {name: rng.normal(size=(16, 3)) for name in stacked.FLAT}}
    share, layout = Share(2, 4, 8), sharding.Layout(spread=n)
    placed = sharding.place(layout, tree, share)
    first = stacked.part(tree["experts"], 2, n)
    np.testing.assert_array_equal(placed["experts"]["fc1"][0], first["fc1"].astype(np.float32))
    found = sharding.collected(layout, placed, tree, share)
    as_placed = jax.tree.map(lambda x: x.astype(np.float32), tree)
    jax.tree.map(np.testing.assert_array_equal, found, as_placed)


def test_what_a_run_writes(uninterrupted):
    folder, whole = uninterrupted
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == {"step", "wall_s", "name", "value"} for line in lines)
    names = {name for _, name in whole}
    assert {"train/loss", "train/device_imbalance", "valid/loss_largest", "valid/loss_smallest",
            "valid/loss_random_0", "learning_rate"} <= names  # fmt: skip
    assert list((folder / "tensorboard").glob("events*"))
    assert whole[2, "learning_rate"] == pytest.approx(1e-7 + (1e-2 - 1e-7) / 2)


@pytest.fixture
def signals():
    """Signals are handled as in a command."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupt.install()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Signal(Silent):
    """Sends a signal to this process when a step is logged."""

    def __init__(self, number):
        self._number = number

    def update(self, done, **fields):
        if done == 2:
            os.kill(os.getpid(), self._number)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_interrupted_and_resumed_is_the_uninterrupted_run(uninterrupted, tmp_path, number):
    """The step is saved between two checkpoints and two log lines of the plan."""
    _, whole = uninterrupted
    notes = []
    progress = Signal(number)
    progress.note = notes.append
    config = dataclasses.replace(CONFIG, log_every=2, checkpoint_every=100)
    with pytest.raises(interrupt.Interrupted) as e:
        run_training(tmp_path, progress, config=config)
    assert e.value.exit_code == 128 + number
    step = checkpoints.latest_step(tmp_path)
    assert notes[-1] == f"stopping at step {step}, which is saved"
    assert run_training(tmp_path) == whole


@pytest.mark.usefixtures("signals")
def test_interrupted_before_the_first_step_leaves_no_checkpoint(tmp_path, monkeypatch):
    """One of step 0 would be taken for converted weights."""
    notes = []
    progress = Silent()
    progress.note = notes.append

    def program(self, step, stop):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Steps, "program", program)
    with pytest.raises(interrupt.Interrupted):
        run_training(tmp_path, progress)
    assert notes[-1] == "stopping before the first step"
    assert checkpoints.latest_step(tmp_path) is None


def test_every_step_is_in_a_mean(tmp_path):
    """Also those between the last log line and an evaluation."""
    config = dataclasses.replace(CONFIG, log_every=2, eval_every=3, checkpoint_every=100)
    whole = run_training(tmp_path, config=config)
    assert [step for step, name in whole if name == "train/loss"] == [2, 3, 4, 6]


class SomeNotFinite:
    """The mapped step, whose metrics say of some steps that they were skipped."""

    def __init__(self, monkeypatch, steps):
        self._steps, self._map = steps, parallel.map_train_step
        monkeypatch.setattr(parallel, "map_train_step", self)

    def __call__(self, step, **kwargs):
        mapped = self._map(step, **kwargs)

        def run(state, *inputs):
            number = int(np.asarray(state.step)[0]) + 1
            state, out = mapped(state, *inputs)
            if number in self._steps:
                out = out._replace(loss=out.loss * np.nan, skipped=out.skipped + 1)
            return state, out

        return run


def test_skipped_steps_are_left_out_and_counted(uninterrupted, tmp_path, monkeypatch):
    _, whole = uninterrupted
    SomeNotFinite(monkeypatch, {3, 4})
    config = dataclasses.replace(CONFIG, log_every=2, max_skipped=3, checkpoint_every=5)
    found = run_training(tmp_path, config=config)
    assert (2, "train/skipped_steps") not in found
    assert found[5, "train/skipped_steps"] == found[6, "train/skipped_steps"] == 2
    assert np.isfinite(found[5, "train/loss"])
    # The schedule goes on with the updates that are made.
    assert found[6, "learning_rate"] == whole[4, "learning_rate"]


def test_too_many_skipped_steps_end_a_run(tmp_path, monkeypatch):
    SomeNotFinite(monkeypatch, {4, 5})
    config = dataclasses.replace(CONFIG, max_skipped=2)
    line = (
        r"2 steps in a row \(training.max_skipped\) is not finite, the last at step 5: batch of "
        r"shape \dx\d+/\d+, training pairs \d+, .*; subnets E.*; they changed nothing"
    )
    with pytest.raises(UserError, match=line):
        run_training(tmp_path, config=config)
    assert checkpoints.latest_step(tmp_path) == 4


def cut(path):
    path.write_bytes(path.read_bytes()[:10])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "files"),
    [
        (cut, "params/**/d/*"),
        (zero, "optimizer/**/*"),
        (flip, "params/**/d/*"),
        (flip, "optimizer/**/d/*"),
        (Path.unlink, "params/manifest.ocdbt"),
        (Path.unlink, "optimizer/**/*"),
        (zero, "**/*"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(uninterrupted, tmp_path, damage, files):
    folder, _ = uninterrupted
    run = shutil.copytree(folder, tmp_path / "run")
    store = run / checkpoints.CHECKPOINTS
    damaged = [path for path in (store / "6").glob(files) if path.is_file()]
    assert damaged
    for path in damaged:
        damage(path)

    notes = []
    target = TrainingTarget(TINY, (64, 64), ModelConfig())
    _, step = checkpoints.load_params(target, CONFIG, run, notes.append)
    assert step == 4
    assert f"checkpoint {store / '6'} is damaged" in notes.pop()
    assert (store / "6").exists()  # a reader moves nothing

    abstract = abstract_state(target, CONFIG, 0)
    with contextlib.closing(checkpoints.Checkpoints(store)) as writer:
        restored = writer.restore(abstract, notes.append)
        assert restored is not None
        assert writer.latest() == restored.step == 4
    (line,) = notes
    assert "\n" not in line
    assert f"step 4 is used instead, and it is moved to {run / checkpoints.DAMAGED}/6_0" in line


def test_training_goes_on_from_the_checkpoint_before(uninterrupted, tmp_path):
    folder, whole = uninterrupted
    run = shutil.copytree(folder, tmp_path / "run")
    flip(run / checkpoints.CHECKPOINTS / "6/params/manifest.ocdbt")
    longer = dataclasses.replace(CONFIG, steps=7, checkpoint_every=100)
    again = run_training(run, config=longer)
    assert all(again[key] == whole[key] for key in whole if key[0] <= 5)
    assert checkpoints.latest_step(run) == 7


def test_a_stored_window_does_not_change_with_later_steps():
    """A checkpoint is written while training goes on."""
    window = Window()
    subnets = [[TINY.largest()], [TINY.smallest()]]
    output = StepMetrics(*map(float, range(7)))
    window.add(output, subnets)
    stored = window.stored()
    before = json.dumps(stored)
    window.add(output, subnets)
    assert json.dumps(stored) == before
    assert Window.restored(stored).imbalances == window.imbalances[:1]


def test_a_finished_training_mends_its_last_checkpoint(uninterrupted, tmp_path):
    """The same command trains again from the one before, to the same end."""
    folder, whole = uninterrupted
    run = shutil.copytree(folder, tmp_path / "run")
    flip(run / checkpoints.CHECKPOINTS / "6/params/manifest.ocdbt")
    assert run_training(run) == whole
    assert (run / checkpoints.DAMAGED / "6_0").is_dir()
    target = TrainingTarget(TINY, (64, 64), ModelConfig())
    a, b = (checkpoints.load_params(target, CONFIG, f, pytest.fail)[0] for f in (folder, run))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_no_checkpoint_can_be_read(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0] / checkpoints.CHECKPOINTS, tmp_path / checkpoints.CHECKPOINTS)
    for path in (tmp_path / checkpoints.CHECKPOINTS).rglob("*"):
        if path.is_file():
            cut(path)
    with pytest.raises(
        UserError, match=r"no checkpoint in .* can be read \(6: .*remove the folder"
    ):
        run_training(tmp_path, config=dataclasses.replace(CONFIG, steps=7))
    assert checkpoints.latest_step(tmp_path) == 6  # nothing is moved


def test_subnet_inherits_and_trains(uninterrupted, tmp_path):
    target = TrainingTarget(TINY, (64, 64), ModelConfig())
    params, step = checkpoints.load_params(target, CONFIG, uninterrupted[0], pytest.fail)
    assert step == CONFIG.steps
    subnet = TINY.sample(np.random.default_rng(1))
    config = dataclasses.replace(CONFIG, steps=1, warmup_steps=0, peak_rate=1e-7)
    inherited = run_training(
        tmp_path / "a", subnet=subnet, config=config,
        init_params=extract(params, subnet, TINY.hull()),
    )  # fmt: skip
    fresh = run_training(tmp_path / "b", subnet=subnet, config=config)
    evaluator = Evaluator(target, DATA.valid, CONFIG, 0)
    masked = evaluator.loss(parallel.replicate(params), subnet)
    # One step at a tiny rate: the loss is still the one with inherited weights.
    assert inherited[1, "valid/loss_subnet"] == pytest.approx(masked, abs=1e-3)
    assert fresh[1, "valid/loss_subnet"] != pytest.approx(masked, abs=1e-3)


def test_steps_must_come_out_even():
    with pytest.raises(UserError, match="batches_per_step is 6, not a multiple of the 4 devices"):
        micro_batches(dataclasses.replace(CONFIG, batches_per_step=6), 4)
