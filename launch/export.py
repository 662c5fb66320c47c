"""Exports a subnet as a folder that translates on its own; see `automoe_jax/cli/export.py`."""

from automoe_jax.cli.process import run

run("export")
