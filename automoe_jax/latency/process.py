"""Latency of exported subnets: measured in a process of its own, interleaved, tails dropped.

A timed process is a child: the number of threads can only be set before JAX starts, and the
memory and threads of a training process would disturb.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from automoe_jax.system import malloc as huge_pages
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
      words: "mixed" draws the source's words at random; "repeated" is one word over and over, as
        in the published scripts, which sends nearly all tokens to one expert.
      kernels: "native", "xla", or "auto" for the first where it can be had.
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
        """The number of runs, with what the field calls it."""
        names = {GOLD_RUNS: "gold, ", PARTIALLY_GOLD_RUNS: "partially gold, "}
        return f"{names.get(self.runs, '')}{self.runs} runs"


@dataclasses.dataclass(frozen=True)
class Latency:
    """Summary of one export's timed runs, in ms."""

    mean_ms: float  # of the runs between the 10 % tails
    std_ms: float  # of the same runs
    median_ms: float
    min_ms: float
    runs: int


def kernels_used(config: LatencyConfig) -> str:
    """Which kernels exports are timed on here: "native" or "xla"."""
    from automoe_jax.decoding import native  # noqa: PLC0415 settings are read without JAX

    wanted = config.platform == "cpu" and config.kernels != "xla"
    return "native" if wanted and native.available() else "xla"


def trim(times: npt.ArrayLike) -> np.ndarray:
    """The times without the lowest and highest 10 %, sorted."""
    ordered = np.sort(np.asarray(times, float))
    cut = len(ordered) // 10
    return ordered[cut : len(ordered) - cut]


def summarise(times_ms: Sequence[float]) -> Latency:
    """The protocol's mean, and what tells how far to trust it."""
    kept = trim(times_ms)
    return Latency(
        mean_ms=float(kept.mean()),
        std_ms=float(kept.std()),
        median_ms=float(np.median(times_ms)),
        min_ms=float(np.min(times_ms)),
        runs=len(times_ms),
    )


def ratio(
    times_ms: npt.ArrayLike,
    base_ms: npt.ArrayLike,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Trimmed mean over trimmed mean of the base, and its interval.

    The two lists are of interleaved runs; rounds are resampled in pairs (bootstrap), so that what
    slowed both at a moment cancels.
    """
    a, b = np.asarray(times_ms, float), np.asarray(base_ms, float)
    rounds = _resampled(len(a), seed, resamples)
    ratios = _trimmed_means(a[rounds]) / _trimmed_means(b[rounds])
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(trim(a).mean() / trim(b).mean()), float(low), float(high)


def interval(times_ms: npt.ArrayLike, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the protocol's mean, by bootstrap."""
    times = np.asarray(times_ms, float)
    means = _trimmed_means(times[_resampled(len(times), seed, resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resampled(n: int, seed: int, resamples: int) -> np.ndarray:
    """Indices of bootstrapped runs, a sample a row: blocks of runs that followed each other.

    A machine that is slow at one run is slow at the next; runs drawn one by one would hide that.
    """
    block = round(n ** (1 / 3))  # longer ones leave too few of them
    rng = np.random.default_rng(seed)
    starts = rng.integers(n, size=(resamples, -(-n // block)))
    rows = (starts[:, :, None] + np.arange(block)) % n
    return rows.reshape(resamples, -1)[:, :n]


def _trimmed_means(times_RN: np.ndarray) -> np.ndarray:
    """`trim(row).mean()` of each row."""
    cut = times_RN.shape[1] // 10
    return np.sort(times_RN, axis=1)[:, cut : times_RN.shape[1] - cut].mean(axis=1)


def available_cpus() -> list[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Timer:
    """A child process that loads exports and times them."""

    def __init__(self, threads: int = 0, platform: str = "cpu"):
        """Starts the child.

        Raises:
          UserError: more threads are asked for than there are CPUs.
        """
        cpus = available_cpus()
        if threads > len(cpus):
            raise UserError(f"threads is {threads}; this machine lets us use {len(cpus)} CPU(s)")
        cpus = cpus[: threads or len(cpus)]
        self.threads, self.platform = len(cpus), platform
        environment = {
            **huge_pages.without(dict(os.environ)),
            "NPROC": str(len(cpus)),
            "JAX_PLATFORMS": "cpu" if platform == "cpu" else "",
        }
        environment.pop("XLA_FLAGS", None)  # simulated devices share the cores
        self._process = subprocess.Popen(
            [sys.executable, "-m", "automoe_jax.latency.worker", ",".join(map(str, cpus))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Timer":
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Ends the child."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def time(
        self,
        exports: Sequence[str | Path],
        config: LatencyConfig,
        sentences: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """Times in ms of each export, run in turns.

        Args:
          exports: folders.
          config: lengths, beam, runs.
          sentences: real sentences, one after the other, each translated to its natural end;
            None for the protocol's lengths.

        Raises:
          UserError: an export cannot be loaded or has no such beam size.
        """
        request = {
            "exports": [str(Path(e).absolute()) for e in exports],
            "platform": self.platform,
            "sentences": None if sentences is None else list(sentences),
            **dataclasses.asdict(config),
        }
        request["platform"] = self.platform
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise RuntimeError(f"the timing process ended with exit code {code}")
        reply = json.loads(answer)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply["times_ms"]
