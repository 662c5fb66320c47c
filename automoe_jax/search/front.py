"""Pareto fronts; lower is better in every coordinate."""

from collections.abc import Sequence

import numpy as np

Points = Sequence[Sequence[float]]


def front(points: Points) -> list[int]:
    """Indices of the non-dominated points, by the first coordinate; of equal points the first."""
    ranks = ranked(points)
    best = [i for i, rank in enumerate(ranks) if rank == 0]
    unique = {tuple(points[i]): i for i in reversed(best)}
    return sorted(unique.values(), key=lambda i: tuple(points[i]))


def ranked(points: Points) -> list[int]:
    """Rank of each point: 0 on the front, 1 on the front of the rest, and so on (NSGA-II)."""
    x_NC = np.asarray(points, float)
    if not len(x_NC):
        return []
    no_worse = (x_NC[:, None] <= x_NC[None]).all(-1)
    better = (x_NC[:, None] < x_NC[None]).any(-1)
    dominates: np.ndarray = np.asarray(no_worse & better)
    beaten_by = dominates.sum(axis=0)
    ranks: np.ndarray = np.full(len(x_NC), -1)
    rank = 0
    while (ranks < 0).any():
        now = np.flatnonzero((ranks < 0) & (beaten_by == 0))
        ranks[now] = rank
        beaten_by = beaten_by - dominates[now].sum(axis=0)
        rank += 1
    return ranks.tolist()


def crowding(points: Points) -> np.ndarray:
    """Crowding distance of each point (NSGA-II); infinite at the ends."""
    x_NC = np.asarray(points, float)
    room = np.zeros(len(x_NC))
    for column in x_NC.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        room[order[[0, -1]]] = np.inf
        if span > 0 and len(order) > 2:
            room[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return room


def hypervolume(points: Sequence[tuple[float, float]], corner: tuple[float, float]) -> float:
    """Area between a front and a corner that all of it dominates."""
    area, y = 0.0, corner[1]
    for i in front(points):
        x, best = points[i]
        if x < corner[0] and best < y:
            area += (corner[0] - x) * (y - best)
            y = best
    return area
