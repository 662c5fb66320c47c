"""Group `export` of a config."""

import dataclasses

from automoe_jax.system import checks
from automoe_jax.system.errors import UserError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
QUANTIZATIONS = ("none", "int8")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What an export translates with, and approximations of it.

    Attributes:
      beam_sizes, platforms: each beam size has a program of its own on each platform.
      quantize: "none", or "int8" for 8-bit matrices and activations; embeddings, norms and routers
        stay fp32.
      shortlist: target words allowed for each source word, besides the most frequent ones, by a
        lexicon counted from the training text; only 0, all words, is exact.
    """

    beam_sizes: tuple[int, ...] = (1, 4, 5)
    platforms: tuple[str, ...] = ("cpu",)
    quantize: str = "none"
    shortlist: int = 0

    def __post_init__(self):
        if not self.beam_sizes or any(b < 1 for b in self.beam_sizes):
            raise UserError(f"export.beam_sizes is {self.beam_sizes}; positive sizes are needed")
        if not self.platforms or any(p not in PLATFORMS for p in self.platforms):
            raise UserError(
                f"export.platforms is {self.platforms}; allowed: {', '.join(PLATFORMS)}"
            )
        checks.at_least(0, self, "export.", "shortlist")
        checks.one_of(self, "export.", quantize=QUANTIZATIONS)

    @property
    def exact(self) -> bool:
        """Whether exports compute the same as their model."""
        return self.quantize == "none" and not self.shortlist
