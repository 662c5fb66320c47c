"""Shows which words go to which expert; see `automoe_jax/cli/routing.py`."""

from automoe_jax.cli.process import run

run("routing")
