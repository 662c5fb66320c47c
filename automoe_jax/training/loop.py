"""The training loop: of a supernet, or of one stand-alone subnet."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import Subnet
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
from automoe_jax.training.step import StepMetrics, TrainState, make_train_step
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
        share = parallel.share()
        n_micro = micro_batches(config, share.n_devices)
        plan = _plan(config, data, seed, progress)
        state, log = _start(target, config, seed, store, init_params, progress)
        start = int(state.step)
        state = parallel.replicate(state, consume=True)
        tx, rates = optimizer.make(config), (config.label_smoothing, config.load_balance)
        train_step = parallel.map_train_step(make_train_step(target.module(), tx, *rates))
        evaluator = Evaluator(target, data.valid, config, config.eval_pairs)
        evaluated = _eval_set(target, seed, config)
        key, window = jax.random.key(seed), _Window.restored(log)
        batches = batching.batches(data.train, plan, share, start, config.steps)
        with (
            interrupt.deferred(defer=jax.process_count() == 1) as interrupted,
            contextlib.closing(_Log(folder, config, start, progress)) as log,
        ):
            for step, batch in enumerate(batches, start):
                subnets = active = None
                if target.subnet is None:
                    draw = (seed, step, share.n_devices, n_micro, sampling_config.unit)
                    subnets = sampling.draw(target.space, *draw)
                    active = sampling.stack(subnets, target.hull, share)
                state, out = train_step(state, batch, active, jax.random.fold_in(key, step))
                window.add(out, subnets)
                done = step + 1
                save = done == config.steps or done % config.checkpoint_every == 0
                # Also before a checkpoint: a resumed run begins its means there.
                if save or done % config.log_every == 0:
                    log.write_means(done, window)
                    window = _Window()
                if done == config.steps or (config.eval_every and done % config.eval_every == 0):
                    log.write_losses(done, evaluator.losses(state.params, evaluated))
                    window = _Window()
                stop = interrupted() or store.preempted(done)
                if save or stop:
                    store.save(parallel.one_copy(state), window.stored())
                if stop:
                    store.wait()
                    progress.note(f"stopping at step {done:,}, which is saved")
                    break
            store.wait()


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
) -> tuple[TrainState, Any]:
    """The state of the newest checkpoint and its log, else a state of step 0 and None."""
    restored = checkpoints.restore(abstract_state(target, config, seed), progress.note)
    if restored is not None and restored.opt_state is not None:
        progress.note(f"resuming at step {restored.step:,}")
        step = np.asarray(restored.step, np.int32)
        return TrainState(step, restored.params, restored.opt_state), restored.log
    if restored is not None:
        init_params = restored.params
        progress.note("starting from converted weights")
    state = initial_state(target, config, seed)
    return state if init_params is None else with_params(state, init_params, config), None


def _eval_set(target: TrainingTarget, seed: int, config: TrainingConfig) -> dict[str, Subnet]:
    """The subnets that are evaluated, by name."""
    if target.subnet is not None:
        return {"subnet": target.subnet}
    space = target.space
    fixed = sampling.fixed_set(space, seed, config.eval_subnets)
    random = {f"random_{i}": subnet for i, subnet in enumerate(fixed)}
    return {"largest": space.largest(), "smallest": space.smallest(), **random}


@dataclasses.dataclass(frozen=True)
class _Window:
    """The steps since the last log line. Steps run ahead of the host; only `means` waits."""

    start: float = dataclasses.field(default_factory=time.monotonic)
    outputs: list[StepMetrics] = dataclasses.field(default_factory=list)
    imbalances: list[float] = dataclasses.field(default_factory=list)
    n_restored: int = 0  # of the outputs, those of an interrupted process

    @classmethod
    def restored(cls, stored: Any | None) -> "_Window":
        """The window that an interrupted process stored; an empty one for None."""
        if stored is None:
            return cls()
        outputs = [StepMetrics(*values) for values in stored["outputs"]]
        return cls(outputs=outputs, imbalances=stored["imbalances"], n_restored=len(outputs))

    def stored(self) -> dict[str, Any]:
        """The window as JSON, for a checkpoint."""
        return {"outputs": [list(_floats(o)) for o in self.outputs], "imbalances": self.imbalances}

    def add(self, output: StepMetrics, subnets: Sequence[Sequence[Subnet]] | None):
        self.outputs.append(output)
        if subnets is not None and len(subnets) > 1:
            # FLOPs of the busiest device over the mean: the cost of waiting for it.
            work = [sum(complexity.count(subnet).flops for subnet in row) for row in subnets]
            self.imbalances.append(max(work) / (sum(work) / len(work)))
        # A step holds its batch and subnets until it has run: stay only a few steps ahead.
        if len(self.outputs) > 4:
            jax.block_until_ready(self.outputs[-4])

    def means(self) -> dict[str, float]:
        outputs: list[Any] = [_floats(o) for o in self.outputs]
        seconds = max(time.monotonic() - self.start, 1e-9)
        target = sum(o.target_tokens for o in outputs)
        values = {
            f"train/{name}": sum(getattr(o, name) * o.target_tokens for o in outputs) / target
            for name in ("loss", "nll", "load_balance")
        }
        own = outputs[self.n_restored :]
        values |= {
            "train/gradient_norm": sum(o.gradient_norm for o in outputs) / len(outputs),
            "train/target_tokens_per_s": sum(o.target_tokens for o in own) / seconds,
            "train/source_tokens_per_s": sum(o.source_tokens for o in own) / seconds,
            "train/step_s": seconds / max(len(own), 1),
        }
        if self.imbalances:
            values["train/device_imbalance"] = float(np.mean(self.imbalances))
        return values


def _floats(output: StepMetrics) -> StepMetrics:
    """Metrics of the first device as numbers; waits for the step."""
    if isinstance(output.loss, float):
        return output
    return jax.tree.map(lambda x: float(np.asarray(x.addressable_data(0)).reshape(-1)[0]), output)


class _Log:
    """Metrics of a run, to its folder (from the first process alone) and to the terminal."""

    def __init__(self, folder: Path, config: TrainingConfig, start: int, progress: Progress):
        self._config, self._progress = config, progress
        self._metrics = MetricsWriter(folder, start) if jax.process_index() == 0 else None
        self._task = progress.task("training", config.steps)
        self._task.update(start)

    def write_means(self, done: int, window: _Window):
        """Means of the steps in the window; `UserError` if the loss is not finite."""
        values = window.means()
        loss = values["train/loss"]
        rate = optimizer.rate(self._config)(done - 1)
        self._write(done, {**values, "learning_rate": float(np.asarray(rate))})
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss is {loss} at step {done}; lower training.peak_rate or raise "
                "training.warmup_steps"
            )
        speed = f"{values['train/target_tokens_per_s']:,.0f}"
        self._task.update(done, loss=f"{loss:.3f}", tokens_per_s=speed)

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
