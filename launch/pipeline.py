"""Runs all phases in one workdir; see `automoe_jax/cli/pipeline.py`."""

from automoe_jax.cli.process import run

run("pipeline")
