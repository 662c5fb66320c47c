"""Scores many subnets with the weights of one supernet: each device runs its own subnet."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokens import TokenPairs
from automoe_jax.system.compile_cache import Compilations
from automoe_jax.system.programs import Programs
from automoe_jax.training import parallel
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.evaluation import batch_shape, plain_batches, take_pairs
from automoe_jax.training.step import batch_loss
from automoe_jax.training.target import TrainingTarget


@functools.lru_cache(maxsize=4)
def _programs(target: TrainingTarget) -> Programs:
    """Cached, so the searches of one process share its compilations."""
    module = target.module()

    def step(params, batch, subnet):
        sums, _ = batch_loss(module, params, batch, subnet, None, 0.0)
        return sums

    return Programs(parallel.map_population_step(step), f"score {target}")


class PopulationScorer:
    """Validation losses of subnets: one compilation per batch shape, for any number of subnets."""

    def __init__(self, target: TrainingTarget, config: TrainingConfig, params: Any):
        """Copies `params`, NumPy arrays, to the devices."""
        self._target, self._config = target, config
        self._params = parallel.replicate(params)
        self._programs = _programs(target)
        self.at_once = jax.local_device_count()  # subnets that are scored together
        self._seen: set[tuple[int, ...]] = set()  # batch shapes
        self.recompilations = 0  # of the scoring step, beyond one per batch shape

    def prepare(self, pairs: TokenPairs) -> list[Any]:
        """The batches of some pairs, replicated."""
        batches = [parallel.replicate(batch) for batch in plain_batches(pairs, self._config)]
        active = self._stack([self._target.hull] * self.at_once)
        for batch in batches:
            self._programs.schedule(batch_shape(batch), (self._params, batch, active))
        return batches

    def losses(self, batches: list[Any], subnets: Sequence[Subnet]) -> list[float]:
        """Nats per target token of each subnet, any number of them; `batches` are of `prepare`."""
        losses: list[float] = []
        for start in range(0, len(subnets), self.at_once):
            group = list(subnets[start : start + self.at_once])
            filled = group + [group[-1]] * (self.at_once - len(group))
            active = self._stack(filled)
            sums = [self._run(batch, active) for batch in batches]
            nll, tokens = (
                np.sum([np.asarray(getattr(s, name), np.float64) for s in sums], axis=0)
                for name in ("nll", "tokens")
            )
            losses += (nll / tokens)[: len(group)].tolist()
        return losses

    def _run(self, batch: Any, active: Any) -> Any:
        shape = batch_shape(batch)
        program = self._programs.get(shape)
        with Compilations() as counted:
            sums = program(self._params, batch, active)
        if shape in self._seen:
            self.recompilations += counted.count
        self._seen.add(shape)
        return sums

    def _stack(self, subnets: Sequence[Subnet]) -> Any:
        active = [to_active(subnet, self._target.hull) for subnet in subnets]
        return jax.tree.map(lambda *xs: np.stack(xs), *active)


def sample_pairs(pairs: TokenPairs, count: int, seed: int) -> TokenPairs:
    """`count` pairs drawn without replacement, in their order, or all for 0."""
    if not 0 < count < len(pairs):
        return pairs
    drawn = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    return take_pairs(pairs, np.sort(drawn))
