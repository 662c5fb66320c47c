"""Shows how the trainings of a run go; see `automoe_jax/cli/watch.py`."""

from automoe_jax.cli.process import run

run("watch")
