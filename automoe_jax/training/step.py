"""The train and evaluation steps: functions of one device, with collectives over axis "data"."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from automoe_jax.architecture.active import ActiveSubnet, Array
from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.model.experts import router_entropy
from automoe_jax.model.seq2seq import Output, output_table
from automoe_jax.model.stand_alone import StandAlone
from automoe_jax.model.supernet import Supernet
from automoe_jax.ops.cross_entropy import Teacher, chunked_cross_entropy
from automoe_jax.training import optimizer, sharding
from automoe_jax.training.sharding import AXIS, Layout

Batch = dict[str, jax.Array]  # "source", "target"
Model = Supernet | StandAlone


class TrainState(NamedTuple):
    """The state that a step updates and a checkpoint stores."""

    step: Array  # [], updates done
    params: Any
    opt_state: Any
    average: Any = ()  # exponential moving average of `params`, of their structure; () for none


class RouterWeights(NamedTuple):
    """Weights of the routers' losses, beside that of the mean load-balance loss."""

    z: float = 0.0  # of the mean z-loss
    load_balance_L: tuple[float, ...] = ()  # of each layer's, in place of the mean; empty for none


class TeacherModel(NamedTuple):
    """A trained model whose predictions a stand-alone model learns from, beside the labels."""

    module: StandAlone
    weight: float  # of its predictions in the loss
    temperature: float


class LossSums(NamedTuple):
    """Sums over real target tokens, eos included; natural logarithm. All []."""

    loss: jax.Array  # label-smoothed
    nll: jax.Array
    tokens: jax.Array


class StepMetrics(NamedTuple):
    """Metrics over all devices and micro-batches of a step; natural logarithm. All []."""

    loss: jax.Array  # label-smoothed, per target token
    nll: jax.Array  # per target token
    load_balance: jax.Array  # mean over micro-batches, weighted by target tokens
    target_tokens: jax.Array
    source_tokens: jax.Array
    gradient_norm: jax.Array
    skipped: jax.Array  # 1 if the loss or the gradient is not finite: the step changes nothing


def decoder_input(target_BT: jax.Array) -> jax.Array:
    """The target shifted right after an eos; pads stay pads."""
    shifted_BT = jnp.pad(target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=EOS_ID)
    return jnp.where(target_BT == PAD_ID, PAD_ID, shifted_BT)


def batch_loss(
    model: Model,
    params: Any,
    batch: Batch,
    subnet: ActiveSubnet | None,
    key: jax.Array | None,
    smoothing: float,
    teacher: Teacher | None = None,
) -> tuple[LossSums, Output]:
    """Loss sums and output of one batch (rows, time), with dropout if there is a key."""
    # A supernet takes the active subnet, a stand-alone model none.
    others = (key,) if subnet is None else (subnet, key)
    output = _output(model, params, batch, *others)
    target_N = batch["target"].reshape(-1)
    real_N = target_N != PAD_ID
    dim, dims = None, ()
    if isinstance(model, Supernet):
        assert subnet is not None
        dim, dims = subnet.decoder.embed_dim, model.stack_static("decoder").dims
    table_VD = output_table(params)
    loss, nll = chunked_cross_entropy(
        _rows(output), table_VD, target_N, real_N, smoothing, dim, dims, teacher
    )
    return LossSums(loss, nll, jnp.sum(real_N).astype(jnp.float32)), output


def _output(model: Model, params: Any, batch: Batch, *others: Any) -> Output:
    """A teacher-forced pass over a batch."""
    ids = batch["source"], decoder_input(batch["target"])
    return cast("Any", model.apply({"params": params}, *ids, *others))


def _rows(output: Output) -> jax.Array:
    """The decoder's hidden activations, a row per token: (N, D)."""
    return output.hidden_BTD.reshape(-1, output.hidden_BTD.shape[-1])


class StepOptions(NamedTuple):
    """What a step does besides the published one.

    Attributes:
      distillation: weight of the predictions of a micro-batch's first subnet, at `temperature`, in
        the loss of the others (in-place distillation, Yu & Huang 2019).
      routers: weights of the routers' other losses.
      project_conflicts: True for `reconciled` to join the gradients of first subnets and others.
      ema_decay: of the state's moving average; 0 for none.
      teacher: a trained model that a stand-alone model learns from.
      layout: which parts of the state are on which devices.
      whole: the shapes of the weights of a cut state.
    """

    distillation: float = 0.0
    temperature: float = 1.0
    routers: RouterWeights = RouterWeights()
    project_conflicts: bool = False
    ema_decay: float = 0.0
    teacher: TeacherModel | None = None
    layout: Layout = Layout()
    whole: Any = None


_PUBLISHED = StepOptions()


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    smoothing: float,
    load_balance_weight: float,
    options: StepOptions = _PUBLISHED,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The update of one device.

    The function takes (state, batch, subnets, key): `batch` holds (micro-batches, rows, time) ids,
    `subnets` an `ActiveSubnet` with a leading axis (None for a stand-alone model), `key` the
    dropout key of the step; with a teacher, its weights too. The leading axis has one or more
    subnets for each micro-batch, one after the other. The gradient is the sum over devices and
    micro-batches of the gradients of the *summed* loss, the mean over a micro-batch's subnets, over
    the sum of target tokens. It must run under axis `AXIS`.
    """

    def one_subnet(params, batch, subnet, key, scale, teacher):
        def objective(params):
            sums, output = batch_loss(model, params, batch, subnet, key, smoothing, teacher)
            of_routers = router_loss(output, load_balance_weight, options.routers)
            total = sums.loss + of_routers * sums.tokens
            return total * scale, (sums, output.load_balance * sums.tokens, _rows(output))

        return jax.grad(objective, has_aux=True)(params)

    def step(
        state: TrainState,
        batch: Batch,
        subnets: ActiveSubnet | None,
        key: jax.Array,
        taught_by: Any = None,
    ) -> tuple[TrainState, StepMetrics]:
        layout = options.layout if jax.lax.axis_size(AXIS) > 1 else Layout()
        params = state.params
        if layout.cut:
            params = sharding.gathered(layout, params, options.whole)
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        counts = (jnp.sum(batch[side] != PAD_ID) for side in ("source", "target"))
        source_tokens, target_tokens = _sum_devices(tuple(n.astype(jnp.float32) for n in counts))
        # Known before the loss: gradients come out scaled, without another pass over them.
        tokens = jnp.maximum(target_tokens, 1)
        n_micro, rows, time = batch["target"].shape
        n_passes = n_micro if subnets is None else jax.tree.leaves(subnets)[0].shape[0]
        each = n_passes // n_micro  # subnets of a micro-batch
        projected = each > 1 and options.project_conflicts

        def one_pass(taught, one):
            subnet, nth = one
            own, is_first = jax.tree.map(lambda x: x[nth // each], batch), nth % each == 0
            teacher = None
            if options.teacher is not None:
                teacher = _teacher(options.teacher, taught_by, own)
            elif taught is not None:
                weight = jnp.where(is_first, 0.0, options.distillation)
                teacher = Teacher(taught, weight, options.temperature)
            own_key, scale = jax.random.fold_in(key, nth), 1 / (tokens * each)
            gradient, aux = one_subnet(params, own, subnet, own_key, scale, teacher)
            *sums, h_ND = aux
            if taught is not None:
                taught = jnp.where(is_first, h_ND, taught)
            if projected:
                gradient = jax.tree.map(functools.partial(_sorted_in, is_first), gradient)
            return (gradient, sums), taught

        taught = None
        if each > 1 and options.distillation:
            assert isinstance(model, Supernet)
            width = model.space.hull().decoder.embed_dim  # a shared table may be wider
            taught = jnp.zeros((rows * time, width), model.dtype)
        total = _sum_passes(one_pass, (subnets, jnp.arange(n_passes)), taught)
        gradient, sums = total
        sums, balance = _sum_devices(sums)
        gradient = _sum_devices(gradient) if layout.copied else sharding.summed(layout, gradient)
        gradient = reconciled(gradient) if projected else gradient
        loss, nll, load_balance = (x / (tokens * each) for x in (sums.loss, sums.nll, balance))
        if layout.copied:
            squares = _dot(gradient, gradient)
        else:
            squares = sharding.sum_of_squares(layout, gradient, params)
        norm = jnp.sqrt(squares)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = 1 - finite.astype(jnp.float32)
        metrics = StepMetrics(loss, nll, load_balance, target_tokens, source_tokens, norm, skipped)
        return _updated(tx, state, gradient, finite, options.ema_decay), metrics

    return step


def _updated(
    tx: Any, state: TrainState, gradient: Any, finite: jax.Array, ema_decay: float
) -> TrainState:
    """The state after an update, which changes nothing but the step where `finite` is false.

    All are what the device has of them.
    """
    params, opt_state = optimizer.apply(tx, gradient, state.opt_state, state.params, finite)
    average = _moving_average(state, params, ema_decay, finite) if ema_decay else ()
    return TrainState(state.step + 1, params, opt_state, average)


def _moving_average(state: TrainState, params: Any, decay: float, finite: jax.Array) -> Any:
    """The next moving average of the weights; in the first updates with a smaller decay.

    So that it forgets the first weights (as in TensorFlow's ExponentialMovingAverage).
    """
    n = jnp.asarray(state.step, jnp.float32)
    share = jnp.where(finite, 1 - jnp.minimum(decay, (1 + n) / (10 + n)), 0)
    return jax.tree.map(lambda mean, new: mean + share * (new - mean), state.average, params)


def router_loss(output: Output, load_balance: float, weights: RouterWeights) -> jax.Array:
    """The routers' part of the loss, per target token, []."""
    loss = load_balance * output.load_balance
    if weights.load_balance_L:
        loss = jnp.dot(jnp.asarray(weights.load_balance_L), output.router_losses.load_balance)
    if weights.z:
        loss += weights.z * jnp.sum(output.router_losses.z) / output.n_layers
    return loss


def _teacher(model: TeacherModel, params: Any, batch: Batch) -> Teacher:
    """The predictions of a trained model for a batch; no gradient is asked of it."""
    h_ND = _rows(_output(model.module, params, batch, None))
    return Teacher(h_ND, model.weight, model.temperature, output_table(params)[:, : h_ND.shape[1]])


def _sorted_in(is_first: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient at index 0 of a new axis if it is that of a first subnet, else at 1."""
    return jnp.stack([jnp.where(is_first, gradient, 0), jnp.where(is_first, 0, gradient)])


def reconciled(gradients: Any) -> Any:
    """The sum of the first subnets' gradient, at index 0 of each array, and the others', at 1.

    Where they oppose each other, the former first loses its part along the latter (NASViT, Gong et
    al. 2022): smaller subnets go first.
    """
    first, others = (jax.tree.map(lambda g, i=i: g[i], gradients) for i in (0, 1))
    product = _dot(first, others)
    along = jnp.where(product < 0, product / jnp.maximum(_dot(others, others), 1e-30), 0)
    return jax.tree.map(lambda a, b: a + (1 - along) * b, first, others)


def _dot(a: Any, b: Any) -> jax.Array:
    """The dot product of all arrays of two gradients, [].

    The update waits for it. Row by row, XLA uses all cores of a CPU; a sum over a whole array takes
    one.
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.sum(jnp.concatenate([jnp.sum(x * y, axis=-1).reshape(-1) for x, y in pairs]))


def _sum_passes(f: Callable[[Any, Any], tuple[Any, Any]], inputs: Any, carry: Any) -> Any:
    """The sum of what `f(carry, one)` gives, beside the next carry, over the leading axis.

    In one compiled body. As devices may run different subnets, `f` holds no collectives but those
    of spread experts, whose devices run the same ones.
    """
    first = jax.tree.map(lambda x: x[0], inputs)
    if len(jax.tree.leaves(inputs)[0]) == 1:
        return f(carry, first)[0]
    shapes, _ = jax.eval_shape(f, carry, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = jax.lax.pcast((zeros, carry), AXIS, to="varying")

    def body(state, one):
        total, carry = state
        value, carry = f(carry, one)
        return (jax.tree.map(jnp.add, total, value), carry), None

    (total, _), _ = jax.lax.scan(body, start, inputs)
    return total


def _sum_devices(tree: Any) -> Any:
    """The sum over all devices; with one device, psum would copy all gradients."""
    return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.psum(tree, AXIS)


class EvalSums(NamedTuple):
    """Sums over a batch, on all devices."""

    sums: LossSums
    tokens_LE: list[jax.Array]  # of each layer: real tokens by their first expert; encoder first
    entropy_L: list[jax.Array]  # of each layer: the router's entropy over real tokens, nats


def make_eval_step(model: Model) -> Callable[..., EvalSums]:
    """Loss sums (without smoothing or dropout) of one device's batch, summed over devices.

    The function takes (params, batch, subnet) with (rows, time) ids; it runs under axis `AXIS`.
    """

    def step(params: Any, batch: Batch, subnet: ActiveSubnet | None) -> EvalSums:
        sums, output = batch_loss(model, params, batch, subnet, None, 0.0)
        real = [batch["source"] != PAD_ID] * len(output.encoder_layers)
        real += [batch["target"] != PAD_ID] * len(output.decoder_layers)
        pairs = list(zip(output.router_logits, real, strict=True))
        tokens_LE = [_tokens_by_expert(*pair) for pair in pairs]
        entropy_L = [
            jnp.sum(router_entropy(logits_NE) * real_BT.reshape(-1)) for logits_NE, real_BT in pairs
        ]
        return _sum_devices(EvalSums(sums, tokens_LE, entropy_L))

    return step


def _tokens_by_expert(logits_NE: jax.Array, real_BT: jax.Array) -> jax.Array:
    """(E,), fp32: the real tokens whose best expert each is."""
    best_NE = jax.nn.one_hot(jnp.argmax(logits_NE, axis=-1), logits_NE.shape[-1])
    return jnp.sum(best_NE * real_BT.reshape(-1, 1), axis=0)
