"""Experts that numbers of experts share, and gates, on hand-made cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, elastic_space, random_params, supernet_of

from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.stack_space import SpaceError
from automoe_jax.model.experts import route
from automoe_jax.model.sharing import Sharing
from automoe_jax.model.stacked import FLAT
from automoe_jax.training.config import ModelConfig, TrainingConfig
from automoe_jax.training.target import TrainingTarget, initial_state

HALF, THIRD = 1 / 2, 1 / 3
COMBINATIONS = {
    ("front", 2): [[1, 0, 0], [0, 1, 0]],
    # Stored: the one alone, then two, then three.
    ("own", 1): [[1, 0, 0, 0, 0, 0]],
    ("own", 2): [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]],
    ("own", 3): [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]],
    ("means", 1): [[THIRD, THIRD, THIRD]],
    ("means", 2): [[HALF, HALF, 0], [0, 0, 1]],
    ("means", 3): [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    # Stored: the common one, then the differences of two, then those of three.
    ("common", 1): [[1, 0, 0, 0, 0, 0]],
    ("common", 2): [[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]],
    ("common", 3): [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]],
}


@pytest.mark.parametrize(("kind", "n"), COMBINATIONS)
def test_combinations(kind, n):
    np.testing.assert_allclose(Sharing(kind, (1, 2, 3)).combination(n), COMBINATIONS[kind, n])


def small_space(**changes):
    return elastic_space(
        encoder_depths=(2,), decoder_depths=(1,), cross_spans=(1,), encoder_experts=(1, 2),
        decoder_experts=(1, 2), identity_experts=False, encoder_top_k=(1,), **changes,
    )  # fmt: skip


def first_experts(space, side="encoder"):
    """fc1 of a new supernet, (layers, stored experts, weights)."""
    hull, ids = space.hull(), np.full((1, 2), 4, np.int32)
    params = supernet_of(space).init(jax.random.key(0), ids, ids, to_active(hull, hull))["params"]
    fc1 = params[side]["layers"]["experts"]["fc1"]
    return np.asarray(fc1).reshape(2, Sharing(space.sharing, (1, 2)).stored, -1)


def test_combined_experts_start_alike():
    means = first_experts(small_space(sharing="means"))
    np.testing.assert_array_equal(means[:, 0], means[:, 1])
    common = first_experts(small_space(sharing="common"))
    assert common.shape[1] == 3
    assert not common[:, 1:].any()
    assert (np.abs(common[:, 0]) > 0).all()
    own = first_experts(small_space(sharing="own"))
    assert own.shape[1] == 3
    assert (own[:, 0] != own[:, 1]).all()


def test_a_subnet_from_scratch_shares_nothing():
    space = small_space()
    target = TrainingTarget(space, (VOCAB, VOCAB), ModelConfig(), space.largest())
    shared = dataclasses.replace(target, space=dataclasses.replace(space, sharing="means"))
    states = [initial_state(t, TrainingConfig(), 0).params for t in (target, shared)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_sharing_needs_equal_layers():
    with pytest.raises(SpaceError, match="encoder_placement"):
        small_space(sharing="own", encoder_placement=(1, 2))


LOGITS = np.log([[0.6, 0.3, 0.1]]).astype(np.float32)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("probability", [0.6, 0.3]),
        ("count", [1.8, 0.9]),
        ("normalised", [0.6 / 0.9, 0.3 / 0.9]),
    ],
)
def test_gates(gate, expected):
    found = route(LOGITS, np.ones(1, bool), 2, gate, None).gate_NK
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_gate_of_one_expert_has_a_value_of_one_and_the_gradient_of_p():
    def gate(logits):
        return route(logits, np.ones(1, bool), 1, "normalised", None).gate_NK[0, 0]

    value, gradient = jax.value_and_grad(gate)(jnp.asarray(LOGITS))
    assert float(value) == 1
    # Of p_0: p_0 (1 - p_0), -p_0 p_1, -p_0 p_2; all over a constant p_0.
    np.testing.assert_allclose(gradient, [[0.4, -0.3, -0.1]], rtol=1e-5)


def test_any_experts_equal_the_first_of_a_supernet_in_another_order():
    """A layer with experts drawn at random is one with these in front."""
    space = small_space()
    space = dataclasses.replace(space, encoder_experts=(1, 2, 3, 4), decoder_experts=(1, 2, 3, 4))
    hull, rng = space.hull(), np.random.default_rng(0)
    params, model = jax.tree.map(jnp.asarray, random_params(space)), supernet_of(space)
    ids = np.random.default_rng(1).integers(4, VOCAB, (3, 5)).astype(np.int32)
    apply = jax.jit(lambda p, active: model.apply({"params": p}, ids, ids, active).logits_BTV)
    taken = []
    for _ in range(6):
        subnet = space.sample(rng)
        active = to_active(subnet, hull, rng)
        moved = {**params}
        for side, stack in (("encoder", active.encoder), ("decoder", active.decoder)):
            # The experts that are taken, in their order, then the others.
            order_LE = np.argsort(~stack.taken_LE, axis=1, kind="stable")
            moved[side] = {"layers": reordered(params[side]["layers"], order_LE)}
            taken += [tuple(row) for row in stack.taken_LE[: stack.depth]]
        np.testing.assert_allclose(
            apply(params, active), apply(moved, to_active(subnet, hull)), atol=2e-5
        )
    assert len(set(taken)) > 4  # not the front ones alone


def reordered(layers, order_LE):
    """A stack's weights with the experts of each layer in another order."""
    experts, out = layers["experts"], {}
    for name in FLAT:
        own_LEX = experts[name].reshape(*order_LE.shape, -1)
        moved_LEX = jnp.take_along_axis(own_LEX, order_LE[..., None], axis=1)
        out[name] = moved_LEX.reshape(experts[name].shape)
    out["router"] = jnp.take_along_axis(experts["router"], order_LE[:, None], axis=2)
    out["router_bias"] = jnp.take_along_axis(experts["router_bias"], order_LE, axis=1)
    return {**layers, "experts": out}
