"""Fits a latency model of this machine; see `automoe_jax/cli/fit_latency.py`."""

from automoe_jax.cli.process import run

run("fit_latency")
