"""Experts that start from a trained model's."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import elastic_space, logits_of, random_params, standalone_of, token_batch

from automoe_jax.architecture.space import GATES
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.model.extract import extract
from automoe_jax.model.upcycle import upcycled
from automoe_jax.system.errors import UserError

SPACE = elastic_space(
    encoder_depths=(2,), decoder_depths=(1,), cross_spans=(1,), encoder_experts=(1, 2, 3, 4),
    decoder_experts=(1, 2, 3, 4), encoder_ffn_dims=(5, 9), decoder_ffn_dims=(5, 9),
)  # fmt: skip
SMALL, LARGE = SPACE.encoder_ffn_dims


def with_experts(subnet: Subnet, *experts, top_k=1) -> Subnet:
    """The subnet with these experts in each of its layers, encoder first; `top_k` a token."""
    own = iter(experts)

    def layer(old):
        sizes = next(own)
        return dataclasses.replace(old, experts=sizes, top_k=min(top_k, len(sizes)))

    def stack(old):
        return dataclasses.replace(old, layers=tuple(map(layer, old.layers)))

    return dataclasses.replace(subnet, encoder=stack(subnet.encoder), decoder=stack(subnet.decoder))


def weights(subnet: Subnet, seed: int):
    return extract(random_params(SPACE, seed), subnet, SPACE.hull())


DENSE = with_experts(SPACE.largest(), (SMALL,), (LARGE,), (SMALL,))
MIXTURE = with_experts(
    SPACE.largest(), (SMALL, LARGE, SMALL, SMALL), (LARGE, SMALL, 0), (LARGE, LARGE)
)


def test_every_expert_is_a_copy():
    trained, fresh = weights(DENSE, 0), weights(MIXTURE, 1)
    found = upcycled(trained, DENSE, MIXTURE, fresh, "normalised")
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, fresh)
    theirs, ours = trained["encoder"]["layer_0"]["experts"], found["encoder"]["layer_0"]["experts"]
    new = fresh["encoder"]["layer_0"]["experts"]
    np.testing.assert_array_equal(ours["fc1"][:SMALL], theirs["fc1"])
    second = slice(SMALL, SMALL + LARGE)  # the larger one: a copy, then new columns that do nothing
    np.testing.assert_array_equal(ours["fc1"][second][:SMALL], theirs["fc1"])
    np.testing.assert_array_equal(ours["fc1"][second][SMALL:], new["fc1"][second][SMALL:])
    np.testing.assert_array_equal(ours["fc2"][second][:SMALL], theirs["fc2"])
    assert not np.asarray(ours["fc2"][second][SMALL:]).any()
    np.testing.assert_array_equal(ours["router"], new["router"])
    theirs, ours = trained["encoder"]["layer_1"]["experts"], found["encoder"]["layer_1"]["experts"]
    np.testing.assert_array_equal(ours["fc1"][LARGE:], theirs["fc1"][:SMALL])
    for name in ("self_attention", "experts_norm"):
        jax.tree.map(
            np.testing.assert_array_equal,
            found["decoder"]["layer_0"][name], trained["decoder"]["layer_0"][name],
        )  # fmt: skip


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("gate", GATES)
def test_the_function_is_kept(gate, top_k):
    """With experts at least as large, and a router without preference, whatever the gate."""
    space = dataclasses.replace(SPACE, gate=gate, encoder_top_k=(1, 2), decoder_top_k=(1, 2))
    experts = (LARGE, SMALL), (LARGE,) * 4, (SMALL, LARGE, LARGE)
    mixture = with_experts(SPACE.largest(), *experts, top_k=top_k)
    trained, fresh = weights(DENSE, 0), weights(mixture, 1)
    for side in ("encoder", "decoder"):
        for layer in fresh[side].values():
            for name in ("router", "router_bias"):
                layer["experts"][name] = np.zeros_like(layer["experts"][name])
    found = upcycled(trained, DENSE, mixture, fresh, gate)
    batch = token_batch(np.random.default_rng(0))
    before, after = (
        logits_of(standalone_of(space, subnet), params, *batch)
        for subnet, params in ((DENSE, trained), (mixture, found))
    )
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max(), rtol=0)


def test_other_differences_are_refused():
    shallow = dataclasses.replace(
        DENSE, encoder=dataclasses.replace(DENSE.encoder, layers=DENSE.encoder.layers[:1])
    )
    with pytest.raises(UserError, match="encoder of the subnet differs"):
        upcycled(weights(DENSE, 0), DENSE, shallow, weights(shallow, 0), "probability")
