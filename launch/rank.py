"""Measures how well a supernet ranks its subnets; see `automoe_jax/cli/rank.py`."""

from automoe_jax.cli.process import run

run("rank")
