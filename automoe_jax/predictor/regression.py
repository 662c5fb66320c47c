"""Regression for latencies: weighted, robust to outliers, with non-negative coefficients."""

import numpy as np
import scipy  # loads `scipy.optimize` at its first use

ROUNDS = 10
HUBER = 1.5  # standard deviations beyond which a residual loses weight
RIDGES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FOLDS = 5


def non_negative(x_NF: np.ndarray, y_N: np.ndarray, deviation_N: np.ndarray) -> np.ndarray:
    """Non-negative coefficients (F,) of latencies `y_N` on features `x_NF`.

    Weighted least squares with Huber weights and a ridge chosen by cross-validation. `deviation_N`
    are the standard deviations of the latencies.
    """
    ridge = 0.0
    if len(y_N) >= 2 * FOLDS:
        ridge = min(RIDGES, key=lambda r: _validation_error(x_NF, y_N, deviation_N, r))
    return _fit(x_NF, y_N, deviation_N, ridge)


def _validation_error(x_NF, y_N, deviation_N, ridge: float) -> float:
    """Mean absolute error over `FOLDS` folds, in deviations."""
    fold = np.arange(len(y_N)) % FOLDS
    errors = []
    for f in range(FOLDS):
        rest, own = fold != f, fold == f
        coefficients = _fit(x_NF[rest], y_N[rest], deviation_N[rest], ridge)
        errors.append(np.abs(x_NF[own] @ coefficients - y_N[own]) / deviation_N[own])
    return float(np.concatenate(errors).mean())


def _fit(x_NF, y_N, deviation_N, ridge: float) -> np.ndarray:
    scale_F = np.abs(x_NF).mean(axis=0)
    used = scale_F > 0
    x = x_NF[:, used] / scale_F[used] / deviation_N[:, None]
    y = y_N / deviation_N
    # Relative to the norm of the scaled features.
    penalty = ridge * np.linalg.norm(x) * np.eye(x.shape[1])
    weight_N = np.ones(len(y))
    solution = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        rows = np.vstack([x * weight_N[:, None], penalty])
        solution, _ = scipy.optimize.nnls(
            rows, np.concatenate([y * weight_N, np.zeros(len(penalty))])
        )
        weight_N = np.sqrt(huber(y - x @ solution))
    result = np.zeros(x_NF.shape[1])
    result[used] = solution / scale_F[used]
    return result


def huber(residual_N: np.ndarray) -> np.ndarray:
    """Huber weights: 1 within `HUBER` robust standard deviations, then inversely proportional."""
    deviation = max(1.4826 * float(np.median(np.abs(residual_N))), 1e-6)  # a perfect fit has 0
    return np.minimum(1, HUBER * deviation / np.maximum(np.abs(residual_N), 1e-12))


def least_squares(x_NF: np.ndarray, y_N: np.ndarray, deviation_N: np.ndarray) -> np.ndarray:
    """Weighted least squares with an intercept first, (F + 1,)."""
    x = np.column_stack([np.ones(len(y_N)), x_NF])
    scale = np.maximum(np.abs(x).max(axis=0), 1e-12)
    x, y = x / scale / deviation_N[:, None], y_N / deviation_N
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    return solution / scale
