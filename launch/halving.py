"""Chooses among candidates by short trainings; see `automoe_jax/cli/halving.py`."""

from automoe_jax.cli.process import run

run("halving")
