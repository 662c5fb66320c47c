"""How subnets with different numbers of experts share the weights of a supernet's layer.

A layer stores S experts. The experts of a subnet are fixed linear combinations of them, which
depend on their number alone; so are its router's columns. `SearchSpace.sharing` names the kind.
Letters: L layers, E experts of the largest subnet, S stored experts, N numbers of experts, D
embedding, X anything.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automoe_jax.architecture.active import Array
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.model.stacked import FLAT

Tree = dict[str, Any]


def _own(n: int, counts: tuple[int, ...]) -> np.ndarray:
    """Experts of its own for each number of experts."""
    start = sum(other for other in counts if other < n)
    return np.eye(n, sum(counts), start)


def _means(n: int, counts: tuple[int, ...]) -> np.ndarray:
    """The means of n groups of neighbours, as equal as possible, of the largest number."""
    stored = max(counts)
    group_S = np.arange(stored) * n // stored
    member_NS = (group_S == np.arange(n)[:, None]).astype(float)
    return member_NS / member_NS.sum(axis=1, keepdims=True)


def _common(n: int, counts: tuple[int, ...]) -> np.ndarray:
    """One common expert, and a difference of its own for each expert of several."""
    several = tuple(other for other in counts if other > 1)
    own = _own(n, several) if n > 1 else np.zeros((1, sum(several)))
    return np.concatenate([np.ones((n, 1)), own], axis=1)


_KINDS: dict[str, Callable[[int, tuple[int, ...]], np.ndarray]] = {
    "front": lambda n, counts: np.eye(n, max(counts)),
    "own": _own,
    "means": _means,
    "common": _common,
}


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The sharing of one stack, whose layers all have the same choices of numbers of experts."""

    kind: str  # as in `SearchSpace`
    counts: tuple[int, ...]  # numbers of experts that a layer may have

    def combination(self, n: int) -> np.ndarray:
        """(n, S): the experts of n as combinations of the stored ones."""
        return _KINDS[self.kind](n, self.counts)

    @property
    def stored(self) -> int:
        """S, the experts that a layer stores."""
        return self.combination(max(self.counts)).shape[1]

    def experts(self, params: Tree, n_experts_L: Array) -> Tree:
        """A stack's stored weights as those of its active experts, in the layout of `stacked`.

        Differentiable, and linear in `params`.
        """
        if self.kind == "front":
            return params
        mix_LES = jnp.asarray(self._table())[n_experts_L]
        own = _combined(params["experts"], mix_LES)
        if "router" in own:  # absent where every layer has one expert
            own["router"] = jnp.einsum("LES,LDS->LDE", mix_LES, own["router"])
            own["router_bias"] = jnp.einsum("LES,LS->LE", mix_LES, own["router_bias"])
        return {**params, "experts": own}

    def started(self, params: Tree, n_layers: int) -> Tree:
        """First weights from random ones: experts that will be combined start alike.

        Those of "means" are copies of one (sparse upcycling, Komatsuzaki et al. 2023, arXiv
        2212.05055), and the differences of "common" are zero.
        """
        if self.kind not in ("means", "common"):
            return params
        of_first_SS = np.zeros((self.stored, self.stored), np.float32)
        of_first_SS[slice(None) if self.kind == "means" else 0, 0] = 1
        alike = _combined(params["experts"], jnp.tile(of_first_SS, (n_layers, 1, 1)))
        return {**params, "experts": alike}

    def _table(self) -> np.ndarray:
        """(N, E, S): the combinations of each number, zero for numbers that are no choice."""
        most = max(self.counts)
        table = np.zeros((most + 1, most, self.stored), np.float32)
        for n in self.counts:
            table[n, :n] = self.combination(n)
        return table


def _combined(experts: Tree, mix_LES: jax.Array) -> Tree:
    """Linear combinations of a stack's experts, which are all of one size, router untouched."""
    out = dict(experts)
    for name in FLAT:
        stored_LSX = out[name].reshape(mix_LES.shape[0], mix_LES.shape[2], -1)
        mixed_LEX = jnp.einsum("LES,LSX->LEX", mix_LES, stored_LSX)
        out[name] = mixed_LEX.reshape(-1, *out[name].shape[1:])
    return out


def sharing_of(space: SearchSpace, side: str) -> Sharing:
    """The sharing of a stack, "encoder" or "decoder"."""
    return Sharing(space.sharing, getattr(space, f"{side}_experts"))
