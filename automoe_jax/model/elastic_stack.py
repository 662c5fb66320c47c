"""The layers of a supernet's stack, at the cost of the subnet that a choice says.

A loop over the active layers, once per width, of which one has rounds: a body is compiled for
each width at its static sizes, skipped layers are rounds that do not happen, and the weights of
all layers are arrays that a round reads its part of. The backward pass is a loop of its own: each
round stores what it needs in buffers with a layer axis, and gradients are written to their place,
where differentiating the loop would add up arrays of the size of all weights in every round.

Letters as in `elastic_layer`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from automoe_jax.architecture.active import layer_row
from automoe_jax.model import stacked
from automoe_jax.model.elastic_layer import (
    Context,
    Elastic,
    Params,
    attend,
    bits_of,
    experts_of,
    finish,
    get,
    memory_of,
    per_token,
    put,
    small,
    without_experts,
)
from automoe_jax.model.layers import cut, width
from automoe_jax.model.linear_map import Recipe, linearise, pull
from automoe_jax.ops import grouped_ffn
from automoe_jax.ops.grouping import ExpertWeights


class StackOutput(NamedTuple):
    """Zeros beyond the active depth and width."""

    outputs_LBTD: jax.Array
    balance: jax.Array  # [], load-balance loss summed over the active layers
    logits_LNE: jax.Array  # the routers'; no gradient comes in through these
    expert_LNK: jax.Array


def run(
    elastic: Elastic,
    params: Params,
    x_BTD: jax.Array,
    memory_PBSD: jax.Array | None,
    context: Context,
) -> StackOutput:
    """Runs the active layers.

    Args:
      elastic: the stack.
      params: stacked weights, see `stacked`.
      x_BTD: input, zero beyond the active width.
      memory_PBSD: of a decoder, the last P encoder layers, newest first, zero beyond their width.
      context: choice, masks and keys.
    """
    params, context = jax.tree.map(jnp.asarray, (params, context))
    return _run(elastic, params, x_BTD, memory_PBSD, context)


# --- a round -----------------------------------------------------------------------------------


class _Round(NamedTuple):
    """One layer's forward pass and what its backward pass needs."""

    x_BTD: jax.Array
    balance: jax.Array
    logits_NE: jax.Array
    expert_NK: jax.Array
    inner_BTD: jax.Array  # after attention: the experts' input
    hidden: jax.Array | None
    kept: tuple[list[jax.Array], list[jax.Array]]
    recipes: tuple[Recipe, Recipe]


def _round(
    elastic: Elastic, dim, params, context: Context, layer, x_BTD, memory_PBSD, hidden
) -> _Round:
    row = layer_row(context.choice, layer)
    own_small = small(params, layer, dim)
    rate = elastic.rate(dim)
    bits = bits_of(
        elastic, context, layer, x_BTD, memory_of(elastic, memory_PBSD, context, row, True)
    )
    attend_here = functools.partial(attend, elastic, context, row, bits, True, None, rate)
    known = jax.tree.leaves((own_small, x_BTD, memory_PBSD))
    (x1_BTD, p_NK, balance), (expert_NK, logits_NE), kept_1, recipe_1 = linearise(
        attend_here, known, 1, own_small, x_BTD, memory_PBSD
    )
    y_AD, hidden = grouped_ffn.forward(
        elastic.backend,
        per_token(x1_BTD, elastic.most.top_k),
        expert_NK.reshape(-1),
        experts_of(params),
        elastic.active_experts(row, layer),
        elastic.ffn_dims,
        hidden,
        layer,
    )
    finish_here = functools.partial(finish, elastic, row, expert_NK, bits, None, rate)
    finish_here = jax.checkpoint(finish_here, prevent_cse=False)
    known = [*jax.tree.leaves(own_small), x1_BTD]
    x2_BTD, _, kept_2, recipe_2 = linearise(finish_here, known, 0, own_small, x1_BTD, p_NK, y_AD)
    return _Round(
        x2_BTD, balance, logits_NE, expert_NK, x1_BTD, hidden,
        (kept_1, kept_2), (recipe_1, recipe_2),
    )  # fmt: skip


def _hidden_buffer(elastic: Elastic, x_BTD: jax.Array) -> jax.Array:
    n_rows = x_BTD.shape[0] * x_BTD.shape[1] * elastic.most.top_k
    shape = grouped_ffn.kept_shape(
        n_rows, len(elastic.most.experts), elastic.ffn_dims, elastic.backend
    )
    return _buffer((len(elastic.specs), *shape), x_BTD.dtype)


def _buffer(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What is written before it is read; XLA need not fill it with zeros first."""
    return lax.empty(shape, dtype)


def _recipes(elastic: Elastic, params, x_BTD, memory_PBSD, context) -> list[Any]:
    """Per width, the recipes of a round; nothing is computed."""
    found = []
    for dim in elastic.dims:

        def one(params, x_BTD, memory_PBSD, context, hidden, dim=dim):
            result = _round(
                elastic, dim, params, context, jnp.int32(0), x_BTD[..., :dim], memory_PBSD, hidden
            )
            found.append(result.recipes)

        hidden = _hidden_buffer(elastic, x_BTD)
        jax.eval_shape(one, params, x_BTD, memory_PBSD, context, hidden)
    return found


def _kept_buffers(n_layers: int, recipes: list[Any]) -> list[list[jax.Array]]:
    """Buffers that fit what the rounds of every width keep."""
    buffers = []
    for which in range(2):
        per_width = [recipe[which].kept for recipe in recipes]
        assert len({len(kept) for kept in per_width}) == 1, "widths keep different arrays"
        buffers.append([
            _buffer((n_layers, *np.max([s.shape for s in shapes], axis=0)), shapes[0].dtype)
            for shapes in zip(*per_width, strict=True)
        ])  # fmt: skip
    return buffers


# --- the loops ---------------------------------------------------------------------------------


def _forward(elastic: Elastic, params, x_BTD, memory_PBSD, context, buffers):
    """StackOutput, and the buffers with what the rounds kept; `buffers` None keeps nothing."""
    n_layers = len(elastic.specs)
    b, t, _ = x_BTD.shape
    most = elastic.most
    n_experts = len(most.experts)
    output = StackOutput(
        outputs_LBTD=jnp.zeros((n_layers, *x_BTD.shape), x_BTD.dtype),
        balance=jnp.float32(0),
        logits_LNE=jnp.zeros((n_layers, b * t, n_experts), x_BTD.dtype),
        expert_LNK=jnp.zeros((n_layers, b * t, most.top_k), jnp.int32),
    )

    def one(dim, layer, carry):
        x_BTD, output, buffers = carry
        inner, hidden, kept = buffers or (None, None, [])
        result = _round(elastic, dim, params, context, layer, x_BTD[..., :dim], memory_PBSD, hidden)
        x_BTD = lax.dynamic_update_slice(x_BTD, result.x_BTD, (0, 0, 0))
        output = StackOutput(
            put(output.outputs_LBTD, result.x_BTD, layer),
            output.balance + result.balance,
            put(output.logits_LNE, result.logits_NE, layer),
            put(output.expert_LNK, result.expert_NK, layer),
        )
        if buffers is not None:
            kept = [
                [put(buffer, value, layer) for buffer, value in zip(own, values, strict=True)]
                for own, values in zip(kept, result.kept, strict=True)
            ]
            assert inner is not None
            buffers = put(inner, result.inner_BTD, layer), result.hidden, kept
        return x_BTD, output, buffers

    carry = (x_BTD, output, buffers)
    for dim in elastic.dims:
        n_rounds = jnp.where(context.choice.embed_dim == dim, context.choice.depth, 0)
        carry = lax.fori_loop(0, n_rounds, functools.partial(one, dim), carry)
    return carry[1], carry[2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(elastic, params, x_BTD, memory_PBSD, context):
    return _forward(elastic, params, x_BTD, memory_PBSD, context, None)[0]


def _run_fwd(elastic, params, x_BTD, memory_PBSD, context):
    n_layers = len(elastic.specs)
    recipes = _recipes(elastic, params, x_BTD, memory_PBSD, context)
    buffers = (
        _buffer((n_layers, *x_BTD.shape), x_BTD.dtype),
        _hidden_buffer(elastic, x_BTD),
        _kept_buffers(n_layers, recipes),
    )
    output, buffers = _forward(elastic, params, x_BTD, memory_PBSD, context, buffers)
    return output, (params, x_BTD, memory_PBSD, context, output, buffers)


def _run_bwd(elastic, residuals, cotangents):
    params, x0_BTD, memory_PBSD, context, output, (inner, hidden, buffers) = residuals
    recipes = _recipes(elastic, params, x0_BTD, memory_PBSD, context)
    zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, jnp.float32))
    d_small = zeros(without_experts(params))
    d_experts = zeros(experts_of(params))
    top_k = elastic.most.top_k

    def one(dim, recipes, nth, carry):
        dx_BTD, d_memory, d_small, d_experts = carry
        layer = context.choice.depth - 1 - nth
        row = layer_row(context.choice, layer)
        b, t, _ = x0_BTD.shape
        shape = (b, t, dim)
        before = get(output.outputs_LBTD, shape, jnp.maximum(layer - 1, 0))
        x_BTD = jnp.where(layer > 0, before, x0_BTD[..., :dim])
        x1_BTD = get(inner, shape, layer)
        expert_A = output.expert_LNK[layer].reshape(-1)
        own_small = jax.tree.leaves(small(params, layer, dim))
        kept_1, kept_2 = (
            [get(buffer, s.shape, layer) for buffer, s in zip(own, recipe.kept, strict=True)]
            for own, recipe in zip(buffers, recipes, strict=True)
        )
        dx_BTD = dx_BTD[..., :dim] + get(cotangents.outputs_LBTD, shape, layer)
        back = pull(recipes[1], kept_2, [*own_small, x1_BTD])
        d_small_2, dx1_BTD, dp_NK, dy_AD = back(dx_BTD)
        dx_AD, d_experts = grouped_ffn.backward(
            elastic.backend,
            per_token(x1_BTD, top_k),
            expert_A,
            experts_of(params),
            elastic.active_experts(row, layer),
            elastic.ffn_dims,
            hidden,
            dy_AD,
            d_experts,
            layer,
        )
        dx1_BTD += jnp.sum(dx_AD.reshape(b * t, top_k, dim), axis=1).reshape(shape)
        known = [*own_small, *jax.tree.leaves((x_BTD, memory_PBSD)), x1_BTD]
        back = pull(recipes[0], kept_1, known)
        d_small_1, dx_BTD, d_own_memory = back((dx1_BTD, dp_NK, cotangents.balance))
        d_small = jax.tree.map(
            lambda buffer, a, b: put(buffer, a + b, layer), d_small, d_small_1, d_small_2
        )
        d_memory = jax.tree.map(jnp.add, d_memory, d_own_memory)
        rest = x0_BTD.shape[-1] - dim
        return jnp.pad(dx_BTD, ((0, 0), (0, 0), (0, rest))), d_memory, d_small, d_experts

    carry = (jnp.zeros_like(x0_BTD), zeros(memory_PBSD), d_small, d_experts)
    for dim, own in zip(elastic.dims, recipes, strict=True):
        n_rounds = jnp.where(context.choice.embed_dim == dim, context.choice.depth, 0)
        carry = lax.fori_loop(0, n_rounds, functools.partial(one, dim, own), carry)
    dx_BTD, d_memory, d_small, d_experts = carry
    d_params = {
        **d_small,
        "experts": {**d_small["experts"], **dict(zip(stacked.FLAT, d_experts, strict=True))},
    }
    d_params, d_memory = (
        jax.tree.map(lambda g, a: g.astype(a.dtype), *pair)
        for pair in ((d_params, params), (d_memory, memory_PBSD))
    )
    return d_params, dx_BTD, d_memory, None


_run.defvjp(_run_fwd, _run_bwd)


# --- the reference -----------------------------------------------------------------------------


def run_masked(
    elastic: Elastic,
    params: Params,
    x_BTD: jax.Array,
    memory_PBSD: jax.Array | None,
    context: Context,
) -> StackOutput:
    """`run` with masks alone: every layer, every expert, the full width; plain and slow.

    What `run` must equal, and what a supernet costs without it. Differentiated by JAX.
    """
    side = context.choice
    active = width(side.embed_dim, x_BTD.shape[-1])
    rate = elastic.rate(side.embed_dim)
    slot = max(elastic.ffn_dims)
    outputs, logits, experts, balance = [], [], [], jnp.float32(0)
    for i in range(len(elastic.specs)):
        row = layer_row(side, i)
        own_small = small(params, jnp.int32(i), x_BTD.shape[-1])
        memory = memory_of(elastic, memory_PBSD, context, row, False)
        bits = bits_of(elastic, context, i, x_BTD, memory)
        (x1_BTD, p_NK, own), (expert_NK, logits_NE) = attend(
            elastic, context, row, bits, False, active, rate, own_small, x_BTD, memory_PBSD
        )
        own_experts = elastic.experts[i]
        start, bias = (f(elastic.experts)[i] for f in (stacked.rows_of, stacked.bias_rows_of))
        rows = slice(start, start + sum(own_experts))
        weights = experts_of(params)
        weights = ExpertWeights(
            weights.fc1_FD[rows], weights.fc1_bias_F[rows], weights.fc2_FD[rows],
            weights.fc2_bias_ED[bias : bias + len(own_experts)],
        )  # fmt: skip
        y_AD = grouped_ffn.dense_reference(
            per_token(x1_BTD, elastic.most.top_k), expert_NK.reshape(-1), weights,
            row.sizes_LE[: len(own_experts)], (slot,) * len(own_experts),
        )  # fmt: skip
        x2_BTD, _ = finish(
            elastic, row, expert_NK, bits, active, rate, own_small, x1_BTD, p_NK, y_AD
        )
        here = side.depth > i
        x_BTD = jnp.where(here, cut(x2_BTD, active), x_BTD)
        outputs.append(jnp.where(here, x_BTD, 0))
        logits.append(logits_NE)
        experts.append(expert_NK)
        balance += jnp.where(here, own, 0)
    return StackOutput(jnp.stack(outputs), balance, jnp.stack(logits), jnp.stack(experts))
