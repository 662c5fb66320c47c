"""The routers' part of the loss, on hand-made cases."""

import jax.numpy as jnp
import pytest
from conftest import VOCAB, elastic_space

from automoe_jax.model.experts import RouterLosses
from automoe_jax.model.seq2seq import Output
from automoe_jax.system.errors import UserError
from automoe_jax.training.config import ModelConfig, SamplingConfig, TrainingConfig
from automoe_jax.training.step import RouterWeights, router_loss
from automoe_jax.training.steps import _balance_weights, mapped_step
from automoe_jax.training.target import TrainingTarget


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (RouterWeights(), 0.1 * (1.5 + 2 + 1) / 3),
        (RouterWeights(z=0.5), 0.1 * (1.5 + 2 + 1) / 3 + 0.5 * (4 + 9) / 3),
        (RouterWeights(load_balance_L=(0.1, 0.0, 0.2)), 0.1 * 1.5 + 0.2 * 1),
    ],
)
def test_losses_of_routers_by_hand(weights, expected):
    losses = RouterLosses(jnp.asarray([1.5, 2.0, 1.0]), jnp.asarray([4.0, 9.0, 0.0]))
    none = jnp.zeros(())
    output = Output(none, none, losses, 3, [], [], [])
    assert float(router_loss(output, 0.1, weights)) == pytest.approx(expected, rel=1e-6)


def test_a_side_needs_a_weight_for_each_layer():
    space = elastic_space()
    n = len(space.hull().decoder.layers)
    of_encoder = (0.1,) * len(space.hull().encoder.layers)
    target = TrainingTarget(space, (VOCAB, VOCAB), ModelConfig())
    config = TrainingConfig(encoder_load_balance=of_encoder, decoder_load_balance=(0.1,) * (n - 1))
    with pytest.raises(UserError, match=rf"decoder_load_balance has {n - 1} weights"):
        mapped_step(target, config, SamplingConfig())
    # Nothing would balance the other side.
    config = TrainingConfig(encoder_load_balance=of_encoder)
    with pytest.raises(UserError, match="but decoder_load_balance has none; give one for each"):
        mapped_step(target, config, SamplingConfig())


def test_weights_are_those_of_the_layers_in_their_order():
    """Encoder first; a subnet takes those of the layers that it has."""
    space = elastic_space(encoder_depths=(1, 2), decoder_depths=(1, 2), cross_spans=(1,))
    config = TrainingConfig(encoder_load_balance=(0.1, 0.2), decoder_load_balance=(0.3, 0.4))
    target = TrainingTarget(space, (VOCAB, VOCAB), ModelConfig())
    assert _balance_weights(target, config) == (0.1, 0.2, 0.3, 0.4)
    alone = TrainingTarget(space, (VOCAB, VOCAB), ModelConfig(), space.smallest())
    assert _balance_weights(alone, config) == (0.1, 0.3)
    assert _balance_weights(target, TrainingConfig()) == ()
    with pytest.raises(UserError, match=r"decoder_load_balance is \(-0.1,\); allowed: 0 or more"):
        TrainingConfig(encoder_load_balance=(0.1,), decoder_load_balance=(-0.1,))
