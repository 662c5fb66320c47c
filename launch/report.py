"""Compares runs on one page; see `automoe_jax/cli/report.py`."""

from automoe_jax.cli.process import run

run("report")
