"""The training loop: of a supernet, or of one stand-alone subnet."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokens import PreparedData
from automoe_jax.system import interrupt
from automoe_jax.system.progress import Progress
from automoe_jax.training import optimizer, parallel, sampling, sharding
from automoe_jax.training.checkpoints import (
    BEST,
    CHECKPOINTS,
    Checkpoints,
    drop_best_beyond,
    reader,
)
from automoe_jax.training.clock import (
    COMPILING,
    DATA,
    EVALUATING,
    SAVING,
    STARTING,
    Clock,
    Profile,
    Span,
    memory,
)
from automoe_jax.training.config import SamplingConfig, TrainingConfig
from automoe_jax.training.evaluation import Evaluator, Score
from automoe_jax.training.metrics import MetricsWriter
from automoe_jax.training.monitor import Lowest, SkippedSteps, Window
from automoe_jax.training.step import TrainState
from automoe_jax.training.steps import Steps, TrainedTeacher
from automoe_jax.training.target import (
    TrainingTarget,
    abstract_state,
    initial_state,
    made_whole,
    with_params,
)


def train(
    target: TrainingTarget,
    config: TrainingConfig,
    sampling_config: SamplingConfig,
    seed: int,
    data: PreparedData,
    folder: Path,
    progress: Progress,
    init_params: Any | None = None,
    profile: Span | None = None,
    teacher: Callable[[], TrainedTeacher] | None = None,
) -> None:
    """Trains to `config.steps`, from the newest checkpoint in `folder` if there is one.

    Writes `checkpoints/`, `metrics.jsonl` and TensorBoard events. `(seed, step)` fixes subnets,
    batch and dropout, so a run that is killed and resumed equals an uninterrupted one. Without
    `init_params`, training starts from the weights of `initial_state`. `profile` names
    the steps of a trace for XProf. A stand-alone model learns from what `teacher`, if given, loads,
    by `config.teacher_weight`.
    """
    clock = Clock()
    with contextlib.closing(_checkpoints(folder, config)) as store:
        latest = store.latest() or 0
        if _is_over(store, config) and store.is_whole(latest):
            return
        with clock.spent(STARTING):
            steps = Steps(target, config, sampling_config, seed, data, teacher and teacher())
            _note_plan(steps, progress)
            steps.compile_ahead(latest, most=1)  # meanwhile; another one, if this is damaged
            state, before = _start(target, config, seed, store, init_params, progress)
            steps.compile_ahead(int(state.step), most=1)
            training = _Training(target, config, seed, steps, data, store, clock, state, before)
        with (
            interrupt.deferred(defer=jax.process_count() == 1) as interrupted,
            contextlib.closing(steps),
            contextlib.closing(_Log(folder, config, training.done, clock, progress)) as log,
            contextlib.closing(Profile(folder, profile)) as traced,
            contextlib.closing(_best(folder, training.done)) as best,
        ):
            training.run(log, traced, best, interrupted)
            if not training.done:  # a checkpoint of step 0 would be of converted weights
                progress.note("stopping before the first step")
            elif training.done < config.steps:
                training.save()
                progress.note(
                    f"validation loss has not fallen for {config.patience} evaluations: the "
                    f"training ends at step {training.done:,}"
                    if training.ended
                    else f"stopping at step {training.done:,}, which is saved"
                )
            store.wait()
        if training.done < config.steps and not training.ended:
            # The processes of a pod, which take the notice of the first that gets one: whoever
            # started them has to see that they are not done.
            raise interrupt.Interrupted(signal.SIGTERM)


def has_ended(folder: Path, config: TrainingConfig) -> bool:
    """Whether the training in a run's folder did its last step, or its loss falls no more."""
    with reader(folder) as store:
        return store is not None and _is_over(store, config)


def _is_over(store: Checkpoints, config: TrainingConfig) -> bool:
    step = store.latest()
    if step is None or step >= config.steps:
        return step is not None
    if not config.patience:
        return False
    try:
        log = store.log(step)
    except Exception:  # of many kinds where it is damaged, which `restore` will say
        return False
    return Lowest(**log.get("lowest", {})).exhausts(config.patience)


def _checkpoints(folder: Path, config: TrainingConfig) -> Checkpoints:
    return Checkpoints(folder / CHECKPOINTS, config.keep_checkpoints, config.checkpoint_every)


def _best(folder: Path, done: int) -> Checkpoints:
    """The store of the best weights; two, as a killed run may lose the newer one."""
    # By every process: each may have a copy of the folder.
    drop_best_beyond(folder, done)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"best weights {folder.name}")
    return Checkpoints(folder / BEST, keep=2)


class _Training:
    """A training from the step that this process starts at to the one that it ends at."""

    def __init__(
        self,
        target: TrainingTarget,
        config: TrainingConfig,
        seed: int,
        steps: Steps,
        data: PreparedData,
        store: Checkpoints,
        clock: Clock,
        state: TrainState,
        before: dict[str, Any],
    ):
        """`before` is what `save` gave to the checkpoint of `state` for the log, or {}."""
        self._config, self._steps, self._store, self._clock = config, steps, store, clock
        self.done = int(state.step)
        self._abstract = abstract_state(target, config, seed)
        self._layout = sharding.layout_of(config)
        self._state = parallel.place(state, self._layout)
        self._whole = parallel.map_gathering(self._layout, self._abstract.params)
        limit, spread = config.eval_pairs, config.expert_parallel
        self._evaluator = Evaluator(target, data.valid, config, limit, spread)
        self._evaluated = _eval_set(target, seed, config)
        self._window = Window.restored(before.get("window", {}))
        total = before.get("skipped", 0)
        self._skipped = SkippedSteps(config.max_skipped, steps.describe, total)
        self._lowest = Lowest(**before.get("lowest", {}))

    @property
    def ended(self) -> bool:
        """True if the validation loss has not fallen for too long."""
        return self._lowest.exhausts(self._config.patience)

    def run(self, log: "_Log", traced: Profile, best: Checkpoints, interrupted: Callable[[], bool]):
        """Steps until all are done, or the run is to stop; `best` takes the best weights."""

        def stop() -> bool:
            log.show_programs(self._steps.programs())
            return interrupted()

        start = self.done
        batches = self._steps.batches(start)
        for step in range(start, self._config.steps):
            with self._clock.spent(DATA):
                batch = next(batches)
            with self._clock.spent(COMPILING):
                program = self._steps.program(step, stop)
            if program is None:
                break
            drawn = self._steps.subnets(step)
            traced.before(step)
            self._state, out = self._steps.run(program, step, self._state, batch, drawn)
            traced.after(step, out)
            if step == start:
                self._steps.compile_ahead(start)
                self._evaluator.compile_ahead(jax.eval_shape(self._whole, self._state.params))
            self._window.add(out, drawn)
            self._skipped.add(step, out)
            self.done = step + 1
            self._report(log, best)
            if self.ended or stop() or self._store.preempted(self.done):
                break

    def _report(self, log: "_Log", best: Checkpoints):
        """Logs, evaluates and saves what is due."""
        done, config = self.done, self._config
        last = done == config.steps
        save = last or done % config.checkpoint_every == 0
        evaluate = last or (config.eval_every and done % config.eval_every == 0)
        # Also before a checkpoint: a resumed run begins its means there. And before an evaluation,
        # whose time would count as the steps'.
        if save or evaluate or done % config.log_every == 0:
            self._skipped.wait()
            log.write_means(done, self._window, self._skipped.total)
            self._window = Window()
        if evaluate:
            with self._clock.spent(EVALUATING):
                self._evaluate(log, best)
            self._window = Window()
        if save:
            self.save()

    def _evaluate(self, log: "_Log", best: Checkpoints):
        """Logs validation losses, and keeps the weights if they are the best so far."""
        params = self._state.average if self._config.ema_decay else self._state.params
        scores = self._evaluator.scores(self._whole(params), self._evaluated)
        log.write_losses(self.done, scores, self._evaluated)
        loss = float(np.mean([score.loss for score in scores.values()]))
        self._lowest = self._lowest.after(loss)
        if not self._lowest.waited:
            # Waited for: the next checkpoint says that it is there.
            taken = parallel.taken_params(params, self._abstract.params, self._layout)
            best.save_params(taken, self.done)

    def save(self):
        """Begins to write a checkpoint, unless it is there."""
        with self._clock.spent(SAVING):
            self._skipped.wait()
            log_state = {
                "window": self._window.stored(),
                "skipped": self._skipped.total,
                "lowest": dataclasses.asdict(self._lowest),
            }
            state = parallel.taken(self._state, self._abstract, self._layout)
            self._store.save(state, log_state)


def _note_plan(steps: Steps, progress: Progress):
    plan = steps.plan
    shapes = ", ".join(map(str, plan.buckets))
    steps_each = f"{plan.steps_per_epoch:,} steps an epoch"
    progress.note(f"{steps_each}; batch shapes {shapes}; padding {plan.padding:.1%}")


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
        own = restored.params, restored.opt_state, restored.average
        return TrainState(step, *own), restored.log
    if restored is not None:
        init_params = restored.params
        progress.note("starting from converted weights")
    state = initial_state(target, config, seed)
    if init_params is not None:
        with made_whole(config):
            state = with_params(state, init_params, config)
    return state, {}


def _eval_set(target: TrainingTarget, seed: int, config: TrainingConfig) -> dict[str, Subnet]:
    """The subnets that are evaluated, by name."""
    if target.subnet is not None:
        return {"subnet": target.subnet}
    space = target.space
    fixed = sampling.fixed_set(space, seed, config.eval_subnets)
    random = {f"random_{i}": subnet for i, subnet in enumerate(fixed)}
    return {"largest": space.largest(), "smallest": space.smallest(), **random}


class _Log:
    """Metrics of a run, to its folder (from the first process alone) and to the terminal."""

    def __init__(
        self, folder: Path, config: TrainingConfig, start: int, clock: Clock, progress: Progress
    ):
        self._config, self._clock, self._progress = config, clock, progress
        self._metrics = MetricsWriter(folder, start) if jax.process_index() == 0 else None
        self._task = progress.task("training", config.steps)
        self._task.update(start)
        self._done, self._status = start, None

    def show_programs(self, programs: tuple[int, int]):
        """Shows how many of the programs are compiled."""
        ready, total = programs
        status = f"compiling shape {ready + 1} of {total}" if ready < total else None
        if status != self._status:
            self._status = status
            self._task.update(self._done, status=status)

    def write_means(self, done: int, window: Window, skipped: int):
        """Means of the steps in the window; `skipped` is the number of skipped steps so far."""
        values = window.means()
        if skipped:
            values["train/skipped_steps"] = float(skipped)
        # A skipped step leaves the schedule where it is.
        rate = optimizer.rate(self._config)(max(done - skipped, 1) - 1)
        self._done = done
        values["learning_rate"] = float(np.asarray(rate))
        self._write(done, values | self._clock.shares() | memory())
        loss, speed = values.get("train/loss", math.nan), values["train/target_tokens_per_s"]
        shown = {"skipped": skipped} if skipped else {}
        self._task.update(done, loss=f"{loss:.3f}", tokens_per_s=f"{speed:,.0f}", **shown)

    def write_losses(self, done: int, scores: dict[str, Score], subnets: dict[str, Subnet]):
        """Validation losses and loads of experts by name of the subnet."""
        values = {f"valid/loss_{name}": score.loss for name, score in scores.items()}
        for name in ("largest", "random_0", "subnet"):
            if name in scores:
                values |= _routing(name, scores[name], subnets[name])
        self._write(done, values)
        shown = ", ".join(f"{name} {score.loss:.3f}" for name, score in scores.items())
        self._progress.note(f"step {done:,}: validation loss (nats a token): {shown}")

    def _write(self, done: int, values: dict[str, float]):
        if self._metrics:
            self._metrics.write(done, values)

    def close(self):
        self._task.close()
        if self._metrics:
            self._metrics.close()


def _routing(name: str, score: Score, subnet: Subnet) -> dict[str, float]:
    """Of each layer with several experts: load of each and of each FFN size, router's entropy."""
    values = {}
    for side, number, own in subnet.layers:
        if len(own.experts) == 1:
            continue
        layer, load_E = f"{side}_{number}", score.load[side, number]
        values[f"valid/entropy_{name}/{layer}"] = score.entropy[side, number]
        sizes = dict.fromkeys(own.experts, 0.0)
        for e, (size, share) in enumerate(zip(own.experts, load_E, strict=False)):
            values[f"valid/load_{name}/{layer}/expert_{e}"] = float(share)
            sizes[size] += float(share)
        values |= {f"valid/size_{name}/{layer}/{k}": share for k, share in sizes.items()}
    return values
