"""Group `pipeline` of a config."""

import dataclasses

from automoe_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What `launch/pipeline.py` does between and after the phases.

    Attributes:
      finalists: best subnets of the search that are trained; the better one is kept.
      inherit: whether they start from the supernet's weights; the paper trains them from scratch.
      valid_sentences: validation sentences to choose between finalists on; 0 for all.
      test_sentences: test sentences to report BLEU on; 0 for all.
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
