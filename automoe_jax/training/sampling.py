"""The subnets that a step trains: a pure function of seed, step, device and micro-batch."""

import jax
import numpy as np

from automoe_jax.architecture.active import ActiveSubnet, to_active
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.batches import Share

# Separates this random stream from others with the same seed.
_STREAM = 0x5AB9E7


def draw(
    space: SearchSpace, seed: int, step: int, n_devices: int, n_micro: int, unit: str
) -> list[list[Subnet]]:
    """The subnet of each device of all processes and micro-batch; `unit` as in `SamplingConfig`."""

    def one(device: int, micro: int) -> Subnet:
        drawer = {"micro_batch": (device, micro), "device": (device, 0), "update": (0, 0)}[unit]
        return space.sample(np.random.default_rng([_STREAM, seed, step, *drawer]))

    return [[one(d, m) for m in range(n_micro)] for d in range(n_devices)]


def stack(subnets: list[list[Subnet]], hull: Subnet, share: Share) -> ActiveSubnet:
    """The subnets of this process's devices, with leading axes (device, micro-batch)."""
    local = subnets[share.first_device : share.first_device + share.n_local_devices]
    active = [to_active(subnet, hull) for row in local for subnet in row]
    lead = (len(local), len(local[0]))
    return jax.tree.map(lambda *x: np.stack(x).reshape(lead + np.shape(x[0])), *active)


def fixed_set(space: SearchSpace, seed: int, count: int) -> list[Subnet]:
    """Random subnets for validation, fixed by the seed."""
    return [space.sample(np.random.default_rng([_STREAM, seed, 1 << 40, i])) for i in range(count)]
