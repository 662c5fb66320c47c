"""What choices of a space are worth, where the answer is known."""

import numpy as np
import pytest
from conftest import elastic_space

from automoe_jax.search import sensitivity

SPACE = elastic_space(
    encoder_embed_dims=(16,), encoder_depths=(2,), cross_spans=(1,), encoder_heads=(4,),
    decoder_self_heads=(4,), decoder_cross_heads=(4,), encoder_top_k=(1,), decoder_top_k=(1,),
    identity_experts=False,
)  # fmt: skip


def drawn(count: int):
    rng = np.random.default_rng(5)
    return [SPACE.sample(rng) for _ in range(count)]


def test_known_effects_are_found():
    """Loss and cost are linear in two choices, and noise: the others buy nothing."""
    subnets, rng = drawn(300), np.random.default_rng(6)
    depth = np.array([len(s.decoder.layers) for s in subnets])
    experts = np.array([len(s.encoder.layers[1].experts) for s in subnets])
    losses = 3.0 - 0.1 * depth - 0.02 * experts + rng.normal(0, 1e-3, 300)
    costs = 5.0 + 2.0 * depth + 0.5 * experts
    found = sensitivity.analyse(subnets, losses, costs)
    by_name = {w.choice: w for w in found.layers}
    assert found.layers[0].choice == "decoder depth"
    assert by_name["decoder depth"].loss == pytest.approx(-0.2, abs=2e-3)  # from 1 to 3 layers
    assert by_name["decoder depth"].cost == pytest.approx(4.0)
    assert by_name["decoder depth"].gain_per_cost == pytest.approx(0.05, rel=0.02)
    assert by_name["encoder 2: experts"].loss == pytest.approx(-0.04, abs=2e-3)
    variances = {"decoder depth": 0.01 * depth.var(), "encoder 2: experts": 4e-4 * experts.var()}
    for name, variance in variances.items():
        assert by_name[name].buys
        assert by_name[name].loss_share == pytest.approx(variance / losses.var(), abs=0.02)
    others = [w for name, w in by_name.items() if name not in variances]
    assert sum(w.buys for w in others) <= 2  # of 10, each in 2.5 % of cases
    assert all(abs(w.loss) < 2e-3 for w in others)
    assert all(w.gain_per_cost is None or abs(w.cost) < 1e-9 for w in others)
    assert found.loss_explained == pytest.approx(1, abs=0.01)
    assert found.cost_explained == pytest.approx(1)
    # By side, a layer's choice is a part of the mean.
    by_side = {w.choice: w for w in found.sides}
    assert by_side["encoder experts"].loss == pytest.approx(-0.04, abs=0.01)
    assert "encoder depth" not in by_side  # it does not vary


def test_effects_on_inherited_and_trained_losses():
    subnets = drawn(60)
    depth = np.array([len(s.decoder.layers) for s in subnets])
    experts = np.array([len(s.encoder.layers[0].experts) for s in subnets])
    both = experts + np.array([len(s.encoder.layers[1].experts) for s in subnets])
    inherited, trained = 3 - 0.1 * depth, 2 - 0.05 * depth - 0.02 * both
    found = {e.choice: e for e in sensitivity.effects(subnets, inherited, trained)}
    assert found["decoder depth"].inherited == pytest.approx(-0.2)
    assert found["decoder depth"].trained == pytest.approx(-0.1)
    span = both.max() - both.min()
    assert found["encoder experts"].inherited == pytest.approx(0, abs=1e-9)
    assert found["encoder experts"].trained == pytest.approx(-0.02 * span)
    assert next(iter(found)) in ("decoder depth", "encoder experts")
    # Without noise every draw says the same; with it the interval has the truth.
    assert found["decoder depth"].trained_95 == pytest.approx((-0.1, -0.1))
    noisy = trained + np.random.default_rng(1).normal(scale=0.02, size=len(trained))
    found = {e.choice: e for e in sensitivity.effects(subnets, inherited, noisy)}
    interval = found["decoder depth"].trained_95
    assert interval is not None
    low, high = interval
    assert low < -0.1 < high < 0
    assert low < found["decoder depth"].trained < high
    few = 3 * len(found)  # enough for the effects, too few for their intervals
    one, *_ = sensitivity.effects(subnets[:few], inherited[:few], noisy[:few])
    assert one.trained_95 is one.inherited_95 is None
    assert sensitivity.effects(subnets[:5], inherited[:5], trained[:5]) == []


def test_too_few_subnets():
    subnets = drawn(12)
    with pytest.raises(ValueError, match="12 subnets for 12 choices; 36 are needed"):
        sensitivity.analyse(subnets, range(12), range(12))
