"""Says what each choice of a search space is worth; see `automoe_jax/cli/sensitivity.py`."""

from automoe_jax.cli.process import run

run("sensitivity")
