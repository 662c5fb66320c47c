"""Prepares corpus, tokenizer and token ids of a run; see `automoe_jax/cli/prepare.py`."""

from automoe_jax.cli.process import run

run("prepare")
