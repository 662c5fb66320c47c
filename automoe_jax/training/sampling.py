"""The subnets that a step trains: a pure function of seed, step, device and micro-batch."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.active import ActiveSubnet, to_active
from automoe_jax.architecture.counts import count
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.batches import Share
from automoe_jax.training.config import SamplingConfig

# Separate these random streams from others with the same seed.
_STREAM, _EXPERTS_STREAM, _ORDER_STREAM = 0x5AB9E7, 0xE4BE27, 0x0E4DE7
# The first subnets of a sandwich; the largest teaches the others.
_ENDS = (SearchSpace.largest, SearchSpace.smallest)


def draw(
    space: SearchSpace,
    seed: int,
    step: int,
    n_devices: int,
    n_micro: int,
    config: SamplingConfig,
) -> list[list[Subnet]]:
    """The subnets of each device of all processes: those of each micro-batch after the other.

    With `config.unit` "equal_compute" or an `alike_share` the space must have no placement.
    """
    each = config.subnets(step)

    def one(device: int, micro: int, nth: int) -> Subnet:
        if step < config.largest_first:
            return space.largest()
        if each > 1 and nth < len(_ENDS):
            return _ENDS[nth](space)
        # The first one's stream has no number of its own: it is that of the published rule.
        own = (nth - len(_ENDS),) if nth > len(_ENDS) else ()
        rng = np.random.default_rng([_STREAM, seed, step, *_drawer(config, device, micro), *own])
        subnet = _random(space, rng, config)
        if config.unit == "equal_compute":
            order = np.random.default_rng([_ORDER_STREAM, seed, step, device, micro, nth])
            subnet = _reordered(subnet, order)
        return subnet

    passes = [(m, nth) for m in range(n_micro) for nth in range(each)]
    return [[one(d, *own) for own in passes] for d in range(n_devices)]


def _random(space: SearchSpace, rng: np.random.Generator, config: SamplingConfig) -> Subnet:
    """A random subnet by the rules of `config`."""
    if config.largest_share > 0 and rng.random() < config.largest_share:
        return space.largest()
    biases = config.experts_bias, config.depth_bias
    drawn = [space.sample(rng, *biases) for _ in range(config.flops_draws)]
    if config.alike_share > 0:
        drawn = [_alike(x) if rng.random() < config.alike_share else x for x in drawn]
    if len(drawn) == 1:
        return drawn[0]
    goal = rng.uniform(count(space.smallest()).flops, count(space.largest()).flops)
    return min(drawn, key=lambda subnet: abs(count(subnet).flops - goal))


def stack(
    subnets: list[list[Subnet]],
    hull: Subnet,
    share: Share,
    experts: Callable[[int, int], np.random.Generator] | None = None,
) -> ActiveSubnet:
    """The subnets of this process's devices, with leading axes (device, pass).

    `experts` as from `random_experts`; without it, each has the first experts of the supernet's.
    """
    last = share.first_device + share.n_local_devices
    active = [
        to_active(subnet, hull, None if experts is None else experts(device, nth))
        for device in range(share.first_device, last)
        for nth, subnet in enumerate(subnets[device])
    ]
    lead = (share.n_local_devices, len(subnets[0]))
    return jax.tree.map(lambda *x: np.stack(x).reshape(lead + np.shape(x[0])), *active)


def random_experts(
    seed: int, step: int, config: SamplingConfig
) -> Callable[[int, int], np.random.Generator] | None:
    """What draws the experts of the subnet that a device runs in a pass of a step, if any."""
    if not config.random_experts:
        return None
    each = config.subnets(step)

    def rng(device: int, nth: int) -> np.random.Generator:
        drawer = _drawer(config, device, nth // each)
        return np.random.default_rng([_EXPERTS_STREAM, seed, step, *drawer, nth % each])

    return rng


def _drawer(config: SamplingConfig, device: int, micro: int) -> tuple[int, int]:
    """What is drawn once for its device and micro-batch, by `SamplingConfig.unit`."""
    units = {
        "micro_batch": (device, micro), "device": (device, 0), "update": (0, 0),
        "equal_compute": (0, micro),
    }  # fmt: skip
    return units[config.unit]


def _reordered(subnet: Subnet, rng: np.random.Generator) -> Subnet:
    """A subnet with the layers of each stack in another order: as many FLOPs, and as likely."""
    return _with_layers(subnet, rng.permutation)


def _alike(subnet: Subnet) -> Subnet:
    """A subnet with each layer of a stack like the first one."""
    return _with_layers(subnet, lambda depth: [0] * depth)


def _with_layers(subnet: Subnet, places: Callable[[int], Iterable[int]]) -> Subnet:
    """A subnet with those layers of each stack whose numbers `places` gives for its depth."""

    def rebuilt(stack: Any) -> Any:
        layers = tuple(stack.layers[i] for i in places(len(stack.layers)))
        return dataclasses.replace(stack, layers=layers)

    return dataclasses.replace(subnet, **{side: rebuilt(stack) for side, stack in subnet.stacks})


def fixed_set(space: SearchSpace, seed: int, count: int) -> list[Subnet]:
    """Random subnets for validation, fixed by the seed."""
    return [space.sample(np.random.default_rng([_STREAM, seed, 1 << 40, i])) for i in range(count)]
