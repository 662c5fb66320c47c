"""Scores many subnets with the weights of one supernet: a device takes a subnet at a time."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data import batches as batching
from automoe_jax.data.batches import Share
from automoe_jax.data.plan import Plan, choose_buckets
from automoe_jax.data.tokens import Side, TokenPairs
from automoe_jax.system.compile_cache import Compilations
from automoe_jax.training import parallel
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.loop import TrainingTarget
from automoe_jax.training.step import batch_loss

# Shapes of batches: each compiles once, and validation sets are small.
SHAPES = 3


@functools.lru_cache(maxsize=4)
def _mapped_step(trained: TrainingTarget):
    """Kept, so that searches of one process share its compilations."""
    module = trained.module()

    def step(params, batch, choice):
        sums, _ = batch_loss(module, params, batch, choice, None, 0.0)
        return sums

    return parallel.map_population_step(step)


class PopulationScorer:
    """Validation losses of subnets: one compilation per batch shape, whatever their number."""

    def __init__(self, trained: TrainingTarget, config: TrainingConfig, params: Any):
        """Puts the weights on the devices.

        Args:
          trained: the supernet.
          config: tokens per batch, buckets.
          params: of the supernet, as NumPy.
        """
        self._trained, self._config = trained, config
        self._params = parallel.replicate(params)
        self._step = _mapped_step(trained)
        self.at_once = jax.local_device_count()  # subnets that are scored together
        self._seen: set[tuple[int, ...]] = set()  # shapes of batches
        # Of the scoring step, beyond one compilation for each shape of batches.
        self.recompilations = 0

    def prepare(self, pairs: TokenPairs) -> list[Any]:
        """The batches of some pairs, a copy on each device."""
        source, target = pairs.source.lengths, pairs.target.lengths
        most = min(self._config.buckets, SHAPES)
        shapes = choose_buckets(source, target, most, self._config.tokens_per_batch)
        plan = Plan(source, target, shapes, 1, seed=None)
        one = Share(first_device=0, n_local_devices=1, n_devices=1)
        found = []
        for i in range(plan.steps_per_epoch):
            batch = jax.tree.map(lambda x: x[0, 0], batching.assemble(pairs, plan, i, one))
            found.append(parallel.replicate(batch))
        return found

    def losses(self, batches: list[Any], subnets: Sequence[Subnet]) -> list[float]:
        """Nats per target token of each subnet.

        Args:
          batches: of `prepare`.
          subnets: any number; the devices take as many at a time as there are of them.
        """
        losses: list[float] = []
        for start in range(0, len(subnets), self.at_once):
            group = list(subnets[start : start + self.at_once])
            filled = group + [group[-1]] * (self.at_once - len(group))
            choices = [to_active(s, self._trained.hull) for s in filled]
            stacked = jax.tree.map(lambda *xs: np.stack(xs), *choices)
            sums = [self._run(batch, stacked) for batch in batches]
            nll, tokens = (
                np.sum([np.asarray(getattr(s, name), np.float64) for s in sums], axis=0)
                for name in ("nll", "tokens")
            )
            losses += (nll / tokens)[: len(group)].tolist()
        return losses

    def _run(self, batch: Any, choices: Any) -> Any:
        shape = tuple(n for x in jax.tree.leaves(batch) for n in x.shape)
        with Compilations() as counted:
            sums = self._step(self._params, batch, choices)
        if shape in self._seen:
            self.recompilations += counted.count
        self._seen.add(shape)
        return sums


def sample_pairs(pairs: TokenPairs, count: int, seed: int) -> TokenPairs:
    """`count` pairs drawn without replacement, in their order; all of them where it is 0."""
    if not count or count >= len(pairs):
        return pairs
    drawn = np.sort(np.random.default_rng(seed).choice(len(pairs), count, replace=False))

    def side(whole: Side) -> Side:
        parts = [whole[int(i)] for i in drawn]
        starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])])
        return Side(np.concatenate(parts), starts.astype(whole.starts.dtype))

    return TokenPairs(side(pairs.source), side(pairs.target), pairs.counts)
