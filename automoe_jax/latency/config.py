"""Group `latency` of a config."""

import dataclasses

from automoe_jax.system.errors import UserError

GOLD_RUNS, PARTIALLY_GOLD_RUNS = 300, 100


WORDS = ("mixed", "repeated")


@dataclasses.dataclass(frozen=True)
class LatencyConfig:
    """The paper's protocol: one sentence of 30 tokens in, 30 out, beam 5; 300 runs ("gold") or
    100 ("partially gold"), the lowest and highest 10 % dropped, the mean of the rest.

    Attributes:
      runs: timed runs per export.
      warmup: runs before them.
      threads: CPU cores to use; 0 for all.
      platform: "cpu" or "gpu".
      source_length, target_length: tokens, eos included.
      beam_size: one of the export's.
      words: "mixed" draws the source's words at random; "repeated" repeats one word, as the
        published scripts do, which routes nearly all tokens to one expert.
      kernels: "native", "xla", or "auto" for the native ones if they are available.
    """

    runs: int = GOLD_RUNS
    warmup: int = 5
    threads: int = 0
    platform: str = "cpu"
    source_length: int = 30
    target_length: int = 30
    beam_size: int = 5
    words: str = "mixed"
    kernels: str = "auto"

    def __post_init__(self):
        for name in ("runs", "source_length", "target_length", "beam_size"):
            if getattr(self, name) < 1:
                raise UserError(f"latency.{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("warmup", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"latency.{name} is {getattr(self, name)}; it cannot be negative")
        if self.words not in WORDS:
            raise UserError(f"latency.words is {self.words!r}; allowed: {', '.join(WORDS)}")
        if self.kernels not in ("auto", "native", "xla"):
            raise UserError(f"latency.kernels is {self.kernels!r}; allowed: auto, native, xla")
        if self.platform not in ("cpu", "gpu"):
            raise UserError(f"latency.platform is {self.platform!r}; allowed: cpu, gpu")

    @property
    def name(self) -> str:
        """The number of runs and its name in the field."""
        names = {GOLD_RUNS: "gold, ", PARTIALLY_GOLD_RUNS: "partially gold, "}
        return f"{names.get(self.runs, '')}{self.runs} runs"
