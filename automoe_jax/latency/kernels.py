"""The kernels that a latency is measured on; apart from `process`, which does without JAX."""

from automoe_jax.architecture.subnet import CELLS
from automoe_jax.decoding import native
from automoe_jax.decoding.schema import KERNELS_OF
from automoe_jax.latency.config import LatencyConfig


def kernels_used(config: LatencyConfig, cell: str = CELLS[0]) -> str:
    """Which kernels exports of subnets with these cells are timed on here: "native" or "xla"."""
    wanted = config.platform == "cpu" and config.kernels != "xla"
    wanted = wanted and "native" in KERNELS_OF[cell]
    return "native" if wanted and native.available() else "xla"
