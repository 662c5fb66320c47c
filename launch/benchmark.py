"""Measures the latency of exports on this machine; see `automoe_jax/cli/benchmark.py`."""

from automoe_jax.cli.process import run

run("benchmark")
