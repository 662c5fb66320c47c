"""Writes a corpus of a teacher's translations; see `automoe_jax/cli/distill.py`."""

from automoe_jax.cli.process import run

run("distill")
