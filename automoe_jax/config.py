"""All settings of a run: dataclasses inside, ml_collections at the boundary.

The dataclasses alone have the defaults. `base()` makes a ConfigDict of them, a file in `configs/`
and flags change some fields, and `resolve` makes dataclasses again.
"""

import dataclasses
from typing import Any, get_args

from ml_collections import ConfigDict

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.data.config import DataConfig
from automoe_jax.data.tokenizers.config import TokenizerConfig
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.predictor.config import PredictorConfig
from automoe_jax.search.config import SearchConfig
from automoe_jax.system import checks
from automoe_jax.system.errors import UserError
from automoe_jax.training.config import ModelConfig, SamplingConfig, TrainingConfig

DISTILL_CHOICES = ("best", "nearest")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The steps of the pipeline between and after the phases.

    Attributes:
      finalists: number of found subnets to train; the best one is kept.
      halving: updates of the first of several rounds of short trainings (successive halving), which
        choose the finalists among the `search.keep` subnets that are found; with 0 they are the
        first of the search, by inherited losses.
      inherit: True to start them from the supernet's weights; the paper trains them from scratch.
      teacher: what the finalists learn from besides the text (word-level distillation, by
        `subnet_training.teacher_weight`): "supernet" for the largest subnet of the run's supernet,
        or the folder of an export or a workdir; empty for none.
      distill: whose translations of the training text stand beside it for the finalists
        (sequence-level distillation): "supernet" or the folder of an export; empty for none.
      distill_choice: which hypothesis of that teacher becomes a pair: the "best", or of its beam
        the "nearest" to the reference, by sentence BLEU.
      distill_n_best: with "best", hypotheses of a sentence that become pairs.
      train_random: whether the random subnet within the limits, which the report compares with, is
        trained as the finalists are.
      valid_sentences, test_sentences: to choose among finalists, and to report BLEU on; 0 for all.
    """

    finalists: int = 2
    halving: int = 0
    inherit: bool = False
    teacher: str = ""
    distill: str = ""
    distill_choice: str = "best"
    distill_n_best: int = 1
    train_random: bool = False
    valid_sentences: int = 0
    test_sentences: int = 0

    def __post_init__(self):
        checks.at_least(1, self, "pipeline.", "finalists")
        checks.at_least(0, self, "pipeline.", "halving", "valid_sentences", "test_sentences")
        checks.at_least(1, self, "pipeline.", "distill_n_best")
        checks.one_of(self, "pipeline.", distill_choice=DISTILL_CHOICES)
        if self.distill_choice == "nearest" and self.distill_n_best > 1:
            raise UserError(
                f"pipeline.distill_n_best is {self.distill_n_best}, but pipeline.distill_choice "
                "'nearest' takes one hypothesis; leave one of them out"
            )
        if not self.distill and (self.distill_choice, self.distill_n_best) != ("best", 1):
            raise UserError(
                f"pipeline.distill_choice is {self.distill_choice!r} and pipeline.distill_n_best "
                f"{self.distill_n_best}, but nothing is distilled; give pipeline.distill a "
                "teacher, as supernet, or leave them out"
            )

    def chooses_among(self, found: int) -> bool:
        """Whether so many found subnets leave successive halving something to choose."""
        return found > max(self.finalists, 2)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The groups of a config file; `training` is the supernet's, `sampling` that of its subnets.

    Attributes:
      seed: of data, initial weights, subnets and dropout.
    """

    seed: int = 0
    data: DataConfig = DataConfig("phrases", "en", "de")
    tokenizer: TokenizerConfig = TokenizerConfig()
    space: SearchSpace = SearchSpace()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    subnet_training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    predictor: PredictorConfig = PredictorConfig()
    latency: LatencyConfig = LatencyConfig()
    export: ExportConfig = ExportConfig()
    pipeline: PipelineConfig = PipelineConfig()

    def __post_init__(self):
        if self.sampling.random_experts and self.space.sharing != "front":
            raise UserError(
                f"config.sampling.random_experts is true and config.space.sharing is "
                f"{self.space.sharing!r}: only with 'front' is any expert as good as the first; "
                "leave one out"
            )

        placed = self.space.encoder_placement or self.space.decoder_placement
        if self.sampling.unit == "equal_compute" and placed:
            raise UserError(
                "config.sampling.unit is 'equal_compute', which exchanges layers, and config.space "
                "has a placement, which fixes them; use another unit, or leave the placement out"
            )
        if self.sampling.alike_share and placed:
            raise UserError(
                f"config.sampling.alike_share is {self.sampling.alike_share}, which makes layers "
                "alike, and config.space has a placement, which makes them differ; leave one out"
            )
        keep, pipeline = self.search.keep, self.pipeline
        if pipeline.halving and not pipeline.chooses_among(keep):
            raise UserError(
                f"config.pipeline.halving is {pipeline.halving}, but config.search.keep is {keep}: "
                f"there is nothing to choose for finalists={pipeline.finalists}; use "
                f"--config.search.keep={2 * max(pipeline.finalists, 2)} or more, or halving=0"
            )
        spread = self.training.shard_optimizer or self.training.expert_parallel > 1
        if self.sampling.project_conflicts and spread:
            raise UserError(
                "config.sampling.project_conflicts is true, which needs whole gradients on each "
                "device; leave it out, or config.training.shard_optimizer and expert_parallel"
            )
        self._check_expert_parallel()

    def _check_expert_parallel(self):
        n = self.training.expert_parallel
        if self.subnet_training.expert_parallel > 1:
            raise UserError(
                "config.subnet_training.expert_parallel is "
                f"{self.subnet_training.expert_parallel}: only a supernet's experts can be spread; "
                "use --config.subnet_training.expert_parallel=1"
            )
        if n == 1:
            return
        given = f"config.training.expert_parallel is {n}, but"
        if self.sampling.unit != "update":
            raise UserError(
                f"{given} config.sampling.unit is {self.sampling.unit!r}: devices that have a part "
                "of the experts each run the same subnet; use --config.sampling.unit=update"
            )
        if self.space.sharing != "front":
            raise UserError(
                f"{given} config.space.sharing is {self.space.sharing!r}: experts that are made of "
                "several are on no device of their own; use 'front'"
            )
        for side, number, layer in self.space.hull().layers:
            if len(layer.experts) % n:
                raise UserError(
                    f"{given} layer {number} of the {side} has {len(layer.experts)} expert(s) at "
                    f"most, which {n} devices cannot share equally; use a divisor of the numbers "
                    "of all layers"
                )

    def groups(self, *names: str) -> dict[str, Any]:
        """The named groups, for a manifest."""
        return {name: getattr(self, name) for name in names}


_DEFAULTS = RunConfig()


def base() -> Any:
    """A `ConfigDict` with every default: the paper's settings on the `phrases` corpus."""
    return ConfigDict(dataclasses.asdict(_DEFAULTS))


def resolve(config: ConfigDict) -> RunConfig:
    """The checked settings; `UserError` for an unknown group or field, a wrong type or range."""
    names = [f.name for f in dataclasses.fields(RunConfig)]
    for name in config:
        if name not in names:
            raise UserError(f"config.{name} is not a group; groups: {', '.join(names)}")
    values = {}
    for name in names:
        if name not in config:
            raise UserError(
                f"config.{name} is missing; start the file from automoe_jax.config.base()"
            )
        values[name] = value = config[name]
        if name != "seed":
            values[name] = _group(name, getattr(_DEFAULTS, name), value)
        elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"config.seed is {value!r}; an integer of at least 0 is needed")
    return RunConfig(**values)


def from_stored(groups: dict[str, Any]) -> RunConfig:
    """The settings of the groups in a folder's manifest; other groups have their defaults.

    What else a manifest says, as an architecture or where weights started, is no setting.
    """
    defaults = dataclasses.asdict(_DEFAULTS)
    return resolve(ConfigDict({name: groups.get(name, own) for name, own in defaults.items()}))


def _group(name: str, defaults: Any, group: Any):
    kind = type(defaults)
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for field, given in group.items():
        if field not in known:
            raise UserError(f"config.{name}.{field} is not a field; fields: {', '.join(known)}")
        default = getattr(defaults, field)
        wanted = type(default)
        if dataclasses.is_dataclass(wanted):
            values[field] = _group(f"{name}.{field}", default, given)
            continue
        value: Any = _as_tuple(given) if wanted is tuple else given
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(
                f"config.{name}.{field} is {value!r}; a {wanted.__name__} is needed, as {default!r}"
            )
        if wanted is tuple:
            inner = get_args(known[field].type)[0]
            if any(type(x) is not inner for x in value):
                raise UserError(
                    f"config.{name}.{field} is {value!r}; each entry must be of type "
                    f"{inner.__name__}"
                )
        values[field] = value
    try:
        return kind(**values)
    except UserError as e:
        where = str(e).removeprefix(f"{name.rsplit('.', maxsplit=1)[-1]}.")
        raise type(e)(f"config.{name}.{where}") from None


def _as_tuple(value: Any) -> Any:
    """A tuple of what a flag gives: one entry, a list, or text with commas."""
    if isinstance(value, int | str):
        value = (value,)
    if not isinstance(value, list | tuple):
        return value
    split = (x.split(",") if isinstance(x, str) else [x] for x in value)
    return tuple(x for entries in split for x in entries if x != "")
