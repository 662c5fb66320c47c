"""Validation loss of subnets with the weights of a supernet, or of a stand-alone model."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data import batches as batching
from automoe_jax.data.batches import Share
from automoe_jax.data.plan import Plan, choose_buckets
from automoe_jax.data.tokens import Side, TokenPairs
from automoe_jax.system.programs import Programs
from automoe_jax.training import parallel
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.step import make_eval_step
from automoe_jax.training.target import TrainingTarget

# Most batch shapes: each compiles once, and validation sets are small.
SHAPES = 3


def validation_batches(pairs: TokenPairs, config: TrainingConfig, share: Share) -> list[Any]:
    """All pairs in order, in batches of (local devices, rows, time)."""
    source, target = pairs.source.lengths, pairs.target.lengths
    shapes = choose_buckets(source, target, min(config.buckets, SHAPES), config.tokens_per_batch)
    plan = Plan(source, target, shapes, share.n_devices, seed=None)
    return [
        jax.tree.map(lambda x: x[:, 0], batching.assemble(pairs, plan, i, share))
        for i in range(plan.steps_per_epoch)
    ]


@functools.lru_cache(maxsize=4)
def _programs(target: TrainingTarget, spread: int) -> Programs:
    """Cached, so training and evaluation in one process share its compilations."""
    step = make_eval_step(target.module(spread=spread))
    return Programs(parallel.map_eval_step(step), f"evaluate {target} {spread}")


class Score(NamedTuple):
    """What a subnet reaches on validation text; layers are given by side and number from 1."""

    loss: float  # nats per target token
    # Of each layer, the share of the tokens whose first expert each is, and the entropy of the
    # router's probabilities: nats, mean over tokens.
    load: dict[tuple[str, int], np.ndarray]
    entropy: dict[tuple[str, int], float]


class Evaluator:
    """Validation loss of subnets on the first `limit` pairs, or all for 0.

    One compilation per batch shape.
    """

    def __init__(
        self,
        target: TrainingTarget,
        pairs: TokenPairs,
        config: TrainingConfig,
        limit: int,
        spread: int = 1,
    ):
        """With `spread`, parameters have their experts spread over so many devices."""
        self._target = target
        self._programs = _programs(target, spread)
        if 0 < limit < len(pairs):
            pairs = take_pairs(pairs, np.arange(limit))
        self._batches = validation_batches(pairs, config, parallel.share())

    def compile_ahead(self, params: Any):
        """Has all programs compiled, for placed parameters or what stands for them."""
        active = self._target.active(self._target.subnet or self._target.hull)
        for batch in self._batches:
            self._programs.schedule(batch_shape(batch), (params, batch, active))

    def scores(self, params: Any, subnets: dict[str, Subnet]) -> dict[str, Score]:
        """`score` of each subnet."""
        return {name: self.score(params, subnet) for name, subnet in subnets.items()}

    def loss(self, params: Any, subnet: Subnet) -> float:
        """The loss of `score`."""
        return self.score(params, subnet).loss

    def score(self, params: Any, subnet: Subnet) -> Score:
        """Loss with placed parameters, and load; a stand-alone model takes itself."""
        self.compile_ahead(params)
        active = self._target.active(subnet)
        found = [self._programs.get(batch_shape(x))(params, x, active) for x in self._batches]
        sums = jax.tree.map(lambda *xs: sum(map(_first, xs)), *found)
        hull = self._target.subnet or self._target.hull
        layers = [(side, number) for side, number, _ in hull.layers]
        load = dict(zip(layers, (own / max(own.sum(), 1) for own in sums.tokens_LE), strict=True))
        entropies = zip(layers, sums.entropy_L, sums.tokens_LE, strict=True)
        entropy = {layer: float(x / max(own.sum(), 1)) for layer, x, own in entropies}
        return Score(float(sums.sums.nll / sums.sums.tokens), load, entropy)


def _first(x: jax.Array) -> np.ndarray:
    """What the first device has of a sum over all of them."""
    return np.asarray(x.addressable_data(0), np.float64)[0]


def plain_batches(pairs: TokenPairs, config: TrainingConfig) -> list[Any]:
    """The batches of `validation_batches` for a single device, without the device axis."""
    share = Share(first_device=0, n_local_devices=1, n_devices=1)
    return [jax.tree.map(lambda x: x[0], x) for x in validation_batches(pairs, config, share)]


def batch_shape(batch: Any) -> tuple[int, ...]:
    """What the programs of batches are kept under."""
    return batch["source"].shape + batch["target"].shape


def take_pairs(pairs: TokenPairs, indices: np.ndarray) -> TokenPairs:
    """Some of the pairs."""

    def take(side: Side) -> Side:
        parts = [side[int(i)] for i in indices]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        return Side(np.concatenate(parts), starts.astype(side.starts.dtype))

    return TokenPairs(take(pairs.source), take(pairs.target), pairs.counts)
