"""Trains a supernet or a subnet; see `automoe_jax/cli/train.py`."""

from automoe_jax.cli.process import run

run("train")
