"""Rows sorted by expert: the input of every backend of the grouped FFN.

Letters: A rows (assignments of tokens to experts), E experts, F FFN columns, D embedding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automoe_jax.architecture.active import Array


class ExpertWeights(NamedTuple):
    """Experts side by side along F; each has a slot of rows, of which the front ones are active.

    One layout for all layers of a supernet in one array (slots of the largest size) and for one
    layer of a stand-alone subnet (exact sizes).
    """

    fc1_FD: jax.Array
    fc1_bias_F: jax.Array
    fc2_FD: jax.Array
    fc2_bias_ED: jax.Array

    def of_dtype(self, dtype: Any) -> "ExpertWeights":
        """With matrices of a dtype, for products of it; biases are added to sums in fp32."""
        return self._replace(fc1_FD=self.fc1_FD.astype(dtype), fc2_FD=self.fc2_FD.astype(dtype))


@dataclasses.dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer; which part of the weights they are is traced."""

    weights: ExpertWeights  # of all layers; columns beyond the width of the rows are unused
    offsets_E: jax.Array  # first row in F of each of the layer's experts
    bias_row: jax.Array  # [], row of the layer's first expert in `fc2_bias_ED`
    sizes_E: jax.Array  # active FFN sizes; 0 is an identity expert
    ffn_dims: tuple[int, ...]  # every FFN size of an expert; the largest is the slot of each
    spread: int = 1  # devices that the layer's experts are on; these are those of one
    # Whether all experts of `weights` have slots of the largest size, one after the other.
    uniform: bool = True
    # How many of these experts are the layer's, the first; others, of size 0, are of the next. None
    # for all.
    n_own: jax.Array | None = None


class Groups(NamedTuple):
    """Assignments sorted by expert; those without an expert come last."""

    order_A: jax.Array  # sorted position -> row
    expert_A: jax.Array  # of each sorted row; E for none
    start_E: jax.Array  # first sorted row of each expert
    count_E: jax.Array


def group(expert_A: jax.Array, n_experts: int, rank_E: Array | None = None) -> Groups:
    """Sorts rows by the rank of their expert, by default its index; `n_experts` or more is none."""
    expert_A = jnp.minimum(expert_A, n_experts)
    rank_E = jnp.arange(n_experts) if rank_E is None else rank_E
    order_A = jnp.argsort(jnp.append(rank_E, n_experts)[expert_A], stable=True)
    count_E = jnp.bincount(expert_A, length=n_experts + 1)[:n_experts]
    ranked_E = jnp.argsort(rank_E)
    end_E = jnp.cumsum(count_E[ranked_E])[rank_E]
    return Groups(order_A, expert_A[order_A], end_E - count_E, count_E)


def put_back(y_sorted_AD: jax.Array, groups: Groups) -> jax.Array:
    """Sorted rows in their original order."""
    return jnp.zeros_like(y_sorted_AD).at[groups.order_A].set(y_sorted_AD, unique_indices=True)


def add_slice(array: jax.Array, update: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    """The array with `update` added from the indices `at` on."""
    old = lax.dynamic_slice(array, at, update.shape)
    return lax.dynamic_update_slice(array, old + update, at)
