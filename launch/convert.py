"""Reads a fairseq checkpoint of HAT or AutoMoE into a run; see `automoe_jax/cli/convert.py`."""

from automoe_jax.cli.process import run

run("convert")
