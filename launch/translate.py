"""Translates text with an export; see `automoe_jax/cli/translate.py`."""

from automoe_jax.cli.process import run

run("translate")
