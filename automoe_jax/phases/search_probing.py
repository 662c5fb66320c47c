"""Which latencies a search measures, when, and the final measurement of a candidate."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from automoe_jax.architecture.subnet import Subnet
from automoe_jax.latency.records import FINAL, FinalMeasurement, final_of
from automoe_jax.phases.search_latency import SearchLatency
from automoe_jax.search.candidates import Scored


def round_share(latency: SearchLatency, reserve: int, rounds: int) -> int:
    """Measurements of one of the `rounds` that are left, with `reserve` kept for the end."""
    spare = latency.left() - reserve
    return int(max(0, min(spare, math.ceil(spare / max(1, rounds)))))


def measure_parents(
    latency: SearchLatency,
    scored: list[Scored],
    feasible: Callable[[Subnet], bool],
    count: int,
    share: int,
) -> list[Scored]:
    """Measures the best candidates until `count` of them are feasible; at most `share` of them.

    `scored` is a population, best first. Returns the feasible ones; the best of all if none is.
    """
    parents: list[Scored] = []
    for s in scored:
        if len(parents) == count:
            break
        if not latency.is_measured(s.subnet) and share > 0:
            latency.measure(s.subnet)
            share -= 1
        if feasible(s.subnet):
            parents.append(s)
    return parents or scored[:1]


def measure_spread(latency: SearchLatency, scored: list[Scored], count: int):
    """Measures up to `count` of those not measured yet, evenly along the list."""
    unknown = [s.subnet for s in scored if not latency.is_measured(s.subnet)]
    count = min(len(unknown), max(count, 0))
    for i in np.linspace(0, len(unknown) - 1, count).round().astype(int).tolist():
        latency.measure(unknown[i])


def verify(latency: SearchLatency, subnet: Subnet) -> FinalMeasurement:
    """The final measurement of a subnet, beside the smallest and the largest one.

    Under a limit in ms it waits for a machine that is slower than usual. A measurement that such a
    machine may have made fail is repeated when it is calm.
    """
    return final_of(latency.log.get(FINAL, subnet, lambda: _probe_final(latency, subnet)))


def _probe_final(latency: SearchLatency, subnet: Subnet) -> dict[str, Any]:
    assert latency.prober is not None
    policy, scale = latency.policy, latency.known().scale
    looks_before = sum(line.get("looks", 0) for line in latency.log.asked(FINAL).values())
    tries = looks = 0
    while True:
        if latency.limit_ms < math.inf or tries:
            looks += _wait_until_calm(latency, policy.looks - looks_before - looks)
        final = latency.prober.verify(subnet, latency.largest, latency.reference_ms())
        final = dataclasses.replace(final, slowdown=final.slowdown / scale)
        tries += 1
        # Of a ratio a slow machine alone changes little, a changing one the interval.
        unsure = final.ratio <= latency.limit_ratio < final.ratio_high
        disturbed = final.slowdown > policy.calm and (final.high_ms > latency.limit_ms or unsure)
        out_of_looks = looks_before + looks >= policy.looks
        if not disturbed or out_of_looks or tries == policy.tries or latency.left() - tries < 2:
            break
    found = {"value": final.latency.mean_ms, "how": "final measurement"}
    return {**found, "tries": tries, "looks": looks, "verdict": dataclasses.asdict(final)}


def _wait_until_calm(latency: SearchLatency, looks_left: int) -> int:
    """Waits while the machine is slower than usual; returns the number of looks spent."""
    assert latency.prober is not None
    pause_s = latency.policy.look_pause_s
    for look in range(looks_left):
        slowdown = latency.prober.slowdown(latency.largest, latency.reference_ms())
        slowdown /= latency.known().scale
        if slowdown <= latency.policy.calm:
            return look
        if look == 0:
            latency.note(
                f"the machine takes {slowdown:.3g} times as long as during most of the search: "
                f"waiting for it, up to {(looks_left - 1) * pause_s:.0f} s, to measure the result"
            )
        time.sleep(pause_s)
    return looks_left
