"""Lists what comes with the project; see `automoe_jax/cli/configs.py`."""

from automoe_jax.cli.process import run

run("configs")
