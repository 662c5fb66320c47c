"""Groups `model`, `training`, `subnet_training` and `sampling` of a config."""

import dataclasses
import math

from automoe_jax.system import checks
from automoe_jax.system.errors import UserError

SCHEDULES = ("cosine", "inverse_sqrt", "linear")
FINAL_WEIGHTS = ("last", "average", "ema", "best")
SAMPLING_UNITS = ("micro_batch", "device", "update", "equal_compute")
RULES = ("random", "sandwich")
REMATS = ("none", "layer")
COMPUTE_DTYPES = ("float32", "bfloat16")
INHERITED_EXPERTS = ("first", "used", "merged")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam without clipping or weight decay.

    Attributes:
      steps: updates.
      warmup_steps: updates in which the rate rises linearly, from `initial_rate` to `peak_rate`.
      schedule: of the rate after the warm-up. "cosine" and "linear" end at `final_rate` at `steps`
        and are constant after them (the published cosine jumps back to the peak for its last
        update). "inverse_sqrt" falls with the square root of the updates (Vaswani et al. 2017),
        whatever `steps`, but not below `final_rate`.
      initial_rate, peak_rate, final_rate: learning rates.
      b1, b2: decays of the averages of gradients and of their squares.
      eps: added to the root of the averaged squares.
    """

    steps: int = 40_000
    warmup_steps: int = 10_000
    schedule: str = "cosine"
    initial_rate: float = 1e-7
    peak_rate: float = 1e-3
    final_rate: float = 1e-7
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8

    def __post_init__(self):
        checks.one_of(self, "", schedule=SCHEDULES)
        for name in ("initial_rate", "peak_rate", "final_rate", "b1", "b2", "eps"):
            bound = 1.0 if name in ("b1", "b2") else math.inf
            if not 0 <= getattr(self, name) < bound:
                raise UserError(
                    f"{name} is {getattr(self, name)}; allowed: 0 up to below {bound:g}"
                )
        checks.at_least(1, self, "", "steps")
        if not 0 <= self.warmup_steps <= self.steps:
            raise UserError(
                f"warmup_steps is {self.warmup_steps}; allowed: 0 to steps {self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Regularisation, group `model` of a config."""

    dropout: float = 0.3  # at the supernet's width, scaled to the subnet's
    attention_dropout: float = 0.1  # on attention probabilities, not scaled
    router_jitter: float = 0.0  # routers' inputs times uniform noise in 1 +- this, while training

    def __post_init__(self):
        for name in ("dropout", "attention_dropout", "router_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; allowed: 0 up to below 1")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Which subnets a step trains, and whether they learn from another; group `sampling`.

    The defaults are the published ones, but for `unit`.

    Attributes:
      unit: what runs one subnet, or one sandwich: a "micro_batch" of a device, a "device" or the
        whole "update" (the paper's). "equal_compute" draws one for each micro-batch of the update,
        whose layers each device runs in an order of its own: all devices compute as much, so that
        none waits for another, and each draws as uniformly as without it.
      rule: "random" draws one subnet. "sandwich" (Yu & Huang 2019, arXiv 1903.05134) runs each
        batch through several: the largest, the smallest, and random ones.
      sandwich: their number, 2 or more.
      largest_share: probability that a random subnet is the largest instead.
      experts_bias: a layer of a random subnet has n experts with a probability proportional to n to
        this power. With 1, the experts of any number get equally many tokens each.
      depth_bias: a stack of a random subnet has n layers with a probability proportional to n to
        this power: the layers that only deep stacks have are trained more often.
      alike_share: probability that a random subnet has all layers of a side like its first one, as
        those made by hand; drawn layer by layer, hardly any are.
      flops_draws: of this many random subnets the one is trained whose FLOPs are nearest to a
        number drawn uniformly between the smallest subnet's and the largest's, as FLOPs of plain
        draws lie about their mean (AttentiveNAS, Wang et al. 2021, arXiv 2011.09011, draws by
        FLOPs too); 1 for plain draws.
      random_experts: a layer of n experts has any n of the supernet's, drawn at random, in place of
        the first, so that all are trained alike; it needs `space.sharing` "front".
      project_conflicts: where the gradient of a sandwich's largest subnet opposes that of its
        others, the former loses the part that does (NASViT, Gong et al. 2022).
      largest_first: updates at the start that train the largest subnet alone (progressive
        shrinking, Cai et al. 2020, arXiv 1908.09791).
      distillation: weight of the largest subnet's predictions in the loss of a sandwich's others,
        from 0, labels alone, to 1, these alone.
      temperature: of these predictions.
    """

    unit: str = "micro_batch"
    rule: str = "random"
    sandwich: int = 4
    largest_share: float = 0.0
    experts_bias: float = 0.0
    depth_bias: float = 0.0
    alike_share: float = 0.0
    flops_draws: int = 1
    random_experts: bool = False
    project_conflicts: bool = False
    largest_first: int = 0
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        checks.one_of(self, "sampling.", unit=SAMPLING_UNITS, rule=RULES)
        checks.at_least(2, self, "sampling.", "sandwich")
        checks.at_least(0, self, "sampling.", "largest_first")
        checks.at_least(1, self, "sampling.", "flops_draws")
        for name in ("largest_share", "alike_share", "distillation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"sampling.{name} is {getattr(self, name)}; allowed: 0 to 1")
        for name in ("experts_bias", "depth_bias"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"sampling.{name} is {getattr(self, name)}; allowed: 0 or more")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"sampling.temperature is {self.temperature}; allowed: above 0")
        for name in ("distillation", "project_conflicts"):
            if getattr(self, name) and self.rule != "sandwich":
                raise UserError(
                    f"sampling.{name} is {getattr(self, name)}, but sampling.rule is "
                    f"{self.rule!r}: only a sandwich has a largest subnet and others; use "
                    "--config.sampling.rule=sandwich"
                )

    def subnets(self, step: int) -> int:
        """The number of subnets that a batch of this step runs."""
        return self.sandwich if self.rule == "sandwich" and step >= self.largest_first else 1


@dataclasses.dataclass(frozen=True)
class TrainingConfig(OptimizerConfig):
    """One training, group `training` (supernet) or `subnet_training` of a config.

    Attributes:
      batches_per_step: of an update, spread over all devices; where there are more than devices,
        they are accumulated as micro-batches. The paper: 128 of 4,096 tokens.
      encoder_load_balance, decoder_load_balance: weights of each layer's own, from the first, in
        place of `load_balance`; both sides or none.
      teacher_weight: of a teacher's predictions in the loss, in place of the labels (word-level
        distillation); without a teacher unused.
      teacher_temperature: of the softmax of these predictions.
      final_weights: those that evaluation, export, search and the training of a subnet take from
        it: of the "last" update; the "average" of the newest `averaged_checkpoints`; "ema", the
        exponential moving average over updates with `ema_decay`; or the "best", with the lowest
        validation loss (of a supernet: the mean over its evaluated subnets). With `ema_decay`,
        validation losses and the best weights are those of the moving average.
      averaged_checkpoints: how many "average" takes.
    """

    tokens_per_batch: int = 4096  # of one device and micro-batch: rows times the longer side
    batches_per_step: int = 128
    # Of activations and products; weights, sums, norms, softmax, routers and losses are float32.
    compute_dtype: str = "float32"
    buckets: int = 8  # most batch shapes; each compiles once
    label_smoothing: float = 0.1  # share of the target spread over all words
    load_balance: float = 0.01  # weight of the routers' load-balance loss, mean over layers
    encoder_load_balance: tuple[float, ...] = ()
    decoder_load_balance: tuple[float, ...] = ()
    router_z: float = 0.0  # weight of the routers' z-loss, mean over layers
    teacher_weight: float = 0.5
    teacher_temperature: float = 1.0
    # Which experts of a layer a subnet that starts from a supernet takes: the "first" ones, as it
    # has them there; the most "used" on validation text; or these, the others "merged" in.
    inherited_experts: str = "first"
    # What is computed again in the backward pass, in place of being stored: nothing, or each layer.
    remat: str = "none"
    # Each device keeps and updates a part of weights and optimizer (ZeRO stage 1), but of experts
    # that are spread.
    shard_optimizer: bool = False
    # Devices that the experts of each layer of a supernet are spread over, with their part of the
    # optimizer's state; 1: each has all. They run one subnet, each the experts that it has. A
    # search needs room for all on one device.
    expert_parallel: int = 1
    max_skipped: int = 20  # steps in a row with a loss or gradient not finite that end the run
    log_every: int = 50  # steps
    eval_every: int = 1000  # steps; 0 evaluates only at the end
    eval_pairs: int = 0  # validation pairs to evaluate on; 0 for all
    eval_subnets: int = 3  # random ones, besides the largest and smallest
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2  # the newest, beside the best
    patience: int = 0  # evaluations in a row without a lower loss that end the training; 0: never
    ema_decay: float = 0.0  # of the moving average, less in the first updates; 0 for none
    final_weights: str = "last"
    averaged_checkpoints: int = 5

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "", "tokens_per_batch", "batches_per_step", "buckets", "log_every",
                        "checkpoint_every", "keep_checkpoints", "max_skipped",
                        "averaged_checkpoints", "expert_parallel")  # fmt: skip
        checks.at_least(0, self, "", "load_balance", "router_z", "eval_every", "eval_pairs",
                        "eval_subnets", "patience")  # fmt: skip
        allowed = {"final_weights": FINAL_WEIGHTS, "inherited_experts": INHERITED_EXPERTS}
        checks.one_of(self, "", compute_dtype=COMPUTE_DTYPES, remat=REMATS, **allowed)
        self._check_final_weights()
        for name in ("encoder_load_balance", "decoder_load_balance"):
            if not all(0 <= weight < math.inf for weight in getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 0 or more each")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; allowed: 0 to 1")
        if not 0 <= self.teacher_weight <= 1:
            raise UserError(f"teacher_weight is {self.teacher_weight}; allowed: 0 to 1")
        if not 0 < self.teacher_temperature < math.inf:
            raise UserError(f"teacher_temperature is {self.teacher_temperature}; allowed: above 0")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; allowed: 0 up to below 1")

    def weights_for(self, name: str) -> dict[str, str]:
        """What a manifest says, under `name`, of the weights that are taken; {} for the last."""
        if self.final_weights == "last":
            return {}
        average = self.final_weights == "average"
        return {name: f"average of {self.averaged_checkpoints}" if average else self.final_weights}

    def _check_final_weights(self):
        if self.final_weights == "ema" and not self.ema_decay:
            raise UserError(
                "final_weights is 'ema', but ema_decay is 0: there is no moving average; use a "
                "decay, as 0.999"
            )
        if self.final_weights == "average" and self.averaged_checkpoints > self.keep_checkpoints:
            raise UserError(
                f"averaged_checkpoints is {self.averaged_checkpoints}, but keep_checkpoints is "
                f"{self.keep_checkpoints}: the others are gone by then; keep as many"
            )
        if self.patience and not self.eval_every:
            raise UserError(
                f"patience is {self.patience}, but eval_every is 0: nothing is evaluated before "
                "the end; give both, or neither"
            )
