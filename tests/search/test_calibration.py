"""Corrections of inherited losses, where it is known what the supernet misjudges."""

import dataclasses

import numpy as np
import pytest
from conftest import elastic_space

from automoe_jax.search import calibration

SPACE = elastic_space(
    encoder_embed_dims=(16,), encoder_depths=(2,), cross_spans=(1,), encoder_heads=(4,),
    decoder_self_heads=(4,), decoder_cross_heads=(4,), encoder_top_k=(1,), decoder_top_k=(1,),
    identity_experts=False,
)  # fmt: skip


def drawn(count: int, seed: int):
    rng = np.random.default_rng(seed)
    return [SPACE.sample(rng) for _ in range(count)]


def depth(subnets) -> np.ndarray:
    return np.array([len(s.decoder.layers) for s in subnets])


def size(subnets) -> np.ndarray:
    """The mean over the decoder's layers of the mean FFN size."""
    return np.array([np.mean([np.mean(x.experts) for x in s.decoder.layers]) for s in subnets])


def misjudged(subnets, noise: float, seed: int):
    """Inherited losses blind to FFN sizes, and trained ones that fall with depth and size."""
    trained = 4.0 - 0.1 * depth(subnets) - 0.01 * size(subnets)
    rng = np.random.default_rng(seed)
    inherited = 4.3 - 0.08 * depth(subnets) + rng.normal(0, noise, len(subnets))
    return inherited, trained


def test_what_a_supernet_misjudges_is_corrected():
    subnets, others = drawn(24, 5), drawn(200, 6)
    own = calibration.fit(subnets, *misjudged(subnets, 0.004, 7))
    inherited, trained = misjudged(others, 0.004, 8)
    off = np.std(inherited - trained)
    assert off > 0.015
    assert np.std(own.correct(others, inherited) - trained) < off / 2
    assert np.mean(own.correct(others, inherited)) == pytest.approx(trained.mean(), abs=0.005)


def test_losses_that_are_too_far_apart_are_brought_together():
    """A supernet whose differences are three times those of training, whatever the choice."""
    subnets, others = drawn(24, 5), drawn(200, 6)

    def losses(subnets, seed):
        rng = np.random.default_rng(seed)  # what no choice of a side says
        trained = 2.0 - 0.1 * depth(subnets) + rng.normal(0, 0.02, len(subnets))
        return 3.5 + 3 * (trained - 2.0), trained

    own = calibration.fit(subnets, *losses(subnets, 1))
    inherited, trained = losses(others, 2)
    assert np.std(own.correct(others, inherited) - trained) < 0.2 * np.std(inherited - trained)


def test_nothing_is_learned_from_noise():
    """Differences that no choice explains: the correction is near the same for all."""
    subnets, others = drawn(24, 5), drawn(200, 6)
    inherited = 4.3 - 0.1 * depth(subnets)
    trained = inherited - 0.3 + np.random.default_rng(9).normal(0, 0.01, 24)
    own = calibration.fit(subnets, inherited, trained)
    losses = 4.3 - 0.1 * depth(others)
    assert np.std(own.correct(others, losses) - losses) < 0.005
    same = calibration.fit(subnets, inherited, inherited - 0.3)
    assert same.correct(others, losses) == pytest.approx(losses - 0.3)
    alike = calibration.fit(subnets[:1] * 8, np.full(8, 2.5), np.full(8, 2.0))
    assert alike.correct(others, losses) == pytest.approx(losses - 0.5)


@pytest.mark.parametrize("penalty", [0.3, 10.0, np.inf])
def test_left_out_errors_are_those_of_fits_without_the_subnet(penalty):
    rng = np.random.default_rng(3)
    z_NF, y_N = rng.normal(size=(12, 4)), rng.normal(size=12)
    z_NF -= z_NF.mean(axis=0)
    found, _ = calibration._left_out(z_NF, y_N, penalty)
    errors = []
    for i in range(12):
        rest = np.arange(12) != i
        mean, slope_F = y_N[rest].mean(), np.zeros(4)
        if np.isfinite(penalty):
            # Least squares with the penalty as further rows; the constant is not penalised.
            x = np.column_stack([np.ones(11), z_NF[rest]])
            more = np.sqrt(penalty) * np.eye(5)[1:]
            solved, *_ = np.linalg.lstsq(
                np.vstack([x, more]), np.append(y_N[rest], np.zeros(4)), rcond=None
            )
            mean, slope_F = solved[0], solved[1:]
        errors.append(y_N[i] - mean - z_NF[i] @ slope_F)
    np.testing.assert_allclose(found, errors)


def test_choices_beyond_those_of_the_trained_subnets():
    subnets = [s for s in drawn(60, 5) if len(s.decoder.layers) < 3]
    own = calibration.fit(subnets, *misjudged(subnets, 0.001, 7))
    deepest = max(drawn(60, 6), key=lambda s: len(s.decoder.layers))
    assert len(deepest.decoder.layers) == 3
    two = dataclasses.replace(deepest.decoder, layers=deepest.decoder.layers[:2])
    means = calibration.side_features([deepest])
    at = own.names.index("decoder depth")
    assert means["decoder depth"] > own.highest_F[at] == 2
    values = [means[name][0] if name in means else 9.0 for name in own.names]
    x_F = np.array(values).clip(own.lowest_F, own.highest_F)
    assert own.correct([deepest], [9.0]) == pytest.approx([9 + own.offset + x_F @ own.slope_F])
    assert x_F[own.names.index("inherited loss")] == 9.0  # whatever the others had
    assert x_F[at] == len(two.layers)


def test_each_is_left_out():
    subnets = drawn(16, 5)
    inherited, trained = misjudged(subnets, 0.001, 7)
    corrected = calibration.left_out(subnets, inherited, trained)
    own = calibration.fit(subnets[1:], inherited[1:], trained[1:])
    all_of_them = np.array(own.correct(subnets, inherited))
    assert corrected[0] == pytest.approx(all_of_them[0] - np.mean(all_of_them - inherited))
    assert np.std(corrected - trained) < np.std(inherited - trained) / 2
    # A constant, which changes no rank, changes nothing here.
    noise = np.random.default_rng(9).choice([-0.01, 0.01], 16)
    same = calibration.left_out(subnets[:1] * 16, trained + noise, trained)
    np.testing.assert_allclose(same, trained + noise)


def test_too_few_subnets():
    subnets = drawn(7, 5)
    with pytest.raises(ValueError, match="7 subnets; at least 8 are needed"):
        calibration.fit(subnets, np.ones(7), np.ones(7))
