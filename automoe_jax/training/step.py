"""The train and evaluation steps: plain functions of one device, collectives over axis "data"."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from automoe_jax.architecture.active import ActiveSubnet, Array
from automoe_jax.architecture.ids import PAD_ID
from automoe_jax.model.embedding import output_table
from automoe_jax.model.supernet import Supernet
from automoe_jax.model.transformer import Transformer
from automoe_jax.ops.cross_entropy import chunked_cross_entropy
from automoe_jax.training import optimizer
from automoe_jax.training.loss import LossSums, decoder_input

AXIS = "data"
Batch = dict[str, jax.Array]  # "source", "target"
Model = Supernet | Transformer


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds."""

    step: Array  # [], updates done
    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """Of the whole step, over all devices and micro-batches; natural logarithm. All []."""

    loss: jax.Array  # label-smoothed, per target token
    nll: jax.Array  # per target token
    load_balance: jax.Array  # mean over micro-batches, weighted by target tokens
    target_tokens: jax.Array
    source_tokens: jax.Array
    gradient_norm: jax.Array


def init_state(
    model: Model,
    tx: optax.GradientTransformation,
    subnet: ActiveSubnet | None,
    key: jax.Array,
) -> TrainState:
    """Fresh parameters and optimizer state of step 0."""
    ids = jnp.full((1, 2), 4, jnp.int32)

    @jax.jit
    def make(key):
        active = () if subnet is None else (subnet,)
        params = model.init({"params": key}, ids, ids, *active)["params"]
        return TrainState(jnp.int32(0), params, tx.init(params))

    return make(key)


def batch_loss(
    model: Model,
    params: Any,
    batch: Batch,
    subnet: ActiveSubnet | None,
    key: jax.Array | None,
    smoothing: float,
) -> tuple[LossSums, jax.Array]:
    """Loss sums and load-balance loss of one batch (rows, time); a key switches dropout on."""
    # A supernet takes the active subnet, a stand-alone model none.
    active = () if subnet is None else (subnet,)
    output: Any = model.apply(
        {"params": params}, batch["source"], decoder_input(batch["target"]), *active, key
    )
    target_N = batch["target"].reshape(-1)
    real_N = target_N != PAD_ID
    dim, dims = None, ()
    if isinstance(model, Supernet):
        assert subnet is not None
        dim, dims = subnet.decoder.embed_dim, model.static.decoder_dims
    loss, nll = chunked_cross_entropy(
        output.hidden_BTD.reshape(target_N.shape[0], -1),
        output_table(params),
        target_N,
        real_N,
        smoothing,
        dim,
        dims,
    )
    return LossSums(loss, nll, jnp.sum(real_N).astype(jnp.float32)), output.load_balance


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    smoothing: float,
    load_balance_weight: float,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The update of one device.

    The function takes (state, batch, choices, key): `batch` holds (micro-batches, rows, time) ids,
    `choices` a leading micro-batch axis (or None for a stand-alone model), `key` the dropout key
    of the step. The gradient is the sum over devices and micro-batches of the gradients of the
    *summed* loss, over the sum of target tokens. It must run under axis `AXIS`.
    """

    def micro_batch(params, batch, subnet, key, scale):
        def objective(params):
            sums, balance = batch_loss(model, params, batch, subnet, key, smoothing)
            total = sums.loss + load_balance_weight * balance * sums.tokens
            return total * scale, (sums, balance * sums.tokens)

        gradient, (sums, balance) = jax.grad(objective, has_aux=True)(params)
        return gradient, (sums, balance)

    def step(
        state: TrainState, batch: Batch, choices: ActiveSubnet | None, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        inputs = (batch, choices, jnp.arange(batch["source"].shape[0]))
        source_tokens, target_tokens = _sum_devices(
            tuple(
                jnp.sum(batch[side] != PAD_ID).astype(jnp.float32) for side in ("source", "target")
            )
        )
        # Known before the loss is: gradients come out scaled and are not passed over once more.
        tokens = jnp.maximum(target_tokens, 1)

        def one(inputs):
            batch, subnet, i = inputs
            return micro_batch(state.params, batch, subnet, jax.random.fold_in(key, i), 1 / tokens)

        # No collective in here: devices may be at different subnets. One micro-batch needs no
        # loop, and more share one compiled body.
        if inputs[2].size == 1:
            total = one(jax.tree.map(lambda x: x[0], inputs))
        else:
            shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], inputs))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            zeros = jax.lax.pcast(zeros, AXIS, to="varying")
            total, _ = jax.lax.scan(
                lambda total, inputs: (jax.tree.map(jnp.add, total, one(inputs)), None),
                zeros,
                inputs,
            )
        gradient, (sums, balance) = _sum_devices(total)
        params, opt_state = optimizer.apply(tx, gradient, state.opt_state, state.params)
        metrics = StepMetrics(
            loss=sums.loss / tokens,
            nll=sums.nll / tokens,
            load_balance=balance / tokens,
            target_tokens=target_tokens,
            source_tokens=source_tokens,
            gradient_norm=jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient))),
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _sum_devices(tree: Any) -> Any:
    """The sum over all devices; over one it would be a copy of all gradients."""
    return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.psum(tree, AXIS)


def make_eval_step(model: Model) -> Callable[..., LossSums]:
    """Loss sums (without smoothing or dropout) of one device's batch, summed over devices.

    The function takes (params, batch, choice) with (rows, time) ids; it runs under axis `AXIS`.
    """

    def step(params: Any, batch: Batch, subnet: ActiveSubnet | None) -> LossSums:
        sums, _ = batch_loss(model, params, batch, subnet, None, 0.0)
        return _sum_devices(sums)

    return step
