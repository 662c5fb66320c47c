"""The best columns of a trained model in front, and a supernet that starts from it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    elastic_space,
    logits_of,
    random_params,
    standalone_of,
    supernet_of,
    token_batch,
)

from automoe_jax.architecture.active import to_active
from automoe_jax.model.extract import extract, inherited
from automoe_jax.model.importance import best_first, of_gradient
from automoe_jax.model.upcycle import supernet_started

SPACE = elastic_space(
    encoder_depths=(1, 2), decoder_depths=(1, 2), cross_spans=(1,), encoder_experts=(1, 2, 3),
    decoder_experts=(1, 2, 3), encoder_ffn_dims=(5, 9), decoder_ffn_dims=(5, 9),
    encoder_top_k=(1,), decoder_top_k=(1,),
)  # fmt: skip


def test_importance_of_a_column_is_its_first_order_change():
    """fc1 1x2, fc1_bias, fc2 1x2: (1*1 + 2*1 + 3*0 + 4*2 + 5*1)^2 and (6*1)^2."""
    weights = {
        "fc1": jnp.array([[1.0, 2], [6, 0]]),
        "fc1_bias": jnp.array([3.0, 0]),
        "fc2": jnp.array([[4.0, 5], [0, 7]]),
    }
    gradient = {
        "fc1": jnp.array([[1.0, 1], [1, 9]]),
        "fc1_bias": jnp.array([0.0, 5]),
        "fc2": jnp.array([[2.0, 1], [3, 0]]),
    }
    identity = {"router": jnp.ones((2, 2))}  # identity experts alone have no columns
    params, gradients = (
        {"encoder": {"layer_0": {"experts": own}}, "decoder": {"layer_0": {"experts": identity}}}
        for own in (weights, gradient)
    )
    found = of_gradient(params, gradients)
    np.testing.assert_allclose(found["encoder"]["layer_0"], [16.0**2, 6.0**2])
    assert found["decoder"] == {}


def sample(seed: int):
    """A random subnet with several experts of different sizes in a layer, and its weights."""
    rng = np.random.default_rng(seed)
    while True:
        subnet = SPACE.sample(rng)
        if any(len(set(layer.experts)) > 1 for _, s in subnet.stacks for layer in s.layers):
            return subnet, extract(random_params(SPACE, seed), subnet, SPACE.hull())


def logits(subnet, params):
    return logits_of(standalone_of(SPACE, subnet), params, *token_batch(np.random.default_rng(0)))


def columns(layer):
    """The number of FFN columns of a layer."""
    return sum(layer.experts)


def test_best_first_sorts_and_keeps_the_function():
    rng = np.random.default_rng(1)
    for seed in range(4):
        subnet, params = sample(seed)
        importance = {
            side: {
                f"layer_{i}": rng.random(columns(x))
                for i, x in enumerate(stack.layers)
                if columns(x)
            }
            for side, stack in subnet.stacks
        }
        found, ordered = best_first(params, subnet, importance)
        np.testing.assert_allclose(logits(ordered, found), logits(subnet, params), atol=1e-5)
        # A column's first weight tells which it is.
        side, name = "encoder", "layer_0"
        before, after = (p[side][name]["experts"] for p in (params, found))
        if "fc1" not in before:
            continue
        own = {
            float(w): x for w, x in zip(before["fc1"][:, 0], importance[side][name], strict=True)
        }
        sizes = np.cumsum([0, *ordered.encoder.layers[0].experts])
        by_expert = [
            [own[float(w)] for w in after["fc1"][a:b, 0]] for a, b in itertools.pairwise(sizes)
        ]
        assert all(x == sorted(x, reverse=True) for x in by_expert)
        totals = [sum(x) for x in by_expert]
        assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("sharing", ["front", "own", "means", "common"])
def test_a_supernet_starts_with_the_trained_function(sharing):
    """Of a dense model, whatever the sharing."""
    space = dataclasses.replace(SPACE, sharing=sharing)
    dense = space.smallest()
    assert dense.encoder.embed_dim < space.hull().encoder.embed_dim
    params = extract(random_params(SPACE, 3), dense, SPACE.hull())
    model, hull, batch = supernet_of(space), space.hull(), token_batch(np.random.default_rng(0))
    fresh = model.init(jax.random.key(0), *batch, to_active(hull, hull))["params"]
    found = supernet_started(params, dense, fresh, space)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, fresh)
    expected = logits(dense, params)
    ours = logits_of(model, found, *batch, to_active(dense, hull))
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    own = inherited(found, dense, space)
    np.testing.assert_allclose(logits(dense, own), expected, atol=2e-5)


def test_a_supernet_keeps_a_mixture_and_its_router():
    subnet = SPACE.largest()
    params = extract(random_params(SPACE, 5), subnet, SPACE.hull())
    fresh = supernet_of(SPACE).init(
        jax.random.key(0), *token_batch(np.random.default_rng(0)), to_active(subnet, SPACE.hull())
    )["params"]
    found = inherited(supernet_started(params, subnet, fresh, SPACE), subnet, SPACE)
    jax.tree.map(np.testing.assert_array_equal, found, params)
