"""Prepares corpus, tokenizer and token ids of a run.

python launch/prepare.py --config configs/wmt14.py --workdir runs/wmt14
"""

from absl import flags
from ml_collections import config_flags

from automoe_jax.cli import process as common

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: runs/<config>)")


def main():
    common.set_jax_defaults()
    config = common.load_config(_CONFIG)
    from automoe_jax.phases import run as phases  # noqa: PLC0415

    run = phases.open_run(config, _WORKDIR.value or common.default_workdir())
    data = phases.prepare_run(config, run, common.TerminalProgress())
    print(f"{run}: {len(data.train):,} training and {len(data.valid):,} validation pairs")
