"""The training loop: of a supernet, or of one stand-alone subnet."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.active import ActiveSubnet, to_active
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.data import batches as batching
from automoe_jax.data.plan import Plan, choose_buckets
from automoe_jax.data.prepared import PreparedData
from automoe_jax.data.tokens import Side, TokenPairs
from automoe_jax.model.extract import extract
from automoe_jax.model.supernet import Supernet, supernet_static
from automoe_jax.model.transformer import Transformer
from automoe_jax.system.errors import UserError
from automoe_jax.system.progress import Progress
from automoe_jax.training import optimizer, parallel, sampling
from automoe_jax.training.checkpoints import Checkpoints
from automoe_jax.training.config import ModelConfig, SamplingConfig, TrainingConfig
from automoe_jax.training.metrics import MetricsWriter
from automoe_jax.training.step import TrainState, init_state, make_eval_step, make_train_step

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class TrainingTarget:
    """What `train` trains: the whole space, or one subnet of it."""

    space: SearchSpace
    vocab_sizes: tuple[int, int]  # of source and target
    model: ModelConfig
    subnet: Subnet | None = None

    def __post_init__(self):
        source, target = self.vocab_sizes
        if self.space.share_embeddings == "all" and source != target:
            raise UserError(
                f"the vocabularies of source and target have {source:,} and {target:,} entries, "
                "but space.share_embeddings is all, which needs one vocabulary; "
                "use --config.space.share_embeddings=none (or decoder)"
            )

    @property
    def hull(self) -> Subnet:
        return self.space.hull()

    def module(self) -> Supernet | Transformer:
        """The Linen module."""
        hull, rates = self.hull, (self.model.dropout, self.model.attention_dropout)
        share = self.space.share_embeddings
        if self.subnet is None:
            static = supernet_static(self.space)
            return Supernet(hull, self.vocab_sizes, static, *rates, share)
        base_dims = hull.encoder.embed_dim, hull.decoder.embed_dim
        return Transformer(self.subnet, self.vocab_sizes, *base_dims, *rates, share)

    def choice(self, subnet: Subnet) -> ActiveSubnet | None:
        """The choice that runs a subnet in the module."""
        return None if self.subnet is not None else to_active(subnet, self.hull)


def initial_state(trained: TrainingTarget, config: TrainingConfig, seed: int) -> TrainState:
    """Fresh weights with the supernet's fans; a subnet takes its part of a fresh supernet."""
    whole = dataclasses.replace(trained, subnet=None)
    tx = optimizer.make(config)
    state = init_state(whole.module(), tx, whole.choice(trained.hull), jax.random.key(seed))
    if trained.subnet is None:
        return state
    return with_params(state, extract(state.params, trained.subnet, trained.hull), config)


def with_params(state: TrainState, params: Any, config: TrainingConfig) -> TrainState:
    """The state at step 0 with other weights."""
    return TrainState(state.step, params, optimizer.make(config).init(params))


def abstract_state(trained: TrainingTarget, config: TrainingConfig, seed: int) -> TrainState:
    """Shapes and dtypes of the state; nothing is allocated."""
    return jax.eval_shape(lambda: initial_state(trained, config, seed))


def check_shapes(params: Any, abstract: Any):
    """Raises `ValueError` where weights from elsewhere are not those that a model wants."""
    if jax.tree.structure(params) != jax.tree.structure(abstract):
        raise ValueError("the weights are not those of the model")
    wrong = [
        jax.tree_util.keystr(path)
        for (path, x), y in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(abstract), strict=True
        )
        if x.shape != y.shape
    ]
    if wrong:
        raise ValueError(f"the shapes of {', '.join(wrong)} are not those of the model")


def load_params(trained: TrainingTarget, config: TrainingConfig, folder: Path) -> tuple[Any, int]:
    """The newest parameters in a run's folder, as NumPy, and their step.

    Raises:
      UserError: there is no checkpoint, or it is torn.
    """
    if not (folder / CHECKPOINTS).is_dir():
        raise UserError(f"{folder} has no checkpoint; train it first (launch/train.py)")
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{folder} has no checkpoint; train it first (launch/train.py)")
        params = abstract_state(trained, config, 0).params
        return checkpoints.restore_params(params, step), step
    finally:
        checkpoints.close()


def latest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint of a run's folder, or None."""
    if not (folder / CHECKPOINTS).is_dir():
        return None
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    try:
        return checkpoints.latest()
    finally:
        checkpoints.close()


def micro_batches(config: TrainingConfig, n_devices: int) -> int:
    """Micro-batches per device and step; `UserError` where they do not come out even."""
    if config.batches_per_step % n_devices:
        raise UserError(
            f"training.batches_per_step is {config.batches_per_step}, not a multiple of the "
            f"{n_devices} devices; use one"
        )
    return config.batches_per_step // n_devices


@functools.lru_cache(maxsize=4)
def _mapped_eval_step(trained: TrainingTarget):
    """Kept, so that training and search of one process share its compilations."""
    return parallel.map_eval_step(make_eval_step(trained.module()))


class Evaluator:
    """Validation loss of subnets with the weights at hand: one compilation per batch shape."""

    def __init__(
        self, trained: TrainingTarget, pairs: TokenPairs, config: TrainingConfig, limit: int
    ):
        self._trained = trained
        self._share = parallel.share()
        self.step = _mapped_eval_step(trained)
        pairs = first_pairs(pairs, limit)
        source, target = pairs.source.lengths, pairs.target.lengths
        # Few shapes: each compiles once, and validation sets are small.
        shapes = choose_buckets(source, target, min(config.buckets, 3), config.tokens_per_batch)
        plan = Plan(source, target, shapes, self._share.n_devices, seed=None)
        self._batches = [
            jax.tree.map(lambda x: x[:, 0], batching.assemble(pairs, plan, i, self._share))
            for i in range(plan.steps_per_epoch)
        ]

    def loss(self, params: Any, subnet: Subnet) -> float:
        """Nats per target token.

        Args:
          params: replicated parameters.
          subnet: which; of a stand-alone model, itself.
        """
        choice = self._trained.choice(subnet)
        sums = [self.step(params, batch, choice) for batch in self._batches]
        nll = sum(float(np.asarray(s.nll.addressable_data(0)).sum()) for s in sums)
        tokens = sum(float(np.asarray(s.tokens.addressable_data(0)).sum()) for s in sums)
        return nll / tokens


def first_pairs(pairs: TokenPairs, limit: int) -> TokenPairs:
    """The first `limit` pairs; all of them where the limit is 0."""
    if not limit or limit >= len(pairs):
        return pairs

    def first(side: Side) -> Side:
        return dataclasses.replace(side, starts=side.starts[: limit + 1])

    return TokenPairs(first(pairs.source), first(pairs.target), pairs.counts)


def train(
    trained: TrainingTarget,
    config: TrainingConfig,
    unit: SamplingConfig,
    seed: int,
    data: PreparedData,
    folder: Path,
    progress: Progress,
    init_params: Any | None = None,
) -> None:
    """Trains to `config.steps`, from the newest checkpoint in `folder` if there is one.

    Writes `checkpoints/`, `metrics.jsonl` and TensorBoard events. `(seed, step)` fixes subnets,
    batch and dropout, so a run that was killed and resumed is the run that was not.

    Args:
      trained: what to train.
      config: how.
      unit: who draws a subnet.
      seed: of weights, order, subnets and dropout.
      data: token ids.
      folder: of the run.
      progress: told of speed and losses.
      init_params: weights to start from instead of fresh ones.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.keep_checkpoints)
    start = checkpoints.latest()
    if start is not None and start >= config.steps:
        checkpoints.close()
        return
    share = parallel.share()
    n_micro = micro_batches(config, share.n_devices)
    source, target = data.train.source.lengths, data.train.target.lengths
    buckets = choose_buckets(source, target, config.buckets, config.tokens_per_batch)
    plan = Plan(source, target, buckets, config.batches_per_step, seed)
    shapes = ", ".join(f"{b.rows}x{b.source}/{b.target}" for b in plan.buckets)
    progress.note(
        f"{plan.steps_per_epoch:,} steps an epoch; batch shapes {shapes}; "
        f"padding {plan.padding:.1%}"
    )

    if start is not None:
        abstract = abstract_state(trained, config, seed)
        if checkpoints.has_optimizer(start):
            state = checkpoints.restore(abstract, start)
            progress.note(f"resuming at step {start:,}")
        else:
            params = checkpoints.restore_params(abstract.params, start)
            state = with_params(initial_state(trained, config, seed), params, config)
            progress.note("starting from converted weights")
    else:
        state = initial_state(trained, config, seed)
        if init_params is not None:
            state = with_params(state, init_params, config)
    start = int(state.step)
    state = parallel.replicate(state, consume=True)
    step_fn = parallel.map_train_step(
        make_train_step(
            trained.module(), optimizer.make(config), config.label_smoothing, config.load_balance
        )
    )
    evaluator = Evaluator(trained, data.valid, config, config.eval_pairs)
    evaluated = _eval_set(trained, seed, config)
    metrics = MetricsWriter(folder, start) if jax.process_index() == 0 else None
    key = jax.random.key(seed)
    task = progress.task("training", config.steps)
    task.update(start)
    window = _Window()
    try:
        arrays = batching.batches(data.train, plan, share, start, config.steps)
        for step, batch in _numbered(arrays, start):
            drawn = None
            choices = None
            if trained.subnet is None:
                drawn = sampling.draw(
                    trained.space, seed, step, share.n_devices, n_micro, unit.unit
                )
                choices = sampling.stack(drawn, trained.hull, share)
            state, out = step_fn(state, batch, choices, jax.random.fold_in(key, step))
            window.add(out, drawn)
            done = step + 1
            last = done == config.steps
            saved = last or done % config.checkpoint_every == 0
            # Also before a checkpoint: a run that goes on from there begins its means there.
            if saved or done % config.log_every == 0:
                values = window.close()
                values["learning_rate"] = float(np.asarray(optimizer.rate(config)(step)))
                if metrics:
                    metrics.write(done, values)
                if not math.isfinite(values["train/loss"]):
                    raise UserError(
                        f"the training loss is {values['train/loss']} at step {done}; lower "
                        "training.peak_rate or raise training.warmup_steps"
                    )
                task.update(
                    done,
                    loss=f"{values['train/loss']:.3f}",
                    tokens_per_s=f"{values['train/target_tokens_per_s']:,.0f}",
                )
            if last or (config.eval_every and done % config.eval_every == 0):
                losses = {
                    f"valid/loss_{name}": evaluator.loss(state.params, subnet)
                    for name, subnet in evaluated.items()
                }
                if metrics:
                    metrics.write(done, losses)
                shown = ", ".join(f"{k.split('_', 1)[1]} {v:.3f}" for k, v in losses.items())
                progress.note(f"step {done:,}: validation loss (nats a token): {shown}")
                window.restart()
            if saved:
                checkpoints.save(parallel.one_copy(state))
        checkpoints.wait()
    finally:
        task.close()
        if metrics:
            metrics.close()
        checkpoints.close()


def _numbered(arrays: Iterator[Any], start: int) -> Iterator[tuple[int, Any]]:
    return ((start + i, batch) for i, batch in enumerate(arrays))


def _eval_set(trained: TrainingTarget, seed: int, config: TrainingConfig) -> dict[str, Subnet]:
    """The subnets whose validation loss is watched, by name."""
    if trained.subnet is not None:
        return {"subnet": trained.subnet}
    space = trained.space
    fixed = sampling.fixed_set(space, seed, config.eval_subnets)
    return {
        "largest": space.largest(),
        "smallest": space.smallest(),
        **{f"random_{i}": subnet for i, subnet in enumerate(fixed)},
    }


class _Window:
    """Means since the last log line. Steps run ahead of the host: only `close` waits."""

    def __init__(self):
        self.restart()

    def restart(self):
        self._start = time.monotonic()
        self._outputs: list[Any] = []
        self._imbalance: list[float] = []

    def add(self, output: Any, drawn: Sequence[Sequence[Subnet]] | None):
        self._outputs.append(output)
        if drawn is not None and len(drawn) > 1:
            self._imbalance.append(_imbalance(drawn))
        # A step holds its batch and choices until it has run: stay a few steps ahead, no more.
        if len(self._outputs) > 4:
            jax.block_until_ready(self._outputs[-4])

    def close(self) -> dict[str, float]:
        outputs = [
            jax.tree.map(lambda x: float(np.asarray(x.addressable_data(0)).reshape(-1)[0]), out)
            for out in self._outputs
        ]
        seconds = max(time.monotonic() - self._start, 1e-9)
        target = sum(o.target_tokens for o in outputs)

        def mean(name: str) -> float:
            return sum(getattr(o, name) * o.target_tokens for o in outputs) / target

        values = {
            "train/loss": mean("loss"),
            "train/nll": mean("nll"),
            "train/load_balance": mean("load_balance"),
            "train/gradient_norm": sum(o.gradient_norm for o in outputs) / len(outputs),
            "train/target_tokens_per_s": target / seconds,
            "train/source_tokens_per_s": sum(o.source_tokens for o in outputs) / seconds,
            "train/step_s": seconds / len(outputs),
        }
        if self._imbalance:
            values["train/device_imbalance"] = float(np.mean(self._imbalance))
        self.restart()
        return values


def _imbalance(drawn: Sequence[Sequence[Subnet]]) -> float:
    """FLOPs of the busiest device over the mean: what waiting for it costs."""
    work = [sum(complexity.count(s).flops for s in row) for row in drawn]
    return max(work) / (sum(work) / len(work))
