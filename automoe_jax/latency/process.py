"""The child process that times exports.

Timing runs in a child because the number of threads can only be set before JAX starts, and because
the memory and threads of a training process would disturb it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automoe_jax.latency.config import LatencyConfig
from automoe_jax.system import malloc
from automoe_jax.system.errors import UserError


def available_cpus() -> list[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def thread_count(threads: int) -> int:
    """The number of CPU cores to use (0: all); `UserError` if there are fewer than `threads`."""
    cpus = len(available_cpus())
    if threads > cpus:
        raise UserError(f"threads is {threads}; this machine lets us use {cpus} CPU(s)")
    return threads or cpus


class Timer:
    """A child process that loads exports and times them."""

    def __init__(self, threads: int = 0, platform: str = "cpu"):
        """Starts the child; `UserError` if there are fewer CPUs than `threads`."""
        cpus = available_cpus()[: thread_count(threads)]
        self.threads, self.platform = len(cpus), platform
        env = {
            **malloc.without_huge_pages(dict(os.environ)),
            "NPROC": str(len(cpus)),
            "JAX_PLATFORMS": "cpu" if platform == "cpu" else "",
        }
        env.pop("XLA_FLAGS", None)  # simulated devices share the cores
        command = [sys.executable, "-m", "automoe_jax.latency.worker", ",".join(map(str, cpus))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def __enter__(self) -> "Timer":
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Ends the child."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):  # of a request that a dead child never read
                self._process.stdin.close()
        self._process.wait()

    def time(
        self,
        exports: Sequence[str | Path],
        config: LatencyConfig,
        sentences: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """Times in ms of each export, run in turns.

        Real `sentences` are translated one after the other, each to its natural end; None takes the
        protocol's lengths. `UserError` if an export cannot be loaded or has no such beam size.
        """
        texts = None if sentences is None else list(sentences)
        return self._answer(exports, config, {"sentences": texts, "parts": False})

    def parts(self, export: str | Path, config: LatencyConfig) -> list[list[float]]:
        """Times in ms of the protocol's translation by its parts, run in turns.

        Of `decoding.parts.PARTS`, each with those before it, so the last are those of `time`.
        """
        return self._answer([export], config, {"sentences": None, "parts": True})

    def _answer(
        self, exports: Sequence[str | Path], config: LatencyConfig, more: dict[str, Any]
    ) -> list[list[float]]:
        request = {
            "exports": [str(Path(e).absolute()) for e in exports],
            **dataclasses.asdict(config),
            **more,
            "platform": self.platform,
        }
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
            if code == -signal.SIGKILL:
                raise UserError(
                    "the process that times exports was killed, as where memory runs out; free "
                    "some, and give the command again"
                )
            raise RuntimeError(f"the timing process ended with exit code {code}")
        reply = json.loads(answer)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply["times_ms"]
