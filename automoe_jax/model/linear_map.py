"""Linear maps that a loop stores in one round and applies in another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Recipe(NamedTuple):
    """How to rebuild a linear map from what was kept and what is known anyway."""

    treedef: Any
    sources: list[tuple[bool, int]]  # of each leaf: (whether known, index)
    kept: list[jax.ShapeDtypeStruct]


def linearise(
    f, known: list[jax.Array], n_out: int, *args
) -> tuple[Any, Any, list[jax.Array], Recipe]:
    """f at args: (outputs, further outputs, arrays to keep, recipe).

    Args:
      f: returns (outputs, further outputs).
      known: arrays that the backward pass has without keeping them.
      n_out: how many of the outputs it has, too.
      args: what f is differentiated by.
    """
    out, pull, further = jax.vjp(f, *args, has_aux=True)
    leaves, treedef = jax.tree.flatten(pull)
    places = {id(array): i for i, array in enumerate([*known, *jax.tree.leaves(out)[:n_out]])}
    kept: list[jax.Array] = []
    at: dict[int, int] = {}
    sources = []
    for leaf in leaves:
        if id(leaf) in places:
            sources.append((True, places[id(leaf)]))
            continue
        if id(leaf) not in at:
            at[id(leaf)] = len(kept)
            kept.append(leaf)
        sources.append((False, at[id(leaf)]))
    shapes = [jax.ShapeDtypeStruct(jnp.shape(k), jnp.result_type(k)) for k in kept]
    return out, further, kept, Recipe(treedef, sources, shapes)


def pull(recipe: Recipe, kept: list[jax.Array], known: list[jax.Array]) -> Any:
    """The linear map that a recipe is for."""
    leaves = [known[i] if is_known else kept[i] for is_known, i in recipe.sources]
    return jax.tree.unflatten(recipe.treedef, leaves)
