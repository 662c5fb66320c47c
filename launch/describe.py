"""Counts a subnet, or describes a search space; see `automoe_jax/cli/describe.py`."""

from automoe_jax.cli.process import run

run("describe")
