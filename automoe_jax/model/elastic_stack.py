"""The layers of a supernet's stack, at the cost of the active subnet. See docs/supernet.md.

The forward pass is a loop over the active layers, for each of the `compiled_widths`; each round of
it reads one layer's part of the stacked weights. The backward pass is a loop of its own, over
residuals that the rounds stored in buffers with a layer axis, and writes each layer's gradients to
their place. Differentiating the forward loop instead would add up arrays of the size of all weights
in every round.

Letters as in `elastic_layer`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from automoe_jax.architecture.active import layer_row
from automoe_jax.model import elastic_layer, stacked
from automoe_jax.model.elastic_layer import Context, LayerParams, Params, StackStatic, get, put
from automoe_jax.model.experts import RouterLosses
from automoe_jax.model.layers import compiled_widths, cut
from automoe_jax.ops import grouped_ffn, spread_experts
from automoe_jax.ops.grouping import ExpertWeights

# The name of a loop over layers in a compiled program: the side, and the compiled width.
LAYERS = "{}_layers_of_width_{}"


class StackOutput(NamedTuple):
    """Zeros beyond the active depth and width."""

    outputs_LBTD: jax.Array
    losses_L: RouterLosses
    logits_LNE: jax.Array  # the routers'; no gradient flows through them
    expert_LNK: jax.Array


def zero_output(static: StackStatic, x_BTD: jax.Array) -> StackOutput:
    """The output of no layer."""
    n_layers, n_tokens = len(static.layers), x_BTD.shape[0] * x_BTD.shape[1]
    return StackOutput(
        outputs_LBTD=jnp.zeros((n_layers, *x_BTD.shape), x_BTD.dtype),
        losses_L=RouterLosses(jnp.zeros((n_layers,)), jnp.zeros((n_layers,))),
        logits_LNE=jnp.zeros((n_layers, n_tokens, static.n_experts)),
        expert_LNK=jnp.zeros((n_layers, n_tokens, static.top_k), jnp.int32),
    )


def run(static: StackStatic, params: Params, x_BTD, memory_PBSD, context: Context) -> StackOutput:
    """Runs the active layers of a stack with stacked weights, see `stacked`.

    x is zero beyond the active width. The memory of a decoder has the outputs of the last P encoder
    layers, newest first, zero beyond their width; an encoder has None.
    """
    params, context = jax.tree.map(jnp.asarray, (params, context))
    return _run(static, params, x_BTD, memory_PBSD, context)


# --- a round -----------------------------------------------------------------------------------


class _Width(NamedTuple):
    """A width that the rounds are compiled for."""

    dim: int
    exact: bool  # false where narrower subnets may run at it, with masks


def _widths(static: StackStatic, x_BTD: jax.Array) -> tuple[_Width, ...]:
    """The compiled widths, ascending; the rounds of all of them have the same residuals."""
    kept = compiled_widths(static.dims, x_BTD.shape[0] * x_BTD.shape[1])
    return tuple(_Width(dim, exact=kept == static.dims) for dim in kept)


class _Vjps(NamedTuple):
    """VJPs of a round's parts but the experts'; the leaves of these pytrees are the residuals."""

    attend: Any  # of (params, x, memory)
    route: Any  # of (params, x1)
    finish: Any  # of (params, x1, gate, y)


class _Round(NamedTuple):
    """Outputs of one layer, and its residuals."""

    x_BTD: jax.Array
    losses: RouterLosses
    logits_NE: jax.Array
    expert_NK: jax.Array
    x1_BTD: jax.Array  # after attention: the experts' input
    hidden: jax.Array | None  # of the grouped FFN, all layers
    vjps: _Vjps


def _with_arguments(vjp: Any, *arguments: Any) -> Any:
    """The VJP with other values for its first arguments; None leaves one out of the residuals."""
    return dataclasses.replace(vjp, args_res=[*arguments, *vjp.args_res[len(arguments) :]])


def _round(
    static: StackStatic, width: _Width, params, context: Context, layer, x_BTD, memory_PBSD, hidden,
    feed_forward=grouped_ffn.forward,
) -> _Round:  # fmt: skip
    x_BTD = x_BTD[..., : width.dim]
    inputs = static, context, layer, x_BTD, memory_PBSD
    own = elastic_layer.layer_context(*inputs, exact=width.exact)
    weights = elastic_layer.layer_params(params, layer, width.dim)
    attend = functools.partial(elastic_layer.attend, static, context, own)
    x1_BTD, attend_vjp = jax.vjp(attend, weights.attend, x_BTD, memory_PBSD)
    # A router is cheaper to compute again than its residuals are to compile, store and load.
    route = functools.partial(elastic_layer.route_tokens, static, context, own)
    route = jax.checkpoint(route, prevent_cse=False)
    (gate_NK, losses), route_vjp, aux = jax.vjp(route, weights.route, x1_BTD, has_aux=True)
    expert_NK, logits_NE = aux
    experts = static.layer_experts(params, own.row, layer)
    rows_AD = _per_assignment(x1_BTD, static.top_k)
    expert_G, rows_GD = spread_experts.of_group(experts, expert_NK.reshape(-1), rows_AD)
    y_GD, hidden = feed_forward(static.backend, rows_GD, expert_G, experts, hidden, layer)
    y_AD = spread_experts.sent_back(experts, y_GD)
    finish = functools.partial(elastic_layer.finish, static, own, expert_NK)
    finish = jax.checkpoint(finish, prevent_cse=False)
    x2_BTD, finish_vjp = jax.vjp(finish, weights.finish, x1_BTD, gate_NK, y_AD)
    # The backward loop reads these arguments elsewhere.
    vjps = _Vjps(
        _with_arguments(attend_vjp, None, None, None),
        _with_arguments(route_vjp, None, None),
        _with_arguments(finish_vjp, None, None),
    )
    return _Round(x2_BTD, losses, logits_NE, expert_NK, x1_BTD, hidden, vjps)


def _per_assignment(x_BTD: jax.Array, top_k: int) -> jax.Array:
    """One row per token and expert: (A, D)."""
    return jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), top_k, axis=0)


# --- the buffers -------------------------------------------------------------------------------


class _Buffers(NamedTuple):
    """Residuals of all rounds, each with a layer axis."""

    x1_LBTD: jax.Array
    hidden: jax.Array | None  # of the grouped FFN
    residuals: list[jax.Array]  # leaves of the VJPs


def _empty_hidden(static: StackStatic, x_BTD: jax.Array, n_layers: int) -> jax.Array:
    n_rows = x_BTD.shape[0] * x_BTD.shape[1] * static.top_k * static.spread
    shape = grouped_ffn.hidden_shape(n_rows, static.experts_here, static.ffn_dims, static.backend)
    return lax.empty((n_layers, *shape), x_BTD.dtype)


def _abstract_vjps(static: StackStatic, params, x_BTD, memory_PBSD, context) -> dict[_Width, _Vjps]:
    """By compiled width, the VJPs of a round with shapes in place of residuals."""
    inputs = (params, context, jnp.int32(0), x_BTD, memory_PBSD)
    leaves, treedef = jax.tree.flatten(inputs)
    return _cached_vjps(static, _widths(static, x_BTD), treedef, tuple(map(jax.typeof, leaves)))


@functools.lru_cache(maxsize=16)
def _cached_vjps(
    static: StackStatic, widths: tuple[_Width, ...], treedef, types: tuple[Any, ...]
) -> dict[_Width, _Vjps]:
    """Cached, as the forward and the backward pass need the same."""

    def unchanged(backend, rows_AD, expert_A, experts, hidden, layer):
        return rows_AD, hidden  # experts are not in these VJPs, and take longest to trace

    def vjps(width, *leaves):
        params, context, layer, x_BTD, memory_PBSD = treedef.unflatten(leaves)
        done = _round(static, width, params, context, layer, x_BTD, memory_PBSD, None, unchanged)
        return done.vjps

    return {width: jax.eval_shape(functools.partial(vjps, width), *types) for width in widths}


def _empty_buffers(static: StackStatic, params, x_BTD, memory_PBSD, context) -> _Buffers:
    """Buffers that fit every width. All of them are written before they are read."""
    n_layers = len(static.layers)
    vjps = _abstract_vjps(static, params, x_BTD, memory_PBSD, context)
    residuals = [
        lax.empty((n_layers, *np.max([s.shape for s in shapes], axis=0)), shapes[0].dtype)
        for shapes in zip(*map(jax.tree.leaves, vjps.values()), strict=True)
    ]
    x1_LBTD = lax.empty((n_layers, *x_BTD.shape), x_BTD.dtype)
    return _Buffers(x1_LBTD, _empty_hidden(static, x_BTD, n_layers), residuals)


# --- the loops ---------------------------------------------------------------------------------


def _forward(static: StackStatic, params, x_BTD, memory_PBSD, context, buffers: _Buffers | None):
    """(StackOutput, filled buffers); nothing is stored without buffers."""

    def one(width, layer, carry):
        x_BTD, output, buffers = carry
        hidden = None if buffers is None else buffers.hidden
        done = _round(static, width, params, context, layer, x_BTD, memory_PBSD, hidden)
        x_BTD = lax.dynamic_update_slice(x_BTD, done.x_BTD, (0, 0, 0))
        output = StackOutput(
            put(output.outputs_LBTD, done.x_BTD, layer),
            jax.tree.map(lambda all_L, own: put(all_L, own, layer), output.losses_L, done.losses),
            put(output.logits_LNE, done.logits_NE, layer),
            put(output.expert_LNK, done.expert_NK, layer),
        )
        if buffers is not None:
            leaves = zip(buffers.residuals, jax.tree.leaves(done.vjps), strict=True)
            residuals = [put(buffer, value, layer) for buffer, value in leaves]
            buffers = _Buffers(put(buffers.x1_LBTD, done.x1_BTD, layer), done.hidden, residuals)
        return x_BTD, output, buffers

    bodies = {width: functools.partial(one, width) for width in _widths(static, x_BTD)}
    carry = x_BTD, zero_output(static, x_BTD), buffers
    _, output, buffers = _each_layer(static, context, bodies, carry)
    return output, buffers


def _each_layer(
    static: StackStatic, context: Context, bodies: dict[_Width, Any], carry: Any
) -> Any:
    """Loops over the active layers with the body of the least width that holds the active one."""
    active, narrower = context.active, 0
    side = "decoder" if static.memory_dims else "encoder"
    for width, body in bodies.items():
        runs = (narrower < active.embed_dim) & (active.embed_dim <= width.dim)
        with jax.named_scope(LAYERS.format(side, width.dim)):
            carry = lax.fori_loop(0, jnp.where(runs, active.depth, 0), body, carry)
        narrower = width.dim
    return carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static, params, x_BTD, memory_PBSD, context):
    params = elastic_layer.of_dtype(params, x_BTD.dtype)
    return _forward(static, params, x_BTD, memory_PBSD, context, None)[0]


def _run_fwd(static, params, x_BTD, memory_PBSD, context):
    # Cast here, and not before: gradients are summed in fp32.
    inputs = (elastic_layer.of_dtype(params, x_BTD.dtype), x_BTD, memory_PBSD, context)
    buffers = None if static.remat else _empty_buffers(static, *inputs)
    output, buffers = _forward(static, *inputs, buffers)
    return output, (params, (*inputs, output, buffers))


class _Gradients(NamedTuple):
    """Carry of the backward loop."""

    dx_BTD: jax.Array  # of the next round's output
    d_memory: jax.Array | None
    d_params: Any  # LayerParams, stacked
    d_experts: ExpertWeights


class _Saved(NamedTuple):
    """Parts of a layer's forward pass that its backward pass reads."""

    x1_BTD: jax.Array
    expert_NK: jax.Array  # those that `hidden` and `vjps` are of
    hidden: jax.Array | None  # of the grouped FFN
    at: Any  # the layer's index in it
    vjps: _Vjps


def _stored(
    output: StackOutput, buffers: _Buffers, vjps: _Vjps, shape: tuple[int, ...], layer
) -> _Saved:
    """From the buffers; `vjps` are the abstract ones of the width."""
    leaves, treedef = jax.tree.flatten(vjps)
    residuals = zip(buffers.residuals, leaves, strict=True)
    own = treedef.unflatten([get(buffer, leaf.shape, layer) for buffer, leaf in residuals])
    x1_BTD, expert_NK = get(buffers.x1_LBTD, shape, layer), output.expert_LNK[layer]
    return _Saved(x1_BTD, expert_NK, buffers.hidden, layer, own)


def _again(
    static: StackStatic, width: _Width, params, context, layer, x_BTD, memory_PBSD
) -> _Saved:
    """By computing the layer again."""

    def feed_forward(backend, rows_AD, expert_A, experts, hidden, layer):
        del layer  # the buffer has room for one
        return grouped_ffn.forward(backend, rows_AD, expert_A, experts, hidden, 0)

    hidden = _empty_hidden(static, x_BTD, 1)
    inputs = params, context, layer, x_BTD, memory_PBSD, hidden
    done = _round(static, width, *inputs, feed_forward)
    return _Saved(done.x1_BTD, done.expert_NK, done.hidden, 0, done.vjps)


def _round_bwd(static: StackStatic, width, vjps, residuals, d_outputs, d_losses, nth, carry):
    """One layer's backward pass; `vjps` are the abstract ones of the width; None: computed here."""
    dim = width.dim
    params, x0_BTD, memory_PBSD, context, output, buffers = residuals
    layer = context.active.depth - 1 - nth
    shape = (*x0_BTD.shape[:2], dim)
    before_BTD = get(output.outputs_LBTD, shape, jnp.maximum(layer - 1, 0))
    x_BTD = jnp.where(layer > 0, before_BTD, x0_BTD[..., :dim])
    weights = elastic_layer.layer_params(params, layer, dim)
    if vjps is None:
        saved = _again(static, width, params, context, layer, x_BTD, memory_PBSD)
    else:
        saved = _stored(output, buffers, vjps, shape, layer)
    x1_BTD, vjps = saved.x1_BTD, saved.vjps

    dx_BTD = carry.dx_BTD[..., :dim] + get(d_outputs, shape, layer)
    back = _with_arguments(vjps.finish, weights.finish, x1_BTD)
    d_finish, dx1_BTD, d_gate_NK, dy_AD = back(dx_BTD)
    experts = static.layer_experts(params, layer_row(context.active, layer), layer)
    rows_AD, expert_A = _per_assignment(x1_BTD, static.top_k), saved.expert_NK.reshape(-1)
    expert_G, rows_GD, dy_GD = spread_experts.of_group(experts, expert_A, rows_AD, dy_AD)
    dx_GD, d_experts = grouped_ffn.backward(
        static.backend, rows_GD, expert_G, experts, saved.hidden, dy_GD, carry.d_experts, saved.at
    )
    dx_AD = spread_experts.sent_back(experts, dx_GD)
    dx1_BTD += jnp.sum(dx_AD.reshape(-1, static.top_k, dim), axis=1).reshape(shape)
    back = _with_arguments(vjps.route, weights.route, x1_BTD)
    d_own_losses = jax.tree.map(lambda all_L: all_L[layer], d_losses)
    d_route, from_router_BTD = back((d_gate_NK, d_own_losses))
    back = _with_arguments(vjps.attend, weights.attend, x_BTD, memory_PBSD)
    d_attend, dx_BTD, d_memory = back(dx1_BTD + from_router_BTD)

    d_own = LayerParams(d_attend, d_route, d_finish)
    d_params = jax.tree.map(lambda buffer, d: put(buffer, d, layer), carry.d_params, d_own)
    d_memory = jax.tree.map(jnp.add, carry.d_memory, d_memory)
    dx_BTD = jnp.pad(dx_BTD, ((0, 0), (0, 0), (0, x0_BTD.shape[-1] - dim)))
    return _Gradients(dx_BTD, d_memory, d_params, d_experts)


def _run_bwd(static, saved, cotangents):
    given, residuals = saved
    params, x0_BTD, memory_PBSD, context, *_ = residuals
    d_outputs, d_losses = cotangents.outputs_LBTD, cotangents.losses_L
    abstract: dict[_Width, Any] = dict.fromkeys(_widths(static, x0_BTD))
    if not static.remat:
        abstract |= _abstract_vjps(static, *residuals[:4])
    bodies = {
        width: functools.partial(_round_bwd, static, width, vjps, residuals, d_outputs, d_losses)
        for width, vjps in abstract.items()
    }
    zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, jnp.float32))
    dx_BTD, d_memory = jnp.zeros_like(x0_BTD), zeros(memory_PBSD)
    d_params = zeros(elastic_layer.without_experts(params))
    d_experts = grouped_ffn.no_gradients(static.backend, elastic_layer.experts_of(params))
    carry = _Gradients(dx_BTD, d_memory, d_params, d_experts)
    carry = _each_layer(static, context, bodies, carry)
    n_experts = static.experts_before(context.active.depth)
    d_experts = grouped_ffn.all_gradients(static.backend, carry.d_experts, n_experts)
    gradients = elastic_layer.with_experts(carry.d_params, d_experts), carry.d_memory
    to_dtype = functools.partial(jax.tree.map, lambda d, a: d.astype(a.dtype))
    d_params, d_memory = to_dtype(gradients, (given, memory_PBSD))
    return d_params, carry.dx_BTD, d_memory, None


_run.defvjp(_run_fwd, _run_bwd)


# --- the reference -----------------------------------------------------------------------------


def run_masked(
    static: StackStatic, params: Params, x_BTD, memory_PBSD, context: Context
) -> StackOutput:
    """`run` by masks alone: every layer, every expert, the full width; slow, differentiated by JAX.

    The reference that `run` must equal, and the cost of a supernet without it.
    """
    active = context.active
    slot = max(static.ffn_dims)
    layers, losses = [], []
    for i, experts in enumerate(static.experts):
        weights = elastic_layer.layer_params(params, jnp.int32(i), x_BTD.shape[-1])
        own = elastic_layer.layer_context(static, context, i, x_BTD, memory_PBSD, exact=False)
        own = own._replace(segments=None)
        inputs = static, context, own
        x1_BTD = elastic_layer.attend(*inputs, weights.attend, x_BTD, memory_PBSD)
        routed, (expert_NK, logits_NE) = elastic_layer.route_tokens(*inputs, weights.route, x1_BTD)
        gate_NK, own_losses = routed
        start, bias = (rows[i] for rows in stacked.rows_of(static.experts))
        rows, n = slice(start, start + sum(experts)), len(experts)
        whole = elastic_layer.experts_of(params)
        own_experts = ExpertWeights(
            whole.fc1_FD[rows], whole.fc1_bias_F[rows], whole.fc2_FD[rows],
            whole.fc2_bias_ED[bias : bias + n],
        )  # fmt: skip
        y_AD = grouped_ffn.dense_reference(
            _per_assignment(x1_BTD, static.top_k), expert_NK.reshape(-1), own_experts,
            own.row.sizes_LE[:n], (slot,) * n,
        )  # fmt: skip
        finish = functools.partial(elastic_layer.finish, static, own, expert_NK)
        x2_BTD = finish(weights.finish, x1_BTD, gate_NK, y_AD)
        is_active = active.depth > i
        x_BTD = jnp.where(is_active, cut(x2_BTD, own.active_width), x_BTD)
        layers.append((jnp.where(is_active, x_BTD, 0), logits_NE, expert_NK))
        losses.append(jax.tree.map(lambda x, on=is_active: jnp.where(on, x, 0), own_losses))
    outputs_LBTD, logits_LNE, expert_LNK = map(jnp.stack, zip(*layers, strict=True))
    losses_L = jax.tree.map(lambda *x: jnp.stack(x), *losses)
    return StackOutput(outputs_LBTD, losses_L, logits_LNE, expert_LNK)
