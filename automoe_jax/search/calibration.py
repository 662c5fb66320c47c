"""Inherited losses, corrected by subnets that were trained from scratch.

A supernet misjudges some choices of its space for all subnets alike: it may hold a wide FFN for
hardly better than a narrow one, or a wide decoder for better than it trains; and its losses may be
further apart than trained ones. A ridge regression (Hoerl & Kennard 1970) of trained less inherited
losses on the choices of both sides and on the inherited loss says by how much. Letters: N subnets,
F features.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.search.sensitivity import side_features, varying

FEWEST = 8  # trained subnets
_LOSS = "inherited loss"
_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, np.inf)  # of squared slopes, standardised choices


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A correction of inherited losses, linear in the choices of both sides and in the loss.

    Attributes:
      names: of the F features: choices as `side_features` has them, and the inherited loss.
      slope_F: nats a token for a unit of each feature.
      offset: nats a token where all features are 0.
      lowest_F, highest_F: of the trained subnets; beyond them a choice counts as at the end. A loss
        has no end.
    """

    names: tuple[str, ...]
    slope_F: np.ndarray
    offset: float
    lowest_F: np.ndarray
    highest_F: np.ndarray

    def correct(self, subnets: Sequence[Subnet], losses: Sequence[float]) -> list[float]:
        """What training from scratch would make of inherited `losses`, nats a token."""
        if not subnets:
            return []
        columns = {**side_features(subnets), _LOSS: np.asarray(losses, float)}
        x_NF = _matrix([columns[name] for name in self.names], len(subnets))
        x_NF = x_NF.clip(self.lowest_F, self.highest_F)
        return (np.asarray(losses, float) + self.offset + x_NF @ self.slope_F).tolist()


def fit(
    subnets: Sequence[Subnet], inherited: Sequence[float], trained: Sequence[float]
) -> Calibration:
    """A correction by leave-one-out errors; `ValueError` for less than `FEWEST` subnets.

    The largest penalty whose error is at most one standard error above the least one (Breiman et
    al. 1984): where choices explain little of the differences, the correction is near a constant.
    """
    if len(subnets) < FEWEST:
        raise ValueError(f"{len(subnets)} subnets; at least {FEWEST} are needed")
    y_N = np.asarray(trained, float) - np.asarray(inherited, float)
    columns = varying({**side_features(subnets), _LOSS: np.asarray(inherited, float)})
    x_NF = _matrix(list(columns.values()), len(subnets))
    mean_F, scale_F = x_NF.mean(axis=0), x_NF.std(axis=0)
    z_NF = (x_NF - mean_F) / scale_F
    penalties = [x for x in _PENALTIES if columns or np.isinf(x)]
    found = [_left_out(z_NF, y_N, penalty) for penalty in penalties]
    squares_N = min((errors_N**2 for errors_N, _ in found), key=np.mean)
    enough = squares_N.mean() + squares_N.std(ddof=1) / np.sqrt(len(y_N))
    slope_F = [own_F for errors_N, own_F in found if np.mean(errors_N**2) <= enough][-1] / scale_F
    ends = np.where(np.array(list(columns)) == _LOSS, np.inf, 0.0)
    lowest_F, highest_F = x_NF.min(axis=0) - ends, x_NF.max(axis=0) + ends
    offset = float(y_N.mean() - mean_F @ slope_F)
    return Calibration(tuple(columns), slope_F, offset, lowest_F, highest_F)


def _matrix(columns: list[np.ndarray], count: int) -> np.ndarray:
    """Columns side by side, (N, F), also where there are none."""
    return np.array(columns).reshape(-1, count).T


def _left_out(z_NF: np.ndarray, y_N: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Errors of a ridge regression for each subnet when it is fitted to the others, and slopes.

    `z_NF` has column means of 0. The errors follow from the diagonal of the hat matrix. With an
    infinite penalty all slopes are 0.
    """
    count, features = z_NF.shape
    if np.isinf(penalty):
        inverse_FN = np.zeros((features, count))
    else:
        inverse_FN = np.linalg.solve(z_NF.T @ z_NF + penalty * np.eye(features), z_NF.T)
    slope_F = inverse_FN @ (y_N - y_N.mean())
    residual_N = y_N - y_N.mean() - z_NF @ slope_F
    leverage_N = 1 / count + np.einsum("nf,fn->n", z_NF, inverse_FN)
    return residual_N / (1 - leverage_N), slope_F


def left_out(
    subnets: Sequence[Subnet], inherited: Sequence[float], trained: Sequence[float]
) -> list[float]:
    """The loss of each subnet, corrected by all others; `ValueError` as `fit`, of the others.

    As a search has one constant for all subnets, each correction is taken less its mean over all.
    """
    corrected = []
    for i in range(len(subnets)):
        before, after = slice(i), slice(i + 1, None)
        own = fit(
            [*subnets[before], *subnets[after]],
            [*inherited[before], *inherited[after]],
            [*trained[before], *trained[after]],
        )
        found = np.array(own.correct(subnets, inherited))
        corrected.append(float(found[i] - np.mean(found - np.asarray(inherited))))
    return corrected
