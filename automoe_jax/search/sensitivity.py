"""What each choice of a space is worth: its share of the loss and the cost of scored subnets.

Linear models of loss and cost, with one feature per choice of a side or of one of its layers.
Letters: N subnets, F features.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from automoe_jax.architecture.subnet import LayerSpec, Subnet

RESAMPLES = 500  # of the bootstrap
FEWEST = 3  # subnets for each feature
FEWEST_INTERVAL = 4  # for intervals of effects: with fewer, draws leave choices undetermined
FEWEST_PAIRED = 2  # where two losses of the same subnets are compared: draws are common to both
# What a layer chooses: fields of the layer, and what is called by another name.
_FIELDS = {
    "heads": "heads", "self_heads": "self-attention heads", "cross_heads": "cross-attention heads",
    "cross_span": "cross-attention span", "top_k": "experts per token",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Worth:
    """What a choice explains, and what it changes from its lowest to its highest value.

    Shares are of the variance over the subnets, in the linear model; together they give its R^2.
    """

    choice: str
    low: float
    high: float
    loss: float  # nats a token, and the 95 % interval (bootstrap)
    loss_low: float
    loss_high: float
    loss_share: float
    cost: float
    cost_share: float

    @property
    def gain_per_cost(self) -> float | None:
        """Nats gained for a unit of cost; None where it costs nothing."""
        return -self.loss / self.cost if self.cost > 0 else None

    @property
    def buys(self) -> bool:
        """Whether more of it lowers the loss, by the interval."""
        return self.loss_high < 0


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What all choices of a space are worth."""

    sides: tuple[Worth, ...]  # by side: the same choice in all layers together
    layers: tuple[Worth, ...]  # by layer
    loss_explained: float  # R^2 of the model by layer
    cost_explained: float
    subnets: int


def analyse(subnets: Sequence[Subnet], losses: Sequence[float], costs: Sequence[float]):
    """`Sensitivity` of subnets that are best drawn independently from their space.

    `losses` are inherited ones, in nats a token, `costs` in any unit. Choices that do not vary are
    left out. `ValueError` if there are fewer than `FEWEST` subnets for each that does.
    """
    y_N, c_N = np.asarray(losses, float), np.asarray(costs, float)
    tables = [varying(table(subnets)) for table in (side_features, layer_features)]
    most = max(len(columns) for columns in tables)
    if len(subnets) < FEWEST * most or not most:
        raise ValueError(f"{len(subnets)} subnets for {most} choices; {FEWEST * most} are needed")
    sides, layers = (_worths(columns, y_N, c_N) for columns in tables)
    return Sensitivity(
        tuple(sides), tuple(layers), sum(w.loss_share for w in layers),
        sum(w.cost_share for w in layers), len(subnets),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a choice changes from its lowest to its highest value, nats a token.

    With 95 % intervals by a bootstrap over the subnets; None where these are fewer than
    `FEWEST_INTERVAL` for each choice.
    """

    choice: str
    inherited: float
    inherited_95: tuple[float, float] | None
    trained: float
    trained_95: tuple[float, float] | None


def effects(
    subnets: Sequence[Subnet], inherited: Sequence[float], trained: Sequence[float]
) -> list[Effect]:
    """The effect of each choice of a side on both losses of the same subnets, largest first.

    Empty where there are fewer subnets than `fewest_paired`.
    """
    columns = varying(side_features(subnets))
    if not columns or len(subnets) < FEWEST_PAIRED * len(columns):
        return []
    x_NF = np.stack(list(columns.values()), axis=1)
    span_F = x_NF.max(axis=0) - x_NF.min(axis=0)
    enough = len(subnets) >= FEWEST_INTERVAL * len(columns)
    found = []
    for losses in (inherited, trained):
        y_N = np.asarray(losses, float)
        found.append((_fit(x_NF, y_N)[0] * span_F).tolist())
        found.append(_intervals(x_NF, y_N) if enough else [None] * len(columns))
    rows = zip(columns, *found, strict=True)
    return sorted((Effect(*row) for row in rows), key=lambda effect: -abs(effect.trained))


def _intervals(x_NF: np.ndarray, y_N: np.ndarray) -> list[tuple[float, float]]:
    """The 95 % interval of what each feature changes over its range (bootstrap)."""
    span_F = x_NF.max(axis=0) - x_NF.min(axis=0)
    draws = np.random.default_rng(0).integers(len(y_N), size=(RESAMPLES, len(y_N)))
    drawn_RF = np.stack([_fit(x_NF[rows], y_N[rows])[0] for rows in draws]) * span_F
    low_F, high_F = np.quantile(drawn_RF, [0.025, 0.975], axis=0).tolist()
    return list(zip(low_F, high_F, strict=True))


def fewest_paired(subnets: Sequence[Subnet]) -> int:
    """How many subnets `effects` needs for the choices that vary among these."""
    return FEWEST_PAIRED * len(varying(side_features(subnets)))


Columns = dict[str, np.ndarray]  # (N,) by name of the choice; NaN where a subnet lacks the layer


def side_features(subnets: Sequence[Subnet]) -> Columns:
    """Width and depth of each side, and the mean over its layers of everything else."""

    def means(side: str, layers: list[dict[str, float]]) -> dict[str, float]:
        return {f"{side} {name}": float(np.mean([x[name] for x in layers])) for name in layers[0]}

    return _columns(subnets, means)


def layer_features(subnets: Sequence[Subnet]) -> Columns:
    """Width and depth of each side, and everything else of each layer."""

    def each(side: str, layers: list[dict[str, float]]) -> dict[str, float]:
        return {f"{side} {i}: {k}": v for i, x in enumerate(layers, 1) for k, v in x.items()}

    return _columns(subnets, each)


def _columns(
    subnets: Sequence[Subnet],
    of_layers: Callable[[str, list[dict[str, float]]], dict[str, float]],
) -> Columns:
    """Width and depth of each side, and what `of_layers` makes of its layers' features."""
    rows = []
    for subnet in subnets:
        row: dict[str, float] = {}
        for side, stack in subnet.stacks:
            row |= {f"{side} width": stack.embed_dim, f"{side} depth": len(stack.layers)}
            row |= of_layers(side, list(map(_layer_features, stack.layers)))
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}


def _layer_features(layer: LayerSpec) -> dict[str, float]:
    found = {
        name: float(getattr(layer, field))
        for field, name in _FIELDS.items()
        if hasattr(layer, field)
    }
    return {**found, "experts": len(layer.experts), "FFN size": float(np.mean(layer.experts))}


def varying(columns: Columns) -> Columns:
    """Those that are not the same for all subnets."""
    return {name: x for name, x in columns.items() if np.nanmin(x) < np.nanmax(x)}


def _worths(columns: Columns, y_N: np.ndarray, c_N: np.ndarray) -> list[Worth]:
    """Sorted by their share of the loss."""
    # A layer that a subnet lacks has no effect but that of depth: the mean of those that have it.
    x_NF = np.stack([np.where(np.isnan(x), np.nanmean(x), x) for x in columns.values()], axis=1)
    span_F = x_NF.max(axis=0) - x_NF.min(axis=0)
    slope_F, share_F = _fit(x_NF, y_N)
    interval_F = _intervals(x_NF, y_N)
    cost_slope_F, cost_share_F = _fit(x_NF, c_N)
    worths = [
        Worth(
            name, float(x_NF[:, f].min()), float(x_NF[:, f].max()), float(slope_F[f] * span_F[f]),
            *interval_F[f], float(share_F[f]),
            float(cost_slope_F[f] * span_F[f]), float(cost_share_F[f]),
        )
        for f, name in enumerate(columns)
    ]  # fmt: skip
    return sorted(worths, key=lambda w: -w.loss_share)


def _fit(x_NF: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes by least squares, and shares of the variance (F,), which sum up to R^2.

    The share is slope * cov(x, y) / var(y) (Pratt 1987); of independent features it is that of the
    variance which vanishes if the feature is held fixed.
    """
    x, y = x_NF - x_NF.mean(axis=0), y_N - y_N.mean()
    scale_F = np.maximum(x.std(axis=0), 1e-12)
    slope_F, *_ = np.linalg.lstsq(x / scale_F, y, rcond=None)
    share_F = slope_F * ((x / scale_F).T @ y) / max(float(y @ y), 1e-300)
    return slope_F / scale_F, share_F
