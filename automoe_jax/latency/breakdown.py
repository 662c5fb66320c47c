"""What the parts of a translation take."""

from pathlib import Path

from automoe_jax.decoding.parts import PARTS
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.process import Timer
from automoe_jax.latency.statistics import added


def parts_ms(
    timer: Timer, export: str | Path, config: LatencyConfig
) -> dict[str, tuple[float, float, float]]:
    """For each of `PARTS`, the ms that it adds to those before it, with their 95 % interval."""
    return dict(zip(PARTS, added(timer.parts(export, config)), strict=True))
