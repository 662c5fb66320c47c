"""Searches a supernet for the best subnet within limits; see `automoe_jax/cli/search.py`."""

from automoe_jax.cli.process import run

run("search")
