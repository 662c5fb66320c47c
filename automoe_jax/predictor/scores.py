"""Agreement of predictions with measurements."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy  # loads `scipy.stats` at its first use


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of `count` predictions with measurements."""

    count: int
    mape: float  # mean absolute percentage error
    worst: float  # largest absolute percentage error
    rmse: float  # in the unit of the values
    tau: float | None  # Kendall's rank correlation; None if a list has only one value


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's rank correlation; NaN if all values of a list are equal."""
    result: Any = scipy.stats.kendalltau(a, b)
    return float(result.statistic)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; NaN if all values of a list are equal."""
    if not np.ptp(a) or not np.ptp(b):
        return float("nan")
    result: Any = scipy.stats.spearmanr(a, b)
    return float(result.statistic)


def agreement(predicted: npt.ArrayLike, measured: npt.ArrayLike) -> Agreement:
    """Compares two lists of the same length."""
    p, m = np.asarray(predicted, float), np.asarray(measured, float)
    percent = 100 * np.abs(p - m) / m
    tau = kendall(p, m) if len(m) > 1 else float("nan")
    return Agreement(
        count=len(m),
        mape=float(percent.mean()),
        worst=float(percent.max()),
        rmse=float(np.sqrt(((p - m) ** 2).mean())),
        tau=None if np.isnan(tau) else tau,
    )
