"""Scores an export; see `automoe_jax/cli/evaluate.py`."""

from automoe_jax.cli.process import run

run("evaluate")
