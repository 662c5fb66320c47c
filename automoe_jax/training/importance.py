"""The importance of a trained model's columns, measured on text."""

from typing import Any

import jax

from automoe_jax.data.tokens import TokenPairs
from automoe_jax.model.importance import Importance, of_gradient
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.evaluation import plain_batches
from automoe_jax.training.step import batch_loss
from automoe_jax.training.target import TrainingTarget


def importance_of(
    target: TrainingTarget, params: Any, pairs: TokenPairs, config: TrainingConfig
) -> Importance:
    """`importance.of_gradient` of a stand-alone model, the mean over batches of the pairs."""
    module = target.module()

    @jax.jit
    def one(params, batch):
        def objective(params):
            sums, _ = batch_loss(module, params, batch, None, None, 0.0)
            return sums.loss / sums.tokens

        return of_gradient(params, jax.grad(objective)(params))

    found = [one(params, batch) for batch in plain_batches(pairs, config)]
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *found)
