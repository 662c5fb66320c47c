"""Prepares corpus, tokenizer and token ids of a run.

python launch/prepare.py --config configs/wmt14.py --workdir runs/wmt14
"""

from automoe_jax.cli import options, terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.phases import run as phases

CONFIG = ConfigFlag()
_WORKDIR = options.define_workdir()


def main():
    config = CONFIG.load()
    run = phases.open_run(config, _WORKDIR.value or CONFIG.default_workdir)
    data = phases.prepare_run(config, run, terminal.TerminalProgress())
    print(f"{run}: {len(data.train):,} training and {len(data.valid):,} validation pairs")
