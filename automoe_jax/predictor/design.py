"""The subnets that a latency model is fitted to (greedy D-optimal design)."""

import dataclasses

import numpy as np

from automoe_jax.architecture.space import SearchSpace, SpaceError
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.predictor import features
from automoe_jax.predictor.features import TranslationTask

POOL = 400
# Share of random subnets, which resemble those that the model will predict.
RANDOM = 0.5


def blocks(space: SearchSpace) -> list[Subnet]:
    """The smallest subnet with one dimension at its maximum, and the largest with one at its
    minimum, for every elastic dimension.
    """
    found = []
    for field in dataclasses.fields(space):
        choices = getattr(space, field.name)
        if not isinstance(choices, tuple) or len(choices) < 2 or "placement" in field.name:
            continue
        for pick, corner in ((choices[-1], "smallest"), (choices[0], "largest")):
            try:
                narrowed = dataclasses.replace(space, **{field.name: (pick,)})
                subnet = getattr(narrowed, corner)()
                space.validate(subnet)
            except (SpaceError, ValueError):
                continue  # a span longer than the encoder
            found.append(subnet)
    return list(dict.fromkeys(found))


def choose(space: SearchSpace, task: TranslationTask, count: int, seed: int) -> list[Subnet]:
    """`count` different subnets, or fewer if the space has fewer.

    The smallest, the largest, random ones, and those of `blocks` and further random ones that add
    most to the information about the features of `task`.
    """
    rng = np.random.default_rng([0xD0E, seed])
    drawn = list(dict.fromkeys(space.sample(rng) for _ in range(max(POOL, 2 * count))))
    chosen = list(dict.fromkeys([space.smallest(), space.largest()]))
    for subnet in drawn[: round(RANDOM * count)]:
        if subnet not in chosen and len(chosen) < count:
            chosen.append(subnet)
    pool = [s for s in dict.fromkeys([*blocks(space), *drawn]) if s not in set(chosen)]
    if not pool:
        return chosen
    x_NF = np.array([features.work(s, task) for s in [*chosen, *pool]])
    spread_F = x_NF.std(axis=0)
    x_NF = x_NF[:, spread_F > 0] / spread_F[spread_F > 0]
    x_NF = np.column_stack([np.ones(len(x_NF)), x_NF])
    known, rest = x_NF[: len(chosen)], x_NF[len(chosen) :]
    inverse_FF = np.linalg.inv(known.T @ known + 1e-3 * np.eye(x_NF.shape[1]))
    free = list(range(len(pool)))
    while free and len(chosen) < count:
        gain = np.einsum("nf,fg,ng->n", rest[free], inverse_FF, rest[free])
        best = free.pop(int(gain.argmax()))
        chosen.append(pool[best])
        step = inverse_FF @ rest[best]
        inverse_FF -= np.outer(step, step) / (1 + rest[best] @ step)
    return chosen


def unseen(space: SearchSpace, count: int, seen: list[Subnet], seed: int) -> list[Subnet]:
    """Random subnets that are not among `seen`; fewer if the space has too few."""
    rng = np.random.default_rng([0x0DD, seed])
    found: dict[Subnet, None] = {}
    for _ in range(100 * count):
        subnet = space.sample(rng)
        if subnet not in seen:
            found[subnet] = None
        if len(found) == count:
            break
    return list(found)
