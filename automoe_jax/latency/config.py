"""Group `latency` of a config."""

import dataclasses

from automoe_jax.system import checks

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
        names = "runs", "source_length", "target_length", "beam_size"
        checks.at_least(1, self, "latency.", *names)
        checks.at_least(0, self, "latency.", "warmup", "threads")
        allowed = {"kernels": ("auto", "native", "xla"), "platform": ("cpu", "gpu")}
        checks.one_of(self, "latency.", words=WORDS, **allowed)

    @property
    def name(self) -> str:
        """The number of runs and its name in the field."""
        names = {GOLD_RUNS: "gold, ", PARTIALLY_GOLD_RUNS: "partially gold, "}
        return f"{names.get(self.runs, '')}{self.runs} runs"
