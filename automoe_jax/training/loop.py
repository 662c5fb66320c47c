"""The training loop: of a supernet, or of one stand-alone subnet."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.subnet import Subnet, short_name
from automoe_jax.data import batches as batching
from automoe_jax.data.plan import Plan, choose_buckets
from automoe_jax.data.tokens import PreparedData
from automoe_jax.system import interrupt
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress
from automoe_jax.training import optimizer, parallel, sampling
from automoe_jax.training.checkpoints import CHECKPOINTS, Checkpoints
from automoe_jax.training.config import SamplingConfig, TrainingConfig
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.metrics import MetricsWriter
from automoe_jax.training.monitor import SkippedSteps, Window
from automoe_jax.training.step import TrainState, make_train_step
from automoe_jax.training.target import TrainingTarget, abstract_state, initial_state, with_params

Draw = Callable[[int], list[list[Subnet]]]  # of the step


def train(
    target: TrainingTarget,
    config: TrainingConfig,
    sampling_config: SamplingConfig,
    seed: int,
    data: PreparedData,
    folder: Path,
    progress: Progress,
    init_params: Any | None = None,
) -> None:
    """Trains to `config.steps`, from the newest checkpoint in `folder` if there is one.

    Writes `checkpoints/`, `metrics.jsonl` and TensorBoard events. `(seed, step)` fixes subnets,
    batch and dropout, so a run that is killed and resumed equals an uninterrupted one. Without
    `init_params`, training starts from the weights of `initial_state`.
    """
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS, config.keep_checkpoints)) as store:
        if (store.latest() or 0) >= config.steps:
            return
        share = parallel.share()
        draw = _drawer(target, config, sampling_config.unit, seed, share.n_devices)
        plan = _plan(config, data, seed, progress)
        state, before = _start(target, config, seed, store, init_params, progress)
        start = int(state.step)
        state = parallel.replicate(state, consume=True)
        train_step = _mapped_step(target, config)
        evaluator = Evaluator(target, data.valid, config, config.eval_pairs)
        evaluated = _eval_set(target, seed, config)
        key, window = jax.random.key(seed), Window.restored(before.get("window", {}))
        describe = functools.partial(_describe, plan, draw)
        skipped = SkippedSteps(config.max_skipped, describe, before.get("skipped", 0))
        batches = batching.batches(data.train, plan, share, start, config.steps)
        with (
            interrupt.deferred(defer=jax.process_count() == 1) as interrupted,
            contextlib.closing(_Log(folder, config, start, progress)) as log,
        ):
            for step, batch in enumerate(batches, start):
                subnets = None if draw is None else draw(step)
                active = None if subnets is None else sampling.stack(subnets, target.hull, share)
                state, out = train_step(state, batch, active, jax.random.fold_in(key, step))
                window.add(out, subnets)
                skipped.add(step, out)
                done = step + 1
                save = done == config.steps or done % config.checkpoint_every == 0
                # Also before a checkpoint: a resumed run begins its means there.
                if save or done % config.log_every == 0:
                    skipped.wait()
                    log.write_means(done, window, skipped.total)
                    window = Window()
                if done == config.steps or (config.eval_every and done % config.eval_every == 0):
                    log.write_losses(done, evaluator.losses(state.params, evaluated))
                    window = Window()
                stop = interrupted() or store.preempted(done)
                if save or stop:
                    store.save(parallel.one_copy(state), _log_state(window, skipped))
                if stop:
                    store.wait()
                    progress.note(f"stopping at step {done:,}, which is saved")
                    break
            store.wait()


def _mapped_step(target: TrainingTarget, config: TrainingConfig) -> Callable[..., Any]:
    tx, rates = optimizer.make(config), (config.label_smoothing, config.load_balance)
    return parallel.map_train_step(make_train_step(target.module(), tx, *rates))


def _log_state(window: Window, skipped: SkippedSteps) -> dict[str, Any]:
    """What a checkpoint stores for the log; `_start` returns it."""
    skipped.wait()
    return {"window": window.stored(), "skipped": skipped.total}


def micro_batches(config: TrainingConfig, n_devices: int) -> int:
    """Micro-batches per device and step; `UserError` if `n_devices` does not divide the batches."""
    if config.batches_per_step % n_devices:
        raise UserError(
            f"training.batches_per_step is {config.batches_per_step}, not a multiple of the "
            f"{n_devices} devices; use one"
        )
    return config.batches_per_step // n_devices


def _plan(config: TrainingConfig, data: PreparedData, seed: int, progress: Progress) -> Plan:
    source, target = data.train.source.lengths, data.train.target.lengths
    buckets = choose_buckets(source, target, config.buckets, config.tokens_per_batch)
    plan = Plan(source, target, buckets, config.batches_per_step, seed)
    shapes = ", ".join(f"{b.rows}x{b.source}/{b.target}" for b in plan.buckets)
    steps = f"{plan.steps_per_epoch:,} steps an epoch"
    progress.note(f"{steps}; batch shapes {shapes}; padding {plan.padding:.1%}")
    return plan


def _start(
    target: TrainingTarget,
    config: TrainingConfig,
    seed: int,
    checkpoints: Checkpoints,
    init_params: Any | None,
    progress: Progress,
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest checkpoint and its log, else a state of step 0 and {}."""
    restored = checkpoints.restore(abstract_state(target, config, seed), progress.note)
    if restored is not None and restored.opt_state is not None:
        progress.note(f"resuming at step {restored.step:,}")
        step = np.asarray(restored.step, np.int32)
        return TrainState(step, restored.params, restored.opt_state), restored.log
    if restored is not None:
        init_params = restored.params
        progress.note("starting from converted weights")
    state = initial_state(target, config, seed)
    return state if init_params is None else with_params(state, init_params, config), {}


def _eval_set(target: TrainingTarget, seed: int, config: TrainingConfig) -> dict[str, Subnet]:
    """The subnets that are evaluated, by name."""
    if target.subnet is not None:
        return {"subnet": target.subnet}
    space = target.space
    fixed = sampling.fixed_set(space, seed, config.eval_subnets)
    random = {f"random_{i}": subnet for i, subnet in enumerate(fixed)}
    return {"largest": space.largest(), "smallest": space.smallest(), **random}


def _drawer(
    target: TrainingTarget, config: TrainingConfig, unit: str, seed: int, n_devices: int
) -> Draw | None:
    """Draws the subnets of a step; None for a stand-alone model. Raises as `micro_batches`."""
    n_micro = micro_batches(config, n_devices)
    if target.subnet is not None:
        return None
    return lambda step: sampling.draw(target.space, seed, step, n_devices, n_micro, unit)


def _describe(plan: Plan, draw: Draw | None, step: int) -> str:
    """Batch and subnets of a step, for an error."""
    content = plan.step(step)
    b, pairs = content.bucket, content.pairs[content.pairs >= 0]
    words = f"batch of shape {b.rows}x{b.source}/{b.target}, training pairs {_some(pairs)}"
    if draw is None:
        return words
    names = [short_name(subnet) for row in draw(step) for subnet in row]
    return f"{words}; subnets {_some(dict.fromkeys(names))}"


def _some(values: Iterable[Any], most: int = 6) -> str:
    """The first values, and how many more there are."""
    found = [str(value) for value in values]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


class _Log:
    """Metrics of a run, to its folder (from the first process alone) and to the terminal."""

    def __init__(self, folder: Path, config: TrainingConfig, start: int, progress: Progress):
        self._config, self._progress = config, progress
        self._metrics = MetricsWriter(folder, start) if jax.process_index() == 0 else None
        self._task = progress.task("training", config.steps)
        self._task.update(start)

    def write_means(self, done: int, window: Window, skipped: int):
        """Means of the steps in the window; `skipped` is the number of skipped steps so far."""
        values = window.means()
        if skipped:
            values["train/skipped_steps"] = float(skipped)
        # A skipped step leaves the schedule where it is.
        rate = optimizer.rate(self._config)(max(done - skipped, 1) - 1)
        self._write(done, {**values, "learning_rate": float(np.asarray(rate))})
        loss, speed = values.get("train/loss", math.nan), values["train/target_tokens_per_s"]
        shown = {"skipped": skipped} if skipped else {}
        self._task.update(done, loss=f"{loss:.3f}", tokens_per_s=f"{speed:,.0f}", **shown)

    def write_losses(self, done: int, losses: dict[str, float]):
        """Validation losses by name of the subnet."""
        self._write(done, {f"valid/loss_{name}": loss for name, loss in losses.items()})
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self._progress.note(f"step {done:,}: validation loss (nats a token): {shown}")

    def _write(self, done: int, values: dict[str, float]):
        if self._metrics:
            self._metrics.write(done, values)

    def close(self):
        self._task.close()
        if self._metrics:
            self._metrics.close()
