"""Prepares corpus, tokenizer and token ids of a run.

python launch/prepare.py --config configs/wmt14.py --workdir runs/wmt14
"""

from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases.prepare import prepare

CONFIG = RunFlags()


def main():
    run = CONFIG.open_run(CONFIG.load())
    data = prepare(run)
    print(f"{run.path}: {len(data.train):,} training and {len(data.valid):,} validation pairs")
