"""Serves a page to try exports on; see `automoe_jax/cli/demo.py`."""

from automoe_jax.cli.process import run

run("demo")
