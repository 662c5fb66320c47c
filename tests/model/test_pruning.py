"""Which experts of a layer a smaller one keeps."""

import dataclasses

import numpy as np
import pytest
from conftest import elastic_space, logits_of, random_params, standalone_of, token_batch

from automoe_jax.model.extract import inherited
from automoe_jax.model.pruning import pruned, with_all_experts

SPACE = elastic_space(
    encoder_depths=(1,), decoder_depths=(1,), cross_spans=(1,), encoder_experts=(1, 2, 4),
    decoder_experts=(1, 2, 4), encoder_ffn_dims=(5, 9), decoder_ffn_dims=(5, 9),
)  # fmt: skip
SMALL, LARGE = SPACE.encoder_ffn_dims
FULL = with_all_experts(SPACE.smallest(), SPACE.hull())
LOADS = [np.array([0.1, 0.5, 0.0, 0.4]), np.array([0.0, 0.25, 0.75, 0.0])]
ENCODER = "encoder", "layer_0", "experts"


def with_experts(*experts):
    """The smallest subnet with these experts in the encoder's layer, and one in the decoder's."""
    layer = dataclasses.replace(FULL.encoder.layers[0], experts=experts)
    encoder = dataclasses.replace(FULL.encoder, layers=(layer,))
    layer = dataclasses.replace(FULL.decoder.layers[0], experts=(LARGE,))
    return dataclasses.replace(
        FULL, encoder=encoder, decoder=dataclasses.replace(FULL.decoder, layers=(layer,))
    )


def experts_of(params, side, layer, name):
    return params[side][layer][name]


@pytest.fixture(scope="module")
def weights():
    return inherited(random_params(SPACE, 0), FULL, SPACE)


def test_the_full_subnet_has_all_experts():
    assert [layer.experts for _, s in FULL.stacks for layer in s.layers] == [(LARGE,) * 4] * 2
    assert FULL.encoder.embed_dim == SPACE.smallest().encoder.embed_dim


def test_the_most_used_experts_are_kept(weights):
    """The larger one is the more used one, whatever their order in the subnet."""
    found = pruned(weights, FULL, with_experts(SMALL, LARGE), LOADS, merge=False)
    ours, theirs = experts_of(found, *ENCODER), experts_of(weights, *ENCODER)
    by_expert = theirs["fc1"].reshape(4, LARGE, -1)
    np.testing.assert_array_equal(ours["fc1"][:SMALL], by_expert[3, :SMALL])
    np.testing.assert_array_equal(ours["fc1"][SMALL:], by_expert[1])
    np.testing.assert_array_equal(ours["fc2_bias"], theirs["fc2_bias"][[3, 1]])
    np.testing.assert_array_equal(ours["router"], theirs["router"][:, [3, 1]])
    np.testing.assert_array_equal(ours["router_bias"], theirs["router_bias"][[3, 1]])
    alone = experts_of(found, "decoder", "layer_0", "experts")
    theirs = experts_of(weights, "decoder", "layer_0", "experts")
    np.testing.assert_array_equal(alone["fc1"], theirs["fc1"].reshape(4, LARGE, -1)[2])
    assert "router" not in alone


def test_others_are_merged_into_the_nearest(weights):
    """Averages by use; an expert that no token uses adds nothing."""
    given = dict(experts_of(weights, *ENCODER))
    router = np.asarray(given["router"]).copy()
    router[:, 0] = 3 * router[:, 3]  # the direction of expert 3
    router[:, 2] = router[:, 1]
    given["router"] = router
    params = {**weights, "encoder": {"layer_0": {**weights["encoder"]["layer_0"]}}}
    params["encoder"]["layer_0"]["experts"] = given
    found = pruned(params, FULL, with_experts(LARGE, LARGE), LOADS, merge=True)
    ours = experts_of(found, *ENCODER)
    for name in ("fc1", "fc1_bias", "fc2"):
        by_expert = np.asarray(given[name]).reshape(4, LARGE, -1)
        merged = np.asarray(ours[name]).reshape(2, LARGE, -1)
        np.testing.assert_array_equal(merged[0], by_expert[1])
        expected = (0.1 * by_expert[0] + 0.4 * by_expert[3]) / 0.5
        np.testing.assert_allclose(merged[1], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours["router"], router[:, [1, 3]])
    # All join the one that is kept: the mean by use.
    alone = experts_of(found, "decoder", "layer_0", "experts")
    theirs = np.asarray(experts_of(weights, "decoder", "layer_0", "experts")["fc2_bias"])
    np.testing.assert_allclose(
        alone["fc2_bias"][0], 0.25 * theirs[1] + 0.75 * theirs[2], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("merge", [False, True])
def test_all_experts_keep_the_function(weights, merge):
    same = pruned(weights, FULL, FULL, LOADS, merge=merge)
    batch = token_batch(np.random.default_rng(0))
    before, after = (
        logits_of(standalone_of(SPACE, FULL), params, *batch) for params in (weights, same)
    )
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
