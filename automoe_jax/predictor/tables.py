"""Latency models fitted to tables in the format that HAT publishes (CSV, one subnet per row)."""

import csv
from pathlib import Path

import numpy as np

from automoe_jax.predictor import features, regression
from automoe_jax.predictor.model import AVERAGES, LatencyModel
from automoe_jax.predictor.scores import Agreement, agreement
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

LATENCIES = ("latency_mean_encoder", "latency_mean_decoder")
MOST_TESTED = 0.5


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 10) in `features.AVERAGES`' order, and latencies (N,) in ms.

    `UserError` if a column is missing or a cell is not a positive number.
    """
    rows = list(csv.DictReader(files.lines(files.read_text(path, "table of latencies"))))
    columns = (*features.AVERAGES, *LATENCIES)
    missing = [c for c in columns if not rows or c not in rows[0]]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; HAT's tables have it")

    def cell(line: int, row: dict[str, str], column: str) -> float:
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = float("nan")
        if not 0 < value < float("inf"):
            raise UserError(
                f"{path}, line {line}: {column} is {row[column]!r}; a number above 0 is needed"
            )
        return value

    table = np.array([[cell(i, row, c) for c in columns] for i, row in enumerate(rows, 2)])
    return table[:, : len(features.AVERAGES)], table[:, len(features.AVERAGES) :].sum(axis=1)


def fit(path: str | Path, seed: int = 0, held_out: float = 0.2) -> tuple[LatencyModel, Agreement]:
    """A model of a table, and the error of ordinary least squares on the same held-out rows.

    `held_out` is the share of those rows, `seed` that of the split. `UserError` if the table cannot
    be read or has too few rows.
    """
    if not 0 < held_out <= MOST_TESTED:
        raise UserError(f"held_out is {held_out}; allowed: above 0 up to {MOST_TESTED}")
    x_NF, y_N = read(path)
    order = np.random.default_rng(seed).permutation(len(y_N))
    cut = len(y_N) - round(held_out * len(y_N))
    train, test = order[:cut], order[cut:]
    wide_NF = features.products(x_NF)
    if cut <= wide_NF.shape[1] or not len(test):
        raise UserError(
            f"{path} has {len(y_N)} rows; more than {2 * wide_NF.shape[1]} are needed to fit it"
        )
    # Noise grows with the square root of the latency.
    deviation = np.sqrt(y_N[train])
    own = regression.least_squares(wide_NF[train], y_N[train], deviation)
    ordinary = regression.least_squares(x_NF[train], y_N[train], np.ones(len(train)))
    names = ("intercept", *features.PRODUCTS)
    model = LatencyModel(
        kind=AVERAGES,
        coefficients=dict(zip(names, own.tolist(), strict=True)),
        task=None,
        made_for={"table": Path(path).name},
        error=agreement(own[0] + wide_NF[test] @ own[1:], y_N[test]),
        fitted=len(train),
        reference=None,
    )
    return model, agreement(ordinary[0] + x_NF[test] @ ordinary[1:], y_N[test])
