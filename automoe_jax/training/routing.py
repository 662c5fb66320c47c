"""Which tokens of a text go to which expert.

Letters: B batch, T time, N real tokens of a side in the order of the text, E experts, C classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.data.tokens import TokenPairs
from automoe_jax.model.experts import router_entropy
from automoe_jax.training.config import TrainingConfig
from automoe_jax.training.evaluation import plain_batches
from automoe_jax.training.step import batch_loss, decoder_input
from automoe_jax.training.target import TrainingTarget

ROUTINGS = ("learned", "random", "largest")


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """The tokens of a layer's input and their first experts."""

    side: str  # "encoder" or "decoder"
    number: int  # of the layer in its stack, from 1
    sizes: tuple[int, ...]  # FFN size of each expert
    ids_N: np.ndarray  # in a decoder, of its input: what it reads to predict the next token
    expert_N: np.ndarray
    entropy: float  # of the router's probabilities, nats, mean over tokens

    @property
    def load_E(self) -> np.ndarray:
        """Share of the tokens of each expert."""
        return self.share_EC(np.zeros_like(self.ids_N), 1)[:, 0]

    @property
    def share_by_size(self) -> dict[int, float]:
        """Share of the tokens of each FFN size."""
        sizes = np.array(self.sizes)
        return {int(size): float(self.load_E[sizes == size].sum()) for size in np.unique(sizes)}

    def share_EC(self, class_N: np.ndarray, n_classes: int) -> np.ndarray:
        """Share of each class's tokens that go to each expert; tokens of class -1 are left out.

        Zeros for a class without tokens.
        """
        counted = class_N >= 0
        cell_N = self.expert_N[counted] * n_classes + class_N[counted]
        count = np.bincount(cell_N, minlength=len(self.sizes) * n_classes)
        count_EC = count.reshape(len(self.sizes), n_classes)
        return count_EC / np.maximum(count_EC.sum(axis=0), 1)


def ffn_flops(routings: Sequence[LayerRouting], width: int) -> np.ndarray:
    """(N,): FLOPs of the FFNs that each token of a side runs through, by its first experts.

    `routings` are those of all layers of the side, `width` is theirs.
    """
    return _ffn_flops(width, [np.array(own.sizes)[own.expert_N] for own in routings])


def ffn_flops_range(routings: Sequence[LayerRouting], width: int) -> tuple[float, float]:
    """The least and the most that `ffn_flops` can be."""
    least, most = ([end(own.sizes) for own in routings] for end in (min, max))
    return float(_ffn_flops(width, least)), float(_ffn_flops(width, most))


def _ffn_flops(width: int, sizes: Sequence[Any]) -> Any:
    """Of two products with a matrix of (width, size) in each layer."""
    return 4.0 * width * np.sum(sizes, axis=0)


def routing_of(
    target: TrainingTarget, params: Any, pairs: TokenPairs, config: TrainingConfig
) -> list[LayerRouting]:
    """The routing of a stand-alone model with these weights, layer by layer, encoder first."""
    assert target.subnet is not None
    layers = target.subnet.layers
    module = target.module()

    @jax.jit
    def route(params, batch):
        _, output = batch_loss(module, params, batch, None, None, 0.0)
        return [(x_NE.argmax(axis=-1), router_entropy(x_NE)) for x_NE in output.router_logits]

    ids, found = [], []
    for batch in plain_batches(pairs, config):
        read = {"encoder": batch["source"], "decoder": np.asarray(decoder_input(batch["target"]))}
        ids.append(read)
        found.append(jax.tree.map(np.asarray, route(params, batch)))
    routings = []
    for nth, (side, number, layer) in enumerate(layers):
        real = [read[side] != PAD_ID for read in ids]
        experts, entropies = (
            np.concatenate([x[nth][k][own.reshape(-1)] for x, own in zip(found, real, strict=True)])
            for k in (0, 1)
        )
        ids_N = np.concatenate([read[side][own] for read, own in zip(ids, real, strict=True)])
        routings.append(
            LayerRouting(side, number, layer.experts, ids_N, experts, float(entropies.mean()))
        )
    return routings


def losses_by_routing(
    target: TrainingTarget, params: Any, pairs: TokenPairs, config: TrainingConfig
) -> dict[str, float]:
    """Nats a token of a stand-alone model as it is, and with other experts for its tokens.

    By `ROUTINGS`; the others have the same gates, see `model.experts.rerouted`.
    """
    batches = plain_batches(pairs, config)

    def loss(how: str) -> float:
        module = target.module().clone(routing=how)

        @jax.jit
        def sums(params, batch):
            return batch_loss(module, params, batch, None, None, 0.0)[0]

        found = [sums(params, batch) for batch in batches]
        return float(sum(x.nll for x in found) / sum(x.tokens for x in found))

    return {how: loss(how) for how in ROUTINGS}
