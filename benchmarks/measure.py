"""Shared by the benchmarks: interleaved timing, the machine's rates, goals and the last line."""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automoe_jax.cli import process
from automoe_jax.system import chips
from automoe_jax.system.machine import cpu_name

process.prepare(compiling=False)  # as commands do


def interleaved(
    programs: dict[str, Callable[[], Any]], runs: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each program, in turns, until their results are ready."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for run in range(warmup + runs):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if run >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def matmul_rate(dtype: Any = jnp.float32, size: int = 2048, runs: int = 8) -> float:
    """FLOP/s of a square product."""
    key = jax.random.key(0)
    a, b = (jax.random.normal(k, (size, size), dtype) for k in jax.random.split(key))
    f = jax.jit(jnp.matmul)
    seconds = interleaved({"matmul": lambda: f(a, b)}, runs)["matmul"]
    return 2 * size**3 / float(np.median(seconds))


def memory_bandwidth(elements: int = 1 << 26, runs: int = 8) -> float:
    """Bytes/s, read and written, of an in-place update x <- x - c * y of large arrays.

    An optimizer's update makes the same kind of traffic.
    """
    f = jax.jit(lambda x, y: x - 0.001 * y, donate_argnums=0)
    x, y = jnp.ones((elements,)), jnp.ones((elements,))
    times = []
    for run in range(runs + 2):
        start = time.perf_counter()
        x = jax.block_until_ready(f(x, y))
        if run >= 2:
            times.append(time.perf_counter() - start)
    return 3 * 4 * elements / float(np.median(times))


def read_bandwidth(elements: int = 1 << 26) -> Callable[[], float]:
    """A function that measures the bytes/s at which all cores read a large array once."""
    f = jax.jit(jnp.sum)
    x = jnp.ones((elements,)) + jnp.arange(2.0)[0]

    def measured() -> float:
        start = time.perf_counter()
        f(x).block_until_ready()
        return 4 * elements / (time.perf_counter() - start)

    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {
        "median": float(np.median(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
    }


def peak_memory_bytes() -> int:
    """Peak memory of the device where it reports one, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """The machine and library that a figure was measured with."""
    return {
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def published_peak(dtype: Any) -> float | None:
    """Published FLOP/s of this device in bfloat16; None of other dtypes, and where not known."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return None
    return chips.peak_flops(jax.devices()[0].device_kind)


def names(given: str, allowed: Iterable[str], flag: str = "--only") -> list[str]:
    """The names in a flag's value, with commas between; ends the program if one is not allowed."""
    found, known = given.split(","), list(allowed)
    if unknown := set(found) - set(known):
        sys.exit(f"{flag} names {', '.join(sorted(unknown))}; allowed: {', '.join(known)}")
    return found


def integers(parser: argparse.ArgumentParser, flag: str, given: str, least: int) -> list[int]:
    """The integers in a flag's value, with commas between; ends the program if one is too small."""
    try:
        found = [int(text) for text in given.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        parser.error(f"{flag} is {given!r}; give integers of at least {least}, commas between")
    return found


def goal(value: float, limit: float, *, at_most: bool = True) -> dict[str, Any]:
    """An entry of "goals": `value` may be at most (or must be at least) `limit`."""
    met = value <= limit if at_most else value >= limit
    return {"value": round(value, 4), "goal": limit, "met": bool(met)}


def finish(result: dict[str, Any], goals: dict[str, dict[str, Any]]):
    """Prints the JSON line; exits with 1 where a goal is missed."""
    print(json.dumps({**result, "goals": goals}))
    sys.exit(0 if all(g["met"] for g in goals.values()) else 1)
