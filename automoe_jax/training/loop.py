"""The training loop: of a supernet, or of one stand-alone subnet."""

import contextlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data.tokens import PreparedData
from automoe_jax.system import interrupt
from automoe_jax.system.progress import Progress
from automoe_jax.training import optimizer, parallel, sampling
from automoe_jax.training.checkpoints import CHECKPOINTS, Checkpoints
from automoe_jax.training.config import SamplingConfig, TrainingConfig
from automoe_jax.training.evaluation import Evaluator
from automoe_jax.training.metrics import MetricsWriter
from automoe_jax.training.monitor import SkippedSteps, Window
from automoe_jax.training.step import TrainState
from automoe_jax.training.steps import Steps
from automoe_jax.training.target import TrainingTarget, abstract_state, initial_state, with_params


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
        steps = Steps(target, config, sampling_config, seed, data)
        _note_plan(steps, progress)
        # Compiled meanwhile, if it turns out to be the first step.
        steps.compile_ahead(store.latest() or 0, most=1)
        state, before = _start(target, config, seed, store, init_params, progress)
        start = done = int(state.step)
        steps.compile_ahead(start, most=1)
        state = parallel.replicate(state, consume=True)
        evaluator = Evaluator(target, data.valid, config, config.eval_pairs)
        evaluated = _eval_set(target, seed, config)
        window = Window.restored(before.get("window", {}))
        skipped = SkippedSteps(config.max_skipped, steps.describe, before.get("skipped", 0))
        with (
            interrupt.deferred(defer=jax.process_count() == 1) as interrupted,
            contextlib.closing(steps),
            contextlib.closing(_Log(folder, config, start, progress)) as log,
        ):

            def stop() -> bool:
                log.show_programs(steps.programs())
                return interrupted()

            for step, batch in enumerate(steps.batches(start), start):
                drawn = steps.subnets(step)
                ran = steps.run(step, state, batch, drawn, stop)
                if ran is None:
                    break
                state, out = ran
                if step == start:
                    steps.compile_ahead(start)
                    evaluator.compile_ahead(state.params)
                window.add(out, drawn)
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
                if save:
                    store.save(parallel.one_copy(state), _log_state(window, skipped))
                if stop() or store.preempted(done):
                    break
            if done < config.steps:
                if done > start:
                    store.save(parallel.one_copy(state), _log_state(window, skipped))
                progress.note(f"stopping at step {done:,}, which is saved")
            store.wait()


def _note_plan(steps: Steps, progress: Progress):
    plan = steps.plan
    shapes = ", ".join(map(str, plan.buckets))
    steps_each = f"{plan.steps_per_epoch:,} steps an epoch"
    progress.note(f"{steps_each}; batch shapes {shapes}; padding {plan.padding:.1%}")


def _log_state(window: Window, skipped: SkippedSteps) -> dict[str, Any]:
    """What a checkpoint stores for the log; `_start` returns it."""
    skipped.wait()
    return {"window": window.stored(), "skipped": skipped.total}


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


class _Log:
    """Metrics of a run, to its folder (from the first process alone) and to the terminal."""

    def __init__(self, folder: Path, config: TrainingConfig, start: int, progress: Progress):
        self._config, self._progress = config, progress
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
