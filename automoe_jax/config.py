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
from automoe_jax.system.errors import UserError
from automoe_jax.training.config import ModelConfig, SamplingConfig, TrainingConfig


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The steps of the pipeline between and after the phases.

    Attributes:
      finalists: number of found subnets to train; the best one is kept.
      inherit: True to start them from the supernet's weights; the paper trains them from scratch.
      valid_sentences: validation sentences for choosing among finalists; 0 for all.
      test_sentences: test sentences for the reported BLEU; 0 for all.
    """

    finalists: int = 2
    inherit: bool = False
    valid_sentences: int = 0
    test_sentences: int = 0

    def __post_init__(self):
        if self.finalists < 1:
            raise UserError(f"pipeline.finalists is {self.finalists}; at least 1 is needed")
        for name in ("valid_sentences", "test_sentences"):
            if getattr(self, name) < 0:
                raise UserError(f"pipeline.{name} is {getattr(self, name)}; it cannot be negative")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One attribute per group of a config file.

    Attributes:
      seed: seed of all random numbers.
      data: the corpus.
      tokenizer: the vocabulary.
      space: the search space.
      model: dropout.
      training: training of the supernet.
      sampling: sampling of subnets while the supernet trains.
      subnet_training: training of a stand-alone subnet.
      search: the algorithm and its limits.
      predictor: fitting of a latency model.
      latency: measuring of latency.
      export: content of an export.
      pipeline: the steps between and after the phases.
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

    def groups(self, *names: str) -> dict[str, Any]:
        """The named groups, for a manifest."""
        return {name: getattr(self, name) for name in names}


_DEFAULTS = RunConfig()


def base() -> Any:
    """A `ConfigDict` with every default: the paper's settings on the `phrases` corpus."""
    return ConfigDict(dataclasses.asdict(_DEFAULTS))


def resolve(config: ConfigDict) -> RunConfig:
    """The checked settings of a config.

    Raises:
      UserError: a group or field is unknown, of the wrong type, or out of range.
    """
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
        value = config[name]
        if name == "seed":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"config.seed is {value!r}; an integer of at least 0 is needed")
            values[name] = value
        else:
            values[name] = _group(name, getattr(_DEFAULTS, name), value)
    return RunConfig(**values)


def _group(name: str, defaults: Any, group: Any):
    kind = type(defaults)
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for field, given in group.items():
        if field not in known:
            raise UserError(f"config.{name}.{field} is not a field; fields: {', '.join(known)}")
        value: Any = given
        wanted = type(getattr(defaults, field))
        if dataclasses.is_dataclass(wanted):
            values[field] = _group(f"{name}.{field}", getattr(defaults, field), value)
            continue
        if wanted is tuple:
            value = _as_tuple(value)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(
                f"config.{name}.{field} is {value!r}; a {wanted.__name__} is needed, as "
                f"{getattr(defaults, field)!r}"
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
    entries = []
    for x in value:
        entries += x.split(",") if isinstance(x, str) else [x]
    return tuple(x for x in entries if x != "")
