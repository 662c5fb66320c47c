"""The kernels that a latency is measured on; apart from `process`, which does without JAX."""

from automoe_jax.decoding import native
from automoe_jax.latency.config import LatencyConfig


def kernels_used(config: LatencyConfig) -> str:
    """Which kernels exports are timed on here: "native" or "xla"."""
    wanted = config.platform == "cpu" and config.kernels != "xla"
    return "native" if wanted and native.available() else "xla"
