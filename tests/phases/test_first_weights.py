"""What a supernet takes from a trained subnet, and a subnet from a supernet."""

import dataclasses

import jax
import numpy as np
import pytest

from automoe_jax.config import from_stored
from automoe_jax.model.extract import inherited
from automoe_jax.model.pruning import pruned, with_all_experts
from automoe_jax.phases import first_weights, teachers
from automoe_jax.phases.run import open_run
from automoe_jax.phases.train import train_subnet, train_supernet
from automoe_jax.phases.weights import subnet_params, supernet_params, target
from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Silent
from automoe_jax.training import loop
from automoe_jax.training.evaluation import Evaluator, take_pairs
from automoe_jax.training.importance import importance_of
from automoe_jax.training.routing import routing_of


def test_a_supernet_starts_from_a_trained_subnet(prepared, tmp_path, monkeypatch):
    """The subnet has its trained loss in the new supernet, and the manifest its origin."""
    run, data, supernet, _ = prepared
    training = dataclasses.replace(run.config.subnet_training, steps=2, warmup_steps=1)
    config = dataclasses.replace(run.config, subnet_training=training)
    first = dataclasses.replace(run, path=tmp_path / "first", config=config)
    second = dataclasses.replace(first, path=tmp_path / "second")
    dense = config.space.smallest()
    with pytest.raises(UserError, match="has no trained subnet for the supernet to start from"):
        train_supernet(second, run.path)
    train_subnet(first, dense)
    given = []
    monkeypatch.setattr(loop, "train", lambda *arguments: given.append(arguments))
    train_supernet(second, first.path)
    stored = workdir.read(second.supernet, "supernet")["config"]
    assert stored["init_from"] == str(first.path)
    # Its manifest can be read by who knows the workdir alone.
    assert from_stored(stored).training == config.training
    ours, params = given[0][0], given[0][7]
    assert ours == supernet
    trained, _, _ = subnet_params(first)

    def loss(model, weights):
        scorer = Evaluator(model, data.valid, config.training, 20)
        replicated = jax.tree.map(lambda x: np.stack([x] * jax.local_device_count()), weights)
        return scorer.loss(replicated, dense)

    alone = target(config, data.tokenizer.vocab_sizes, dense)
    assert loss(ours, params) == pytest.approx(loss(alone, trained), rel=1e-5)
    # Its best columns came first: they were not in this order before.
    pairs = first_weights._measured_on(data.train)
    own = inherited(params, dense, config.space)
    before, after = (importance_of(alone, x, pairs, config.training) for x in (trained, own))
    for side, layers in after.items():
        for name, found_F in layers.items():
            then_F = np.asarray(before[side][name])
            np.testing.assert_allclose(found_F, -np.sort(-then_F), rtol=1e-3, atol=1e-12)
            assert (np.diff(then_F) > 0).any()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param(
            {"final_weights": "average", "averaged_checkpoints": 2},
            "average of 2",
            marks=pytest.mark.slow,
        ),
        pytest.param({"final_weights": "ema"}, "ema", marks=pytest.mark.slow),
    ],
)
def test_what_others_take_are_the_final_weights(prepared, tmp_path, monkeypatch, fields, words):
    """Subnets and students of a supernet begin with its averaged weights, not with the last."""
    run, data, _, _ = prepared
    steps = {"steps": 3, "warmup_steps": 1, "checkpoint_every": 1, "keep_checkpoints": 2}
    training = dataclasses.replace(run.config.training, **steps, ema_decay=0.5, **fields)
    config = dataclasses.replace(run.config, training=training)
    first = open_run(config, tmp_path / "first", Silent())
    train_supernet(first)
    smallest, largest = config.space.smallest(), config.space.largest()

    def own(subnet, **other):
        kind = dataclasses.replace(config, training=dataclasses.replace(training, **other))
        source = dataclasses.replace(first, config=kind)
        params, _ = supernet_params(source, data.tokenizer.vocab_sizes)
        return inherited(params, subnet, config.space)

    given = []
    monkeypatch.setattr(loop, "train", lambda *arguments: given.append(arguments))
    second = dataclasses.replace(first, path=tmp_path / "second")
    train_subnet(second, smallest, first.path)
    jax.tree.map(np.testing.assert_array_equal, given[0][7], own(smallest))
    last = jax.tree.leaves(own(smallest, final_weights="last"))
    pairs = zip(jax.tree.leaves(own(smallest)), last, strict=True)
    assert any((ours != theirs).any() for ours, theirs in pairs)
    teacher = teachers.load(first.supernet, data.tokenizer, Silent())
    jax.tree.map(np.testing.assert_array_equal, teacher.params, own(largest))
    stored = workdir.read(second.path / "subnet", "subnet")["config"]
    assert stored["init_weights"] == words


@pytest.mark.parametrize("kind", ["used", "merged"])
def test_a_subnet_keeps_the_most_used_experts(prepared, tmp_path, monkeypatch, kind):
    """Loads are counted with all of the supernet's experts, on validation text."""
    run, data, supernet, params = prepared
    training = dataclasses.replace(run.config.subnet_training, inherited_experts=kind)
    config = dataclasses.replace(run.config, subnet_training=training)
    own = dataclasses.replace(run, path=tmp_path, config=config)
    monkeypatch.setattr(first_weights, "trained_folder", lambda source: "subnet")
    monkeypatch.setattr(first_weights, "latest_step", lambda folder: 1)
    monkeypatch.setattr(first_weights, "supernet_params", lambda *_: (params, 1))
    smallest = config.space.smallest()
    full = with_all_experts(smallest, config.space.hull())
    weights = inherited(params, full, config.space)
    alone = target(config, data.tokenizer.vocab_sizes, smallest)
    found = first_weights.of_subnet(own, alone, tmp_path / "subnet", data)
    pairs = take_pairs(data.valid, np.arange(min(1000, len(data.valid))))
    routings = routing_of(dataclasses.replace(supernet, subnet=full), weights, pairs, training)
    loads = [routing.load_E for routing in routings]
    expected = pruned(weights, full, smallest, loads, merge=kind == "merged")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if kind == "merged":
        return
    # The only expert of the encoder's layer is the one that most tokens go to.
    routing = routings[0]
    used = np.bincount(routing.expert_N, minlength=len(routing.sizes)).argmax()
    theirs = weights["encoder"]["layer_0"]["experts"]["fc1"]
    theirs = theirs.reshape(len(routing.sizes), -1, theirs.shape[-1])[used]
    ours = found["encoder"]["layer_0"]["experts"]["fc1"]
    np.testing.assert_array_equal(ours, theirs[: len(ours)])
