"""Tells how far a supernet's ranking of subnets can be believed.

python launch/rank.py --config configs/multi30k.py --workdir runs/multi30k --subnets=12 \
    --config.subnet_training.steps=600

Trains subnets from scratch, spread over the range of FLOPs, and compares their losses with those of
inherited weights: rank correlation, offset, and a scatter plot.
"""

import dataclasses

from absl import flags
from rich.table import Table

from automoe_jax.cli import options, terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.phases import rank as ranking
from automoe_jax.phases import run as phases
from automoe_jax.system import compile_cache
from automoe_jax.system.errors import UserError

CONFIG = ConfigFlag()
_WORKDIR = options.define_workdir()
_OUT = flags.DEFINE_string("out", "rank", "folder in the workdir")
_SUBNETS = flags.DEFINE_integer("subnets", 12, "how many to train")
_JSON = options.define_json("print the result as one JSON line")


def main():
    config = CONFIG.load()
    if _SUBNETS.value < ranking.FEWEST:
        raise UserError(f"--subnets is {_SUBNETS.value}; give at least {ranking.FEWEST}")
    # Only the loss at the end is wanted.
    quiet = dataclasses.replace(config.subnet_training, eval_every=0)
    config = dataclasses.replace(config, subnet_training=quiet)
    progress = terminal.TerminalProgress()
    run = phases.open_run(config, _WORKDIR.value or CONFIG.default_workdir)
    compile_cache.enable(run / phases.CACHE)
    data = phases.prepare_run(config, run, progress)
    params, step = phases.supernet_params(config, run, data.tokenizer.vocab_sizes)
    result = ranking.rank(config, run, _OUT.value, data, params, step, _SUBNETS.value, progress)
    if _JSON.value:
        terminal.print_json(result)
        return
    table = Table("subnet", "GFLOPs", "inherited loss", "trained loss")
    for i, row in enumerate(result["subnets"], 1):
        table.add_row(
            str(i), f"{row['gflops']:.4g}", f"{row['inherited']:.4f}", f"{row['trained']:.4f}"
        )
    terminal.print_table(table)
    print(
        f"Kendall's tau {result['tau']:.3f} [{result['tau_low']:.3f}, {result['tau_high']:.3f}], "
        f"Spearman {result['spearman']:.3f}, inherited less trained loss {result['offset']:+.3f} "
        f"nats a token; the supernet's first choice is {result['regret']:.4f} nats from the best"
    )
    print(f"the supernet is {result['verdict']}")
    print(f"picture: {run / _OUT.value / 'rank.png'}")
