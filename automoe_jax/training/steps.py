"""The steps of a training run: their batches, subnets and programs."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from automoe_jax.architecture.subnet import Subnet, short_name
from automoe_jax.data import batches as batching
from automoe_jax.data.batches import Batch, Share
from automoe_jax.data.plan import Bucket, Plan, choose_buckets
from automoe_jax.data.tokens import PreparedData
from automoe_jax.model.stand_alone import StandAlone
from automoe_jax.system.errors import UserError
from automoe_jax.system.programs import Programs
from automoe_jax.training import optimizer, parallel, sampling, sharding
from automoe_jax.training.config import SamplingConfig, TrainingConfig
from automoe_jax.training.step import (
    RouterWeights,
    StepMetrics,
    StepOptions,
    TeacherModel,
    TrainState,
    make_train_step,
)
from automoe_jax.training.target import TrainingTarget, abstract_state

Drawn = list[list[Subnet]] | None  # the subnets of a step; None for a stand-alone model


class TrainedTeacher(NamedTuple):
    """A trained model to learn from, and its weights."""

    module: StandAlone
    params: Any


class Steps:
    """Runs the steps of a run; `(seed, step)` fixes batch, subnets and dropout of each."""

    def __init__(
        self,
        target: TrainingTarget,
        config: TrainingConfig,
        sampling_config: SamplingConfig,
        seed: int,
        data: PreparedData,
        teacher: TrainedTeacher | None = None,
    ):
        """Raises `UserError` if the batches of a step do not fit the devices or the corpus."""
        self._target, self._config, self._seed, self._data = target, config, seed, data
        self._share = parallel.share()
        n_micro = micro_batches(config, self._share.n_devices)
        sizes = {"n_devices": self._share.n_devices, "n_micro": n_micro}
        self._sampling = sampling_config
        self._draw = functools.partial(
            sampling.draw, target.space, seed, config=sampling_config, **sizes
        )
        source, into = data.train.source.lengths, data.train.target.lengths
        buckets = choose_buckets(source, into, config.buckets, config.tokens_per_batch)
        self.plan = Plan(source, into, buckets, config.batches_per_step, seed)
        module = teacher and teacher.module
        step = mapped_step(target, config, sampling_config, module)
        self._programs = Programs(step, f"step {target} {config} {sampling_config} {module}")
        self._taught_by = () if teacher is None else (parallel.replicate(teacher.params),)
        self._key = jax.random.key(seed)

    def compile_ahead(self, start: int, most: int | None = None):
        """Has the programs of the steps from `start` on compiled, the first `most` or all."""
        made_of, stop = (self._target, self._config, self._seed), self._config.steps
        change = min(max(start, self._sampling.largest_first), stop)
        scheduled = [
            (first, bucket)
            for first, last in ((start, change), (change, stop))
            for bucket in self.plan.shapes(first, last)
        ]
        for first, bucket in scheduled[:most]:
            arguments = step_arguments(*made_of, bucket, self.subnets(first)) + self._taught_by
            self._programs.schedule(self._shape(first, bucket), arguments)

    def _shape(self, step: int, bucket: Bucket) -> tuple[Bucket, int]:
        """What a step's program is kept under: its batch shape, and the subnets of a batch."""
        return bucket, 1 if self._target.subnet else self._sampling.subnets(step)

    def programs(self) -> tuple[int, int]:
        """As `Programs.state`."""
        return self._programs.state()

    def close(self):
        """Compiles no more."""
        self._programs.cancel()

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of the steps from `start` on."""
        return batching.batches(self._data.train, self.plan, self._share, start, self._config.steps)

    def subnets(self, step: int) -> Drawn:
        """The subnets of each device of all processes and micro-batch."""
        return None if self._target.subnet is not None else self._draw(step)

    def program(self, step: int, stop: Callable[[], bool]) -> Any:
        """The program of a step, waited for; None if `stop()` says so meanwhile."""
        return self._programs.get(self._shape(step, self.plan.step(step).bucket), stop)

    def run(
        self, program: Any, step: int, state: TrainState, batch: Batch, drawn: Drawn
    ) -> tuple[TrainState, StepMetrics]:
        """One step, which consumes `state`."""
        key = jax.random.fold_in(self._key, step)
        experts = sampling.random_experts(self._seed, step, self._sampling)
        active = _active(self._target, drawn, self._share, experts)
        return program(state, batch, active, key, *self._taught_by)

    def describe(self, step: int) -> str:
        """Batch and subnets of a step, for an error."""
        content = self.plan.step(step)
        pairs = content.pairs[content.pairs >= 0]
        words = f"batch of shape {content.bucket}, training pairs {_some(pairs)}"
        drawn = self.subnets(step)
        if drawn is None:
            return words
        names = [short_name(subnet) for row in drawn for subnet in row]
        return f"{words}; subnets {_some(dict.fromkeys(names))}"


def mapped_step(
    target: TrainingTarget,
    config: TrainingConfig,
    sampling_config: SamplingConfig,
    teacher: StandAlone | None = None,
) -> Callable[..., Any]:
    """The train step over all devices; with a teacher its weights are its last argument."""
    step = per_device_step(target, config, sampling_config, teacher)
    return parallel.map_train_step(step, taught=teacher is not None)


def per_device_step(
    target: TrainingTarget,
    config: TrainingConfig,
    sampling_config: SamplingConfig,
    teacher: StandAlone | None = None,
) -> Callable[..., Any]:
    """The train step of one device, under axis "data"."""
    tx, rates = optimizer.make(config), (config.label_smoothing, config.load_balance)
    model = None
    if teacher is not None:
        model = TeacherModel(
            teacher, weight=config.teacher_weight, temperature=config.teacher_temperature
        )
    layout = sharding.layout_of(config)
    options = StepOptions(
        sampling_config.distillation,
        sampling_config.temperature,
        RouterWeights(config.router_z, _balance_weights(target, config)),
        sampling_config.project_conflicts,
        config.ema_decay,
        model,
        layout,
        abstract_state(target, config, 0).params if layout.cut else None,
    )
    remat, spread = config.remat == "layer", config.expert_parallel
    module = target.module(config.compute_dtype, remat=remat, spread=spread)
    return make_train_step(module, tx, *rates, options)


def _balance_weights(target: TrainingTarget, config: TrainingConfig) -> tuple[float, ...]:
    """The weight of each layer's own load-balance loss, encoder first; () for none.

    `UserError` if one side alone has some, or a side has too few.
    """
    if bool(config.encoder_load_balance) != bool(config.decoder_load_balance):
        sides = ("encoder", "decoder") if config.encoder_load_balance else ("decoder", "encoder")
        given, missing = sides
        raise UserError(
            f"training.{given}_load_balance has weights, but {missing}_load_balance has none; give "
            "one for each layer of both sides (0 leaves a layer alone), or none"
        )
    found = []
    for side, stack in (target.subnet or target.hull).stacks:
        name, n_layers = f"{side}_load_balance", len(stack.layers)
        weights = getattr(config, name)
        if weights and len(weights) < n_layers:
            raise UserError(
                f"training.{name} has {len(weights)} weights, but the {side} has {n_layers} "
                "layers; give one for each"
            )
        found += weights[:n_layers]
    return tuple(found)


def step_arguments(
    target: TrainingTarget, config: TrainingConfig, seed: int, bucket: Bucket, drawn: Drawn
) -> tuple[Any, ...]:
    """What stands for the arguments of the mapped step at a batch shape, with subnets of a step."""
    share = parallel.share()
    n_micro = micro_batches(config, share.n_devices)
    return abstract_arguments(target, config, seed, bucket, drawn, share, n_micro)


def abstract_arguments(
    target: TrainingTarget,
    config: TrainingConfig,
    seed: int,
    bucket: Bucket,
    drawn: Drawn,
    share: Share,
    n_micro: int,
) -> tuple[Any, ...]:
    """As `step_arguments`, for a process with these devices and batches for each of them."""
    devices = share.n_local_devices
    state = abstract_state(target, config, seed)
    state = sharding.part_shapes(sharding.layout_of(config), state, share.n_devices)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype), state)
    rows = devices, n_micro, bucket.rows
    times = {"source": bucket.source, "target": bucket.target}
    batch = {side: jax.ShapeDtypeStruct((*rows, t), np.int32) for side, t in times.items()}
    return state, batch, _active(target, drawn, share), jax.random.key(seed)


def _active(target: TrainingTarget, drawn: Drawn, share: Share, experts: Any = None) -> Any:
    return None if drawn is None else sampling.stack(drawn, target.hull, share, experts)


def check_expert_parallel(config: TrainingConfig, n_devices: int):
    """Raises `UserError` if the devices do not form groups of `config.expert_parallel`."""
    if n_devices % config.expert_parallel:
        raise UserError(
            f"training.expert_parallel is {config.expert_parallel}, which does not divide the "
            f"{n_devices} devices; use a divisor"
        )


def micro_batches(config: TrainingConfig, n_devices: int) -> int:
    """Micro-batches per device and step; `UserError` if the config does not fit the devices."""
    check_expert_parallel(config, n_devices)
    if config.batches_per_step % n_devices:
        raise UserError(
            f"training.batches_per_step is {config.batches_per_step}, not a multiple of the "
            f"{n_devices} devices; use one"
        )
    return config.batches_per_step // n_devices


def _some(values: Iterable[Any], most: int = 6) -> str:
    """The first values, and how many more there are."""
    found = [str(value) for value in values]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
