"""Groups `model`, `training`, `subnet_training` and `sampling` of a config."""

import dataclasses
import math
from typing import Any

from automoe_jax.system.errors import UserError

SAMPLING_UNITS = ("micro_batch", "device", "update")


def _check(
    config: Any, names: tuple[str, ...], least: float, below: float, allowed: str, group: str = ""
):
    """Raises `UserError` if one of the fields is not in [least, below)."""
    for name in names:
        if not least <= getattr(config, name) < below:
            raise UserError(f"{group}{name} is {getattr(config, name)}; {allowed}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam without clipping or weight decay.

    Learning rate: linear from `initial_rate` to `peak_rate` in `warmup_steps`, then cosine to
    `final_rate` at `steps` and constant from there on (the published code jumps back to the peak
    for its last update).
    """

    steps: int = 40_000
    warmup_steps: int = 10_000
    initial_rate: float = 1e-7
    peak_rate: float = 1e-3
    final_rate: float = 1e-7
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8

    def __post_init__(self):
        rates = ("initial_rate", "peak_rate", "final_rate", "eps")
        _check(self, rates, 0, math.inf, "allowed: 0 up to below inf")
        _check(self, ("b1", "b2"), 0, 1, "allowed: 0 up to below 1")
        _check(self, ("steps",), 1, math.inf, "at least 1 is needed")
        _check(self, ("warmup_steps",), 0, self.steps + 1, f"allowed: 0 to steps {self.steps}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Regularisation, group `model` of a config."""

    dropout: float = 0.3  # at the supernet's width, scaled to the subnet's
    attention_dropout: float = 0.1  # on attention probabilities, not scaled

    def __post_init__(self):
        rates = ("dropout", "attention_dropout")
        _check(self, rates, 0, 1, "allowed: 0 up to below 1", "model.")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a step draws its subnets, group `sampling` of a config.

    One subnet runs a "micro_batch" of a device, a "device" or the whole "update" (the paper's).
    """

    unit: str = "micro_batch"

    def __post_init__(self):
        if self.unit not in SAMPLING_UNITS:
            raise UserError(f"sampling.unit is {self.unit!r}; allowed: {', '.join(SAMPLING_UNITS)}")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(OptimizerConfig):
    """One training, group `training` (supernet) or `subnet_training` of a config.

    The batches of an update are spread over all devices; more batches than devices are accumulated
    as micro-batches. The paper: 128 of 4,096 tokens.
    """

    tokens_per_batch: int = 4096  # of one device and micro-batch: rows times the longer side
    batches_per_step: int = 128
    buckets: int = 8  # most batch shapes; each compiles once
    label_smoothing: float = 0.1  # share of the target spread over all words
    load_balance: float = 0.01  # weight of the router's load-balance loss
    log_every: int = 50  # steps
    eval_every: int = 1000  # steps; 0 evaluates only at the end
    eval_pairs: int = 0  # validation pairs to evaluate on; 0 for all
    eval_subnets: int = 3  # random ones, besides the largest and smallest
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2  # the newest

    def __post_init__(self):
        super().__post_init__()
        counts = ("tokens_per_batch", "batches_per_step", "buckets", "log_every")
        counts += ("checkpoint_every", "keep_checkpoints")
        _check(self, counts, 1, math.inf, "at least 1 is needed")
        from_zero = ("load_balance", "eval_every", "eval_pairs", "eval_subnets")
        _check(self, from_zero, 0, math.inf, "it cannot be negative")
        _check(self, ("label_smoothing",), 0, 1, "allowed: 0 to 1")
